"""A loaded model that reads text: the compiled form of `moejax.model.reading`."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.model.reading import Reading, read
from moejax.model.transformer import Transformer
from moejax.serve.load import Model


class Reader:
    """Reads rows of tokens; every new shape compiles a program."""

    def __init__(self, model: Model):
        """`model`: on any mesh without a pipeline; each of its devices reads all rows."""

        def numbers(module: Transformer, tokens: Array, segments: Array) -> Reading:
            found = read(module, tokens, segments, model.dtype)
            return found._replace(best=found.best.astype(jnp.int32))

        self._model, self._compiled = model, model.compiled(numbers)

    def __call__(self, tokens_BN: np.ndarray, segment_ids_BN: np.ndarray | None = None) -> Reading:
        """`Reading` of int32 [B, N] tokens, as NumPy arrays; with segments attention stays within each."""
        tokens = np.asarray(tokens_BN, np.int32)
        segments = np.zeros_like(tokens) if segment_ids_BN is None else np.asarray(segment_ids_BN, np.int32)
        found = jax.device_get(self._compiled(self._model.module, tokens, segments))
        return found._replace(best=found.best.astype(bool))
