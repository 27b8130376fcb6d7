"""The product of every linear layer: where precision is decided.

The weights given are FP32 masters; they are cast to the activations' dtype here, and their gradient leaves the product
in FP32, as the published recipe wants it (arXiv:2412.19437, section 3.3).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FLOATS = {"bf16": jnp.bfloat16, "fp32": jnp.float32}  # as the settings name them


@jax.custom_vjp
def linear(x: Float[Array, "*B I"], w: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """`x @ w` in `x`'s dtype; `w`'s gradient is accumulated in float32."""
    return x @ w.astype(x.dtype)


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, w), (x, w)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    dx = dy @ w.astype(dy.dtype).T
    x_TI, dy_TO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dw = jnp.einsum("ti,to->io", x_TI, dy_TO, preferred_element_type=w.dtype)
    return dx, dw


linear.defvjp(_forward, _backward)
