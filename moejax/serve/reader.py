"""A loaded model that reads text: the compiled form of `moejax.model.reading`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from moejax.mesh import BATCH_AXES
from moejax.model.reading import Reading, read
from moejax.model.shards import gather_for_step, widened
from moejax.model.transformer import Transformer
from moejax.serve.load import Model
from moejax.train.together import CompiledTogether
from moejax.varying import vary_over


class Reader:
    """Reads rows of tokens; every new shape compiles a program."""

    def __init__(self, model: Model):
        """`model`: on any mesh without a pipeline; each of its devices reads all rows."""
        self._model = model

        def on_each_device(module: Transformer, tokens: Array, segments: Array) -> Reading:
            """The same on every device; the maximum is that, known to be the same."""
            inputs = (module, tokens, segments)
            module, tokens, segments = jax.tree.map(lambda x: vary_over(x, BATCH_AXES), inputs)
            weights = widened(gather_for_step(module, module.mesh, model.dtype))
            found = read(weights, tokens, segments, model.dtype)
            found = found._replace(best=found.best.astype(jnp.int32))
            return jax.tree.map(lambda x: jax.lax.pmax(vary_over(x, BATCH_AXES), BATCH_AXES), found)

        def all_devices(module: Transformer, tokens: Array, segments: Array) -> Reading:
            specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, module)
            run = jax.shard_map(on_each_device, mesh=model.mesh, in_specs=(specs, P(), P()), out_specs=P())
            return run(module, tokens, segments)

        self._compiled = CompiledTogether(jax.jit(all_devices))

    def __call__(self, tokens_BN: np.ndarray, segment_ids_BN: np.ndarray | None = None) -> Reading:
        """`Reading` of int32 [B, N] tokens, as NumPy arrays; with segments attention stays within each."""
        tokens = np.asarray(tokens_BN, np.int32)
        segments = np.zeros_like(tokens) if segment_ids_BN is None else np.asarray(segment_ids_BN, np.int32)
        found = jax.device_get(self._compiled(self._model.module, tokens, segments))
        return found._replace(best=found.best.astype(bool))
