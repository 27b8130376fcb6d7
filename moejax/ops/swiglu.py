"""SwiGLU between the two products of a feed-forward network, in the forms that its neighbours want.

With a weight a row: that of the token's choice, so that summing a token's rows needs none (as in DeepSeek's own
kernels; deepseek_v3.md, section 3.7). Around FP8 products the activation leaves as FP8, and so does what the backward
pass keeps of it: its input; its output is computed again (arXiv:2412.19437, section 3.3.3).

R rows, E experts, F width of the activation, G = 2 * F: the gate's and the other factor's columns, side by side.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.ops.fp8 import (
    ScaledColumns,
    ScaledRows,
    dequantise_rows,
    one_group,
    quantise_columns,
    quantise_rows,
)
from moejax.ops.platform import by_platform


@jax.custom_vjp
def swiglu(h: Float[Array, "*R G"]) -> Float[Array, "*R F"]:
    """silu(first half) * second half; computed in float32, in `h`'s dtype. The backward pass keeps `h` only."""
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(h.dtype)


def _gradient(h: Array, du: Array) -> Array:
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    du = du.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return jnp.concatenate([du * up * (sigmoid + silu * (1 - sigmoid)), du * silu], axis=-1).astype(h.dtype)


swiglu.defvjp(lambda h: (swiglu(h), h), lambda h, du: (_gradient(h, du),))


def weighted_swiglu(h_RG: Float[Array, "R G"], weights_R: Float[Array, "R"]) -> Float[Array, "R F"]:
    """`swiglu(h)` times a weight a row, in `h`'s dtype."""
    return (swiglu(h_RG).astype(jnp.float32) * weights_R[:, None]).astype(h_RG.dtype)


def weighted_swiglu_gradient(
    h_RG: Float[Array, "R G"], weights_R: Float[Array, "R"], du_RF: Float[Array, "R F"]
) -> tuple[Float[Array, "R G"], Float[Array, "R"]]:
    """The gradients of `h`, in its dtype, and of the weights, float32."""
    du_RF = du_RF.astype(jnp.float32)
    dweights_R = (du_RF * swiglu(h_RG).astype(jnp.float32)).sum(-1)
    return _gradient(h_RG, du_RF * weights_R[:, None]), dweights_R


def scaled_swiglu(h_RG: Float[Array, "R G"], weights_R: Float[Array, "R"]) -> tuple[ScaledRows, ScaledRows]:
    """`weighted_swiglu(h)` in FP8, and `h` in FP8 for the backward pass."""

    def plain(h: Array, weights: Array) -> tuple[ScaledRows, ScaledRows]:
        return quantise_rows(weighted_swiglu(h, weights)), quantise_rows(h)

    def kernel(h: Array, weights: Array) -> tuple[ScaledRows, ScaledRows]:
        from moejax.kernels import swiglu

        u, kept = swiglu.weighted_swiglu_rows(h, weights)
        return ScaledRows(*u), ScaledRows(*kept)

    return by_platform(kernel, plain, h_RG, weights_R)


def scaled_swiglu_gradient(
    h: ScaledRows, weights_R: Float[Array, "R"], du_RF: Float[Array, "R F"], sizes_E: Int[Array, "E"] | None
) -> tuple[ScaledRows, ScaledColumns, ScaledColumns, Float[Array, "R"]]:
    """Everything that the backward pass makes of `h` and the gradient of `scaled_swiglu`'s first result.

    Returns:
        dh: `h`'s gradient, as a factor of the rows' gradient;
        dh_columns: the same, as a factor of the weights' gradient;
        u_columns: the activation itself, the factor of the following weights' gradient;
        dweights: float32.
    """

    def plain(h: ScaledRows, weights: Array, du: Array, sizes: Array | None) -> tuple:
        h_RG = dequantise_rows(h).astype(du.dtype)
        dh_RG, dweights_R = weighted_swiglu_gradient(h_RG, weights, du)
        u_RF = weighted_swiglu(h_RG, weights)
        return quantise_rows(dh_RG), quantise_columns(dh_RG, sizes), quantise_columns(u_RF, sizes), dweights_R

    def kernel(h: ScaledRows, weights: Array, du: Array, sizes: Array | None) -> tuple:
        from moejax.kernels import swiglu

        *made, dweights_R = swiglu.swiglu_gradient_tiles(h, du, weights, one_group(sizes, len(du)))
        return ScaledRows(*made[0]), ScaledColumns(*made[1]), ScaledColumns(*made[2]), dweights_R

    return by_platform(kernel, plain, h, weights_R, du_RF, sizes_E)
