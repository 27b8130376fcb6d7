"""Routed experts: rows sorted by expert, one SwiGLU over the ragged groups, rows summed back to their tokens.

The weight of a token's choice is multiplied inside the SwiGLU, so that summing back needs no weights and the backward
pass no outputs (as in DeepSeek's own kernels). The work is in grouped products (`grouped.py`).

Where most choices are absent (tokens that came from other devices for one or two of this device's experts), rows are
bounded: present choices are sorted to the front and worked on in passes of so many rows. The first pass stands by
itself and keeps what its backward pass needs; further ones run only if there are rows left, and are computed again.

T tokens, K experts per token, R = T * K rows (or those of a pass), E experts, D model dim, F expert width, G = 2 * F.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.ops.fp8 import KeptRows, ScaledColumns, ScaledRows, keep_rows, kept_rows, quantise_columns, quantise_rows
from moejax.ops.grouped import grouped_dot, grouped_outer
from moejax.ops.swiglu import scaled_swiglu, scaled_swiglu_gradient, weighted_swiglu, weighted_swiglu_gradient
from moejax.varying import vary_like, zeros_varying

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


def _rows(x_TD: Array | ScaledRows, rows: _Rows) -> Any:
    """Each token's row [R, D], once for each of its experts, in the order of `sort_by_expert`."""
    return jax.tree.map(lambda a: a[rows.order // rows.row.shape[1]], x_TD)


def _weights(weights_TK: Array, rows: _Rows) -> Float[Array, "R"]:
    """The weight of the choice in each row."""
    return weights_TK.reshape(-1)[rows.order]


def _at(rows_R: Array, row: Array, rows: _Rows) -> Array:
    """`rows_R[row]`; 0 for a choice that is not in the pass."""
    whole = rows.order.size == rows.row.size
    return rows_R[row] if whole else rows_R.at[row].get(mode="fill", fill_value=0)


def _sums(rows_RD: Array, rows: _Rows) -> Float[Array, "T D"]:
    """The sum of each token's K rows, in float32; the gradient of `_rows`, and it of this."""
    terms = (_at(rows_RD, row_T, rows).astype(jnp.float32) for row_T in rows.row.T)
    return sum(terms, jnp.zeros((), jnp.float32))


def plus(sums: Array, more: Array) -> Array:
    """Both, added in float32 and rounded to the dtype of `sums`: what later passes and rounds, if any, do."""
    return (sums.astype(jnp.float32) + more.astype(jnp.float32)).astype(sums.dtype)


# -------------------------------------------------------------------------------------------------------------- SwiGLU


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
    fp8: bool = False,
    tokens: ScaledRows | None = None,
) -> Float[Array, "T D"]:
    """The sum over each token's K choices of the choice's weight times the SwiGLU of its expert.

    `order` and `row` are those of `sort_by_expert`, of which the first `sizes_E[0]` rows are expert 0's, and so on;
    rows beyond the groups give 0: choices that are absent, sorted as of an expert E. The gradients of the experts'
    matrices are float32. The backward pass keeps the tokens and the product before the activation, and computes the
    activation again (section 3.3 of the V3 report).

    With `max_rows` no product has more rows than that; what is over comes in further passes, of which the backward
    pass keeps nothing. `keep=False`: nothing of the first either (all passes are in the loop; less to compile).

    With `fp8` all products are of E4M3 numbers (`fp8.py`), and the backward pass keeps those. The scales of tokens and
    of results' gradients, which travel between devices, are powers of two. `tokens`: the numbers of `x` as they have
    travelled; without they are made here.
    """
    bound = order_R.size if max_rows is None else min(max_rows, order_R.size)
    rows = _Rows(order_R, row_TK, sizes_E)
    keep = keep or bound == order_R.size
    return _routed_swiglu(x_TD, tokens, weights_TK, gate_up_EDG, down_EFD, rows, bound, keep, fp8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _routed_swiglu(
    x: Array,
    scaled: ScaledRows | None,
    weights: Array,
    gate_up: Array,
    down: Array,
    rows: _Rows,
    max_rows: int,
    keep: bool,
    fp8: bool,
) -> Array:
    return _swiglu_forward(x, scaled, weights, gate_up, down, rows, max_rows, keep, fp8)[0]


def _swiglu_forward(
    x: Array,
    scaled: ScaledRows | None,
    weights: Array,
    gate_up: Array,
    down: Array,
    rows: _Rows,
    max_rows: int,
    keep: bool,
    fp8: bool,
) -> tuple[Array, tuple]:
    dtype, experts = x.dtype, (gate_up, down)
    gate_up, down = (w.astype(dtype) for w in experts)  # before loops, which would keep them in float32
    scaled = quantise_rows(x, power_of_two=True) if fp8 and scaled is None else scaled
    tokens = x if scaled is None else scaled

    def hidden(rows: _Rows) -> Array:
        return grouped_dot(_rows(tokens, rows), gate_up, rows.sizes, dtype)

    def output(h: Array, rows: _Rows) -> tuple[Array, Array | ScaledRows]:
        weights_R = _weights(weights, rows)
        u, kept = scaled_swiglu(h, weights_R) if fp8 else (weighted_swiglu(h, weights_R), h)
        return _sums(grouped_dot(u, down, rows.sizes, dtype), rows), kept

    kept: Any = None
    if keep:
        first = _pass(rows, 0, max_rows)
        y, kept = output(hidden(first), first)
        name = "expert_hidden"
        kept = keep_rows(kept, name) if isinstance(kept, ScaledRows) else checkpoint_name(kept, name)
    else:
        y = zeros_varying(x.shape, dtype, x)
    more = lambda rows, y: plus(y, output(hidden(rows), rows)[0])  # noqa: E731
    y = _for_passes(int(keep), rows, max_rows, more, y.astype(dtype))
    return y, (x if scaled is None else keep_rows(scaled), weights, kept, *experts, rows)


class _Backward(NamedTuple):
    """What the gradients of tokens and of experts are made from, in the rows of a pass."""

    dy: Array | ScaledRows  # the results' gradients
    dh: Array | ScaledRows  # those of the product before the activation, as a factor of the tokens' gradient
    dh_outer: Array | ScaledColumns  # and of the experts'
    u: Array | ScaledColumns  # the activation
    dweights: Array


def _swiglu_backward(
    max_rows: int, keep: bool, fp8: bool, saved: tuple, dy_TD: Array
) -> tuple[Array, None, Array, Array, Array, None]:
    """The tokens' gradients and the experts' do not wait for each other, so that a pipeline can defer the latter."""
    tokens, weights, kept, gate_up, down, rows = saved
    tokens, kept = (kept_rows(a) if isinstance(a, KeptRows) else a for a in (tokens, kept))
    dtype = dy_TD.dtype
    gate_up, down = gate_up.astype(dtype), down.astype(dtype)
    results = quantise_rows(dy_TD, power_of_two=True) if fp8 else dy_TD

    def again(rows: _Rows) -> Array | ScaledRows:
        h = grouped_dot(_rows(tokens, rows), gate_up, rows.sizes, dtype)
        return quantise_rows(h) if fp8 else h

    def back(kept: Any, rows: _Rows) -> _Backward:
        dy, weights_R = _rows(results, rows), _weights(weights, rows)
        du = grouped_dot(dy, down, rows.sizes, dtype, transposed=True)
        if fp8:
            return _Backward(dy, *scaled_swiglu_gradient(kept, weights_R, du, rows.sizes))
        dh, dweights_R = weighted_swiglu_gradient(kept, weights_R, du)
        return _Backward(dy, dh, dh, weighted_swiglu(kept, weights_R), dweights_R)

    def of_tokens(back: _Backward, rows: _Rows) -> tuple[Array, Array]:
        dx = _sums(grouped_dot(back.dh, gate_up, rows.sizes, dtype, transposed=True), rows)
        return dx, _at(back.dweights, rows.row, rows)

    def factor(rows_RD: Array | ScaledRows, sizes_E: Array) -> Any:
        return quantise_columns(rows_RD, sizes_E, power_of_two=True) if fp8 else rows_RD

    def of_experts(back: _Backward, rows: _Rows) -> tuple[Array, Array]:
        x, dy = factor(_rows(tokens, rows), rows.sizes), factor(back.dy, rows.sizes)
        return grouped_outer(x, back.dh_outer, rows.sizes), grouped_outer(back.u, dy, rows.sizes)

    def add_tokens(rows: _Rows, sums: tuple) -> tuple:
        return jax.tree.map(plus, sums, of_tokens(back(again(rows), rows), rows))

    def add_experts(rows: _Rows, sums: tuple) -> tuple:
        return jax.tree.map(jnp.add, sums, of_experts(back(again(rows), rows), rows))

    if keep:
        first = _pass(rows, 0, max_rows)
        made = back(kept, first)
        of_first = of_tokens(made, first), of_experts(made, first)
    else:
        zeros = [zeros_varying(a.shape, jnp.float32, a) for a in (dy_TD, weights, gate_up, down)]
        of_first = (zeros[0], zeros[1]), (zeros[2], zeros[3])
    (dx, dweights), of_experts_first = of_first
    dx, dweights = _for_passes(int(keep), rows, max_rows, add_tokens, (dx.astype(dtype), dweights))
    dgate_up, ddown = _for_passes(int(keep), rows, max_rows, add_experts, of_experts_first)
    return dx, None, dweights, dgate_up, ddown, None


_routed_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
