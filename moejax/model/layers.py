"""The parts that every layer has: matrices, norms and the dense feed-forward network."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moejax.model.shards import SHARDS, Gather, parameter, placed
from moejax.ops.linear import feed_forward
from moejax.ops.norm import rms_norm


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, spec: P, gather: Gather = "compute") -> nnx.Param:
    """A parameter drawn from N(0, std), float32."""
    draw = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=placed(spec))
    return parameter(draw * std, spec, gather)


class Norm(nnx.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, dim: int, eps: float):
        self.scale = parameter(jnp.ones((dim,), jnp.float32, out_sharding=placed(P(SHARDS))), P(SHARDS), gather="fp32")
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last dim."""
        return rms_norm(x, self.scale[...], self.eps)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The gate's and up's columns stand side by side in one matrix."""

    def __init__(self, rngs: nnx.Rngs, dim: int, width: int, std: float, fp8: bool = False):
        self.gate_up_DG = matrix(rngs, (dim, 2 * width), std, P(SHARDS, None))
        self.down_FD = matrix(rngs, (width, dim), std, P(None, SHARDS))
        self.fp8 = fp8

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Position by position."""
        return feed_forward(x, self.gate_up_DG[...], self.down_FD[...], self.fp8)
