"""The validation loss: the same batches every time, kept on the devices."""

import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from moejax.config import RunConfig
from moejax.data.batches import Batch
from moejax.data.dataset import Data
from moejax.train.state import TrainState
from moejax.train.step import place
from moejax.train.together import everyones


class Validation:
    """The validation text of a run, and the loss on it."""

    def __init__(
        self, config: RunConfig, mesh: Mesh, data: Data, eval_step: Callable[[TrainState, Batch], tuple[Array, Array]]
    ):
        """Places `log.valid_batches` batches; `eval_step`: as `make_eval_step` returns it."""
        token_bytes = data.tokenizer.token_bytes
        batches = data.valid_batches(config.log.valid_batches, config.data.batch_size)
        own = [float(token_bytes[batch.tokens[:, 1:]][batch.loss_mask[:, 1:]].sum()) for batch in batches]
        parts = dict(everyones((data.host, own))).values()  # processes that hold the same rows say the same
        self._batches = [place(batch, mesh) for batch in batches]
        self._text_bytes = sum(sum(texts) for texts in zip(*parts, strict=True))  # that the batches predict
        self._eval_step = eval_step

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`valid_loss` and `valid_bits_per_byte`, as in METRICS; nothing where there is no validation text."""
        if not self._batches:
            return {}
        nats, tokens = 0.0, 0.0
        for batch in self._batches:
            batch_nats, batch_tokens = jax.device_get(self._eval_step(state, batch))
            nats, tokens = nats + float(batch_nats), tokens + float(batch_tokens)
        return {"valid_loss": nats / tokens, "valid_bits_per_byte": nats / math.log(2) / self._text_bytes}
