"""The products of dense layers: where precision is decided.

The weights given are FP32 masters; they are cast to the activations' dtype here, or quantised (`fp8.py`), and their
gradient leaves the product in FP32, as the published recipe wants it (arXiv:2412.19437, section 3.3).

T tokens, I and O dims of a product, D model dim, F width of a feed-forward network, G = 2 * F.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moejax.ops.fp8 import KeptRows, keep_rows, kept_rows, quantise_both, quantise_columns, quantise_rows
from moejax.ops.grouped import grouped_dot, grouped_outer
from moejax.ops.swiglu import scaled_swiglu, scaled_swiglu_gradient, swiglu
from moejax.varying import vary_like

FLOATS = {"bf16": jnp.bfloat16, "fp32": jnp.float32, "fp8": jnp.bfloat16}  # of activations, as the settings name them


def linear(
    x: Float[Array, "*B I"], w: Float[Array, "I O"], fp8: bool = False, power_of_two: bool = False
) -> Float[Array, "*B O"]:
    """`x @ w` in `x`'s dtype; `w`'s gradient is accumulated in float32.

    With `fp8` all three products are of E4M3 numbers, and the backward pass keeps `x` as those. `power_of_two`: the
    scales of `x` are, as section 3.3 has it for the layer after attention.
    """
    return _scaled_linear(x, w, power_of_two) if fp8 else _linear(x, w)


def feed_forward(
    x: Float[Array, "*B D"], gate_up: Float[Array, "D G"], down: Float[Array, "F D"], fp8: bool = False
) -> Float[Array, "*B D"]:
    """Two linear layers with SwiGLU between them.

    With `fp8` the backward pass keeps `x` and the input of the activation as E4M3, and computes the activation again.
    """
    if fp8:
        return _scaled_feed_forward(x, gate_up, down)
    return linear(swiglu(checkpoint_name(linear(x, gate_up), "mlp_hidden")), down)


# -------------------------------------------------------------------------------------------------------------- plain


@jax.custom_vjp
def _linear(x: Array, w: Array) -> Array:
    return x @ w.astype(x.dtype)


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _linear(x, w), (x, w)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    dx = dy @ w.astype(dy.dtype).T
    x_TI, dy_TO = _flat(x), _flat(dy)
    dw = jnp.einsum("ti,to->io", x_TI, dy_TO, preferred_element_type=w.dtype)
    return dx, dw


_linear.defvjp(_forward, _backward)


# ----------------------------------------------------------------------------------------------------------------- FP8


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scaled_linear(x: Array, w: Array, power_of_two: bool) -> Array:
    return _scaled_linear_forward(x, w, power_of_two)[0]


def _scaled_linear_forward(x: Array, w: Array, power_of_two: bool) -> tuple[Array, tuple[KeptRows, Array]]:
    x_TI = quantise_rows(_flat(x), power_of_two)
    y_TO = grouped_dot(x_TI, w[None], None, x.dtype)
    return y_TO.reshape(*x.shape[:-1], -1), (keep_rows(x_TI), w)


def _scaled_linear_backward(power_of_two: bool, saved: tuple[KeptRows, Array], dy: Array) -> tuple[Array, Array]:
    kept, w = saved
    dy_TO, dy_columns = quantise_both(_flat(dy), None)
    dx_TI = grouped_dot(dy_TO, w[None], None, dy.dtype, transposed=True)
    dw = grouped_outer(quantise_columns(kept_rows(kept), None, power_of_two), dy_columns, None)
    return dx_TI.reshape(*dy.shape[:-1], -1), dw[0].astype(w.dtype)


_scaled_linear.defvjp(_scaled_linear_forward, _scaled_linear_backward)


@jax.custom_vjp
def _scaled_feed_forward(x: Array, gate_up: Array, down: Array) -> Array:
    return _scaled_feed_forward_forward(x, gate_up, down)[0]


def _scaled_feed_forward_forward(x: Array, gate_up: Array, down: Array) -> tuple[Array, tuple]:
    x_TD = quantise_rows(_flat(x))
    h_TG = grouped_dot(x_TD, gate_up[None], None, x.dtype)
    u_TF, h = scaled_swiglu(h_TG, _ones(h_TG))
    y_TD = grouped_dot(u_TF, down[None], None, x.dtype)
    return y_TD.reshape(x.shape), (keep_rows(x_TD), keep_rows(h, "mlp_hidden"), gate_up, down)


def _scaled_feed_forward_backward(saved: tuple, dy: Array) -> tuple[Array, Array, Array]:
    x, h, gate_up, down = saved
    dy_TD, dy_columns = quantise_both(_flat(dy), None)
    du_TF = grouped_dot(dy_TD, down[None], None, dy.dtype, transposed=True)
    dh, dh_columns, u_columns, _ = scaled_swiglu_gradient(kept_rows(h), _ones(du_TF), du_TF, None)
    dx_TD = grouped_dot(dh, gate_up[None], None, dy.dtype, transposed=True)
    ddown = grouped_outer(u_columns, dy_columns, None)[0]
    dgate_up = grouped_outer(quantise_columns(kept_rows(x), None), dh_columns, None)[0]
    return dx_TD.reshape(dy.shape), dgate_up.astype(gate_up.dtype), ddown.astype(down.dtype)


_scaled_feed_forward.defvjp(_scaled_feed_forward_forward, _scaled_feed_forward_backward)


# ------------------------------------------------------------------------------------------------------------- pieces


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _ones(x_TF: Array) -> Array:
    return vary_like(jnp.ones((len(x_TF),), jnp.float32), x_TF)
