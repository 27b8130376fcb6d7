"""Routed experts: rows sorted by expert, one SwiGLU over the ragged groups, rows summed back to their tokens.

The weight of a token's choice is multiplied inside the SwiGLU, so that summing back needs no weights and the backward
pass no outputs (as in DeepSeek's own kernels). Three grouped products carry the work (forward, input gradient, weight
gradient); each is a function on which a GPU kernel can stand. Their cost follows the rows, not the number of experts,
and an empty group has a gradient of exactly 0.

T tokens, K experts per token, R = T * K rows, E experts, D model dim, F expert width, G = 2 * F, I and O dims of one
product.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.ops.varying import vary_like, zeros_varying

_LARGE, _SMALL = 256, 64  # rows of a product inside a group, and at its end


# ------------------------------------------------------------------------------------------ to rows and back to tokens


def sort_by_expert(ids_TK: Int[Array, "T K"]) -> tuple[Int[Array, "R"], Int[Array, "T K"]]:
    """The order that sorts the T * K choices by expert (stable), and the row where each choice lands."""
    order_R = jnp.argsort(ids_TK.reshape(-1), stable=True).astype(jnp.int32)
    row_TK = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(order_R.size, dtype=jnp.int32), unique_indices=True)
    return order_R, row_TK.reshape(ids_TK.shape)


def _rows(x_TD: Array, order_R: Array, row_TK: Array) -> Float[Array, "R D"]:
    """Each token's row, once for each of its experts, in the order of `sort_by_expert`."""
    return x_TD[order_R // row_TK.shape[1]]


def _sums(rows_RD: Array, row_TK: Array) -> Float[Array, "T D"]:
    """The sum of each token's K rows, in float32; the gradient of `_rows`, and it of this."""
    return sum((rows_RD[row_T].astype(jnp.float32) for row_T in row_TK.T), jnp.zeros((), jnp.float32))


# ----------------------------------------------------------------------------------------------------- grouped products


def _for_blocks(start: Array, size: Array, num_rows: int, body: Callable[..., Any], carry: Any) -> Any:
    """`carry` after `body(carry, offset, rows, own)` for blocks of rows that cover `size` rows from `start`.

    `own` says which rows of a block are in the group and not in an earlier block; None: all. Only the small blocks at
    the end of a group have others.
    """
    large, small = min(_LARGE, num_rows), min(_SMALL, num_rows)
    whole = size // large
    carry = lax.fori_loop(0, whole, lambda i, c: body(c, start + i * large, large, None), carry)
    rest, end = start + whole * large, start + size

    def at_the_end(i: Array, carry: Any) -> Any:
        wanted = rest + i * small
        offset = jnp.minimum(wanted, num_rows - small)
        place = offset + jnp.arange(small)
        return body(carry, offset, small, ((place >= wanted) & (place < end))[:, None])

    return lax.fori_loop(0, -(-(end - rest) // small), at_the_end, carry)


def _starts(sizes_E: Array) -> Array:
    return jnp.cumsum(sizes_E) - sizes_E


def grouped_dot(
    x_RI: Float[Array, "R I"], w_EIO: Float[Array, "E I O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """Each row times its expert's matrix, in `x`'s dtype.

    The first `sizes_E[0]` rows are expert 0's, and so on; rows beyond the last group give 0.
    """
    return _grouped_dot(x_RI, w_EIO, sizes_E, transposed=False)


def grouped_dot_transposed(
    dy_RO: Float[Array, "R O"], w_EIO: Float[Array, "E I O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R I"]:
    """Each row times the transpose of its expert's matrix: the gradient of `grouped_dot`'s rows."""
    return _grouped_dot(dy_RO, w_EIO, sizes_E, transposed=True)


def _grouped_dot(x: Array, w: Array, sizes_E: Array, transposed: bool) -> Array:
    def expert(y: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w, start, size = group
        w = (w.T if transposed else w).astype(x.dtype)

        def block(y: Array, offset: Array, rows: int, own: Array | None) -> Array:
            product = lax.dynamic_slice_in_dim(x, offset, rows) @ w
            if own is not None:
                product = jnp.where(own, product, lax.dynamic_slice_in_dim(y, offset, rows))
            return lax.dynamic_update_slice_in_dim(y, product, offset, 0)

        return _for_blocks(start, size, x.shape[0], block, y), None

    columns = w.shape[1] if transposed else w.shape[2]
    nothing = vary_like(zeros_varying((x.shape[0], columns), x.dtype, x), w)
    return lax.scan(expert, nothing, (w, _starts(sizes_E), sizes_E))[0]


def grouped_outer(
    x_RI: Float[Array, "R I"], dy_RO: Float[Array, "R O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "E I O"]:
    """x^T dy of each group, float32: the gradient of `grouped_dot`'s matrices; exactly 0 for an empty group."""

    def expert(_: None, group: tuple[Array, Array]) -> tuple[None, Array]:
        start, size = group

        def block(dw: Array, offset: Array, rows: int, own: Array | None) -> Array:
            x, dy = (lax.dynamic_slice_in_dim(a, offset, rows) for a in (x_RI, dy_RO))
            if own is not None:
                x, dy = jnp.where(own, x, 0), jnp.where(own, dy, 0)
            return dw + jnp.einsum("ri,ro->io", x, dy, preferred_element_type=jnp.float32)

        nothing = zeros_varying((x_RI.shape[1], dy_RO.shape[1]), jnp.float32, dy_RO)
        return None, _for_blocks(start, size, x_RI.shape[0], block, nothing)

    return lax.scan(expert, None, (_starts(sizes_E), sizes_E))[1]


# -------------------------------------------------------------------------------------------------------------- SwiGLU


@jax.custom_vjp
def swiglu(h: Float[Array, "*R G"]) -> Float[Array, "*R F"]:
    """silu(first half) * second half; computed in float32, in `h`'s dtype. The backward pass keeps `h` only."""
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(h.dtype)


def _swiglu_gradient(h: Array, du: Array) -> Array:
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    du = du.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return jnp.concatenate([du * up * (sigmoid + silu * (1 - sigmoid)), du * silu], axis=-1).astype(h.dtype)


swiglu.defvjp(lambda h: (swiglu(h), h), lambda h, du: (_swiglu_gradient(h, du),))


def _weighted_swiglu(h: Array, weights: Array) -> Array:
    return (swiglu(h).astype(jnp.float32) * weights[:, None]).astype(h.dtype)


@jax.custom_vjp
def routed_swiglu(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    gate_up_EDG: Float[Array, "E D G"],
    down_EFD: Float[Array, "E F D"],
    order_R: Int[Array, "R"],
    row_TK: Int[Array, "T K"],
    sizes_E: Int[Array, "E"],
) -> Float[Array, "T D"]:
    """The sum over each token's K choices of the choice's weight times the SwiGLU of its expert.

    `order` and `row` are those of `sort_by_expert`, of which the first `sizes_E[0]` rows are expert 0's, and so on;
    rows beyond the groups give 0. The gradients of the experts' matrices are float32. The backward pass keeps the
    tokens and the product before the activation, and computes the activation again (section 3.3 of the V3 report).
    """
    return _swiglu_forward(x_TD, weights_TK, gate_up_EDG, down_EFD, order_R, row_TK, sizes_E)[0]


def _swiglu_forward(
    x: Array, weights_TK: Array, gate_up: Array, down: Array, order: Array, row: Array, sizes: Array
) -> tuple[Array, tuple]:
    h = checkpoint_name(grouped_dot(_rows(x, order, row), gate_up, sizes), "expert_hidden")
    weights = weights_TK.reshape(-1)[order]
    y = _sums(grouped_dot(_weighted_swiglu(h, weights), down, sizes), row).astype(x.dtype)
    return y, (x, weights, h, gate_up, down, order, row, sizes)


def _swiglu_backward(saved: tuple, dy_TD: Array) -> tuple[Array, Array, Array, Array, None, None, None]:
    x, weights, h, gate_up, down, order, row, sizes = saved
    dy = _rows(dy_TD, order, row)
    du = grouped_dot_transposed(dy, down, sizes).astype(jnp.float32)
    dweights = (du * swiglu(h).astype(jnp.float32)).sum(-1)
    dh = _swiglu_gradient(h, du * weights[:, None])
    ddown = grouped_outer(_weighted_swiglu(h, weights), dy, sizes)
    dgate_up = grouped_outer(_rows(x, order, row), dh, sizes)
    dx = _sums(grouped_dot_transposed(dh, gate_up, sizes), row).astype(x.dtype)
    return dx, dweights[row], dgate_up, ddown, None, None, None


routed_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
