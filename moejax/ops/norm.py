"""Root-mean-square normalisation."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """`x` over its root mean square along D, times `scale`; computed in float32, in `x`'s dtype.

    The backward pass keeps `x` and one number per position.
    """
    return _forward(x, scale, eps)[0]


def _forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array, Array]]:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype), (x, inverse, scale)


def _backward(eps: float, saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array]:
    x, inverse, scale = saved
    normed, dy32 = x.astype(jnp.float32) * inverse, dy.astype(jnp.float32)
    dnormed = dy32 * scale
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))
    return dx.astype(x.dtype), (dy32 * normed).reshape(-1, x.shape[-1]).sum(0)


rms_norm.defvjp(_forward, _backward)
