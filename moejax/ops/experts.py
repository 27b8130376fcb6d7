"""Routed experts: rows sorted by expert, one SwiGLU over the ragged groups, rows summed back to their tokens.

The weight of a token's choice is multiplied inside the SwiGLU, so that summing back needs no weights and the backward
pass no outputs (as in DeepSeek's own kernels). Three grouped products carry the work (forward, input gradient, weight
gradient); each is a function on which a GPU kernel can stand. Their cost follows the rows, not the number of experts,
and an empty group has a gradient of exactly 0.

Where most choices are absent (tokens that came from other devices for one or two of this device's experts), rows are
bounded: present choices are sorted to the front and worked on in passes of so many rows. The first pass stands by
itself and keeps what its backward pass needs; further ones run only if there are rows left, and are computed again.

T tokens, K experts per token, R = T * K rows (or those of a pass), E experts, D model dim, F expert width, G = 2 * F,
I and O dims of one product.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
    order_R = vary_like(order_R, ids_TK)  # jax 0.10 marks what argsort returns as equal on all devices
    row_TK = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(order_R.size, dtype=jnp.int32), unique_indices=True)
    return order_R, row_TK.reshape(ids_TK.shape)


class _Rows(NamedTuple):
    """Choices sorted by expert: all of them, or those of one pass."""

    order: Array  # the choice in each row
    row: Array  # the row of each choice; in a pass, R where the choice is not in it
    sizes: Array  # rows of each expert


def _pass(rows: _Rows, number: Array | int, max_rows: int) -> _Rows:
    """The rows from `number * max_rows` on, `max_rows` of them; all rows if they are no more."""
    if max_rows >= rows.order.size:
        return rows
    start = number * max_rows
    padded = jnp.pad(rows.order, (0, -rows.order.size % max_rows))
    row_TK = rows.row - start
    row_TK = jnp.where((row_TK >= 0) & (row_TK < max_rows), row_TK, max_rows)
    ends = jnp.clip(jnp.cumsum(rows.sizes) - start, 0, max_rows)
    return _Rows(lax.dynamic_slice_in_dim(padded, start, max_rows), row_TK, jnp.diff(ends, prepend=0))


def _for_passes(first: int, rows: _Rows, max_rows: int, body: Callable[[_Rows, Any], Any], carry: Any) -> Any:
    """`carry` after `body(rows of the pass, carry)` for the passes from `first` on."""
    if first and max_rows >= rows.order.size:
        return carry
    passes = -(-rows.sizes.sum() // max_rows)
    return lax.fori_loop(first, passes, lambda i, carry: body(_pass(rows, i, max_rows), carry), carry)


def _rows(x_TD: Array, rows: _Rows) -> Float[Array, "R D"]:
    """Each token's row, once for each of its experts, in the order of `sort_by_expert`."""
    return x_TD[rows.order // rows.row.shape[1]]


def _at(rows_R: Array, row: Array, rows: _Rows) -> Array:
    """`rows_R[row]`; 0 for a choice that is not in the pass."""
    whole = rows.order.size == rows.row.size
    return rows_R[row] if whole else rows_R.at[row].get(mode="fill", fill_value=0)


def _sums(rows_RD: Array, rows: _Rows) -> Float[Array, "T D"]:
    """The sum of each token's K rows, in float32; the gradient of `_rows`, and it of this."""
    terms = (_at(rows_RD, row_T, rows).astype(jnp.float32) for row_T in rows.row.T)
    return sum(terms, jnp.zeros((), jnp.float32))


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


def _weighted_swiglu(h: Array, weights_TK: Array, rows: _Rows) -> Array:
    weights_R = weights_TK.reshape(-1)[rows.order]
    return (swiglu(h).astype(jnp.float32) * weights_R[:, None]).astype(h.dtype)


def routed_swiglu(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    gate_up_EDG: Float[Array, "E D G"],
    down_EFD: Float[Array, "E F D"],
    order_R: Int[Array, "R"],
    row_TK: Int[Array, "T K"],
    sizes_E: Int[Array, "E"],
    max_rows: int | None = None,
    keep: bool = True,
) -> Float[Array, "T D"]:
    """The sum over each token's K choices of the choice's weight times the SwiGLU of its expert.

    `order` and `row` are those of `sort_by_expert`, of which the first `sizes_E[0]` rows are expert 0's, and so on;
    rows beyond the groups give 0: choices that are absent, sorted as of an expert E. The gradients of the experts'
    matrices are float32. The backward pass keeps the tokens and the product before the activation, and computes the
    activation again (section 3.3 of the V3 report).

    With `max_rows` no product has more rows than that; what is over comes in further passes, of which the backward
    pass keeps nothing. `keep=False`: nothing of the first either (all passes are in the loop; less to compile).
    """
    bound = order_R.size if max_rows is None else min(max_rows, order_R.size)
    rows = _Rows(order_R, row_TK, sizes_E)
    return _routed_swiglu(x_TD, weights_TK, gate_up_EDG, down_EFD, rows, bound, keep or bound == order_R.size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _routed_swiglu(
    x: Array, weights: Array, gate_up: Array, down: Array, rows: _Rows, max_rows: int, keep: bool
) -> Array:
    return _swiglu_forward(x, weights, gate_up, down, rows, max_rows, keep)[0]


def _hidden(x: Array, gate_up: Array, rows: _Rows) -> Array:
    return grouped_dot(_rows(x, rows), gate_up, rows.sizes)


def _swiglu_forward(
    x: Array, weights: Array, gate_up: Array, down: Array, rows: _Rows, max_rows: int, keep: bool
) -> tuple[Array, tuple]:
    def output(h: Array, rows: _Rows) -> Array:
        return _sums(grouped_dot(_weighted_swiglu(h, weights, rows), down, rows.sizes), rows)

    h = None
    if keep:
        first = _pass(rows, 0, max_rows)
        h = checkpoint_name(_hidden(x, gate_up, first), "expert_hidden")
        y = output(h, first)
    else:
        y = zeros_varying(x.shape, jnp.float32, x)
    y = _for_passes(int(keep), rows, max_rows, lambda rows, y: y + output(_hidden(x, gate_up, rows), rows), y)
    return y.astype(x.dtype), (x, weights, h, gate_up, down, rows)


def _swiglu_backward(max_rows: int, keep: bool, saved: tuple, dy_TD: Array) -> tuple[Array, Array, Array, Array, None]:
    """The tokens' gradients and the experts' do not wait for each other, so that a pipeline can defer the latter."""
    x, weights, h, gate_up, down, rows = saved

    def of_hidden(h: Array, rows: _Rows) -> tuple[Array, Array, Array]:
        dy = _rows(dy_TD, rows)
        du = grouped_dot_transposed(dy, down, rows.sizes).astype(jnp.float32)
        dweights_R = (du * swiglu(h).astype(jnp.float32)).sum(-1)
        return dy, _swiglu_gradient(h, du * weights.reshape(-1)[rows.order][:, None]), dweights_R

    def of_tokens(dh: Array, dweights_R: Array, rows: _Rows) -> tuple[Array, Array]:
        dx = _sums(grouped_dot_transposed(dh, gate_up, rows.sizes), rows)
        return dx, _at(dweights_R, rows.row, rows)

    def of_experts(h: Array, dy: Array, dh: Array, rows: _Rows) -> tuple[Array, Array]:
        ddown = grouped_outer(_weighted_swiglu(h, weights, rows), dy, rows.sizes)
        return grouped_outer(_rows(x, rows), dh, rows.sizes), ddown

    def add_tokens(rows: _Rows, sums: tuple) -> tuple:
        _, dh, dweights_R = of_hidden(_hidden(x, gate_up, rows), rows)
        return jax.tree.map(jnp.add, sums, of_tokens(dh, dweights_R, rows))

    def add_experts(rows: _Rows, sums: tuple) -> tuple:
        h = _hidden(x, gate_up, rows)
        dy, dh, _ = of_hidden(h, rows)
        return jax.tree.map(jnp.add, sums, of_experts(h, dy, dh, rows))

    if keep:
        first = _pass(rows, 0, max_rows)
        dy, dh, dweights_R = of_hidden(h, first)
        tokens, experts = of_tokens(dh, dweights_R, first), of_experts(h, dy, dh, first)
    else:
        zeros = [zeros_varying(a.shape, jnp.float32, a) for a in (x, weights, gate_up, down)]
        tokens, experts = (zeros[0], zeros[1]), (zeros[2], zeros[3])
    dx, dweights = _for_passes(int(keep), rows, max_rows, add_tokens, tokens)
    dgate_up, ddown = _for_passes(int(keep), rows, max_rows, add_experts, experts)
    return dx.astype(x.dtype), dweights, dgate_up, ddown, None


_routed_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
