"""Products of rows that are sorted by expert, each with the matrix of its expert: over ragged groups.

Three carry the work of routed experts: forward, input gradient, weight gradient. On GPUs each is a kernel
(`moejax/kernels`). Their cost follows the rows, not the number of experts, and an empty group has a gradient of exactly
0. In FP8 (`fp8.py`) the plain form multiplies what the numbers stand for, in float32: that is the sum of 128 products,
scaled and added to the others (section 3.3.2 of the V3 report), but for float32's own rounding.

R rows, E experts, I and O dims of a weight, N and K those of a weight as it is multiplied, of which K is summed over.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.ops.fp8 import (
    TILE,
    ScaledBlocks,
    ScaledColumns,
    ScaledRows,
    dequantise_blocks,
    dequantise_columns,
    dequantise_rows,
    one_group,
    quantise_blocks,
)
from moejax.ops.platform import by_platform
from moejax.varying import vary_like, zeros_varying

_LARGE, _SMALL = 768, 128  # most rows of a product, and of what its rows are a multiple


def grouped_dot(
    x_RK: Float[Array, "R K"] | ScaledRows,
    w_EIO: Float[Array, "E I O"],
    sizes_E: Int[Array, "E"] | None,
    dtype: DTypeLike,
    transposed: bool = False,
) -> Float[Array, "R N"]:
    """Each row times its expert's matrix, in `dtype`.

    The first `sizes_E[0]` rows are expert 0's, and so on; rows beyond the last group give 0. None: one expert has all.
    `transposed`: the matrices are; that is the gradient of the rows.

    Where the rows are in FP8 the matrix is quantised, after it was rounded to `dtype`: it may have come that way from
    other devices, and FP8 is to be the same on every mesh.
    """
    if isinstance(x_RK, ScaledRows):
        return _scaled_dot(x_RK, quantise_blocks(w_EIO.astype(dtype), not transposed), sizes_E, dtype)

    def plain(x: Array, w: Array, sizes: Array | None) -> Array:
        return _dot(x, w.mT if transposed else w, sizes, dtype)

    def kernel(x: Array, w: Array, sizes: Array) -> Array:
        from moejax.kernels import grouped

        return grouped.grouped_dot(x, w.astype(x.dtype), sizes, dtype, transposed)

    has_kernel = x_RK.dtype == jnp.bfloat16 and sizes_E is not None  # XLA multiplies dense matrices well
    return by_platform(kernel, plain, x_RK, w_EIO, sizes_E) if has_kernel else plain(x_RK, w_EIO, sizes_E)


def grouped_outer(
    x: Float[Array, "R I"] | ScaledColumns, dy: Float[Array, "R O"] | ScaledColumns, sizes_E: Int[Array, "E"] | None
) -> Float[Array, "E I O"]:
    """x^T dy of each group, float32: the gradient of `grouped_dot`'s matrices; exactly 0 for an empty group.

    Both are plain, or both in FP8.
    """
    if isinstance(x, ScaledColumns) or isinstance(dy, ScaledColumns):
        assert isinstance(x, ScaledColumns) and isinstance(dy, ScaledColumns), "one factor alone is in FP8"
        return _scaled_outer(x, dy, sizes_E)

    def kernel(x: Array, dy: Array, sizes: Array) -> Array:
        from moejax.kernels import grouped

        return grouped.grouped_outer(x, dy, sizes)

    has_kernel = x.dtype == jnp.bfloat16 and sizes_E is not None
    return by_platform(kernel, _outer, x, dy, sizes_E) if has_kernel else _outer(x, dy, sizes_E)


def _dot(x_RK: Array, w_EKN: Array, sizes_E: Array | None, dtype: DTypeLike) -> Array:
    if sizes_E is None:
        return (x_RK @ w_EKN[0].astype(x_RK.dtype)).astype(dtype)

    def block(y_RN: Array, expert: Array, offset: Array, own: Array) -> Array:
        w_KN = lax.dynamic_index_in_dim(w_EKN, expert, keepdims=False).astype(x_RK.dtype)
        y = (lax.dynamic_slice_in_dim(x_RK, offset, len(own)) @ w_KN).astype(dtype)
        y = jnp.where(own, y, lax.dynamic_slice_in_dim(y_RN, offset, len(own)))
        return lax.dynamic_update_slice_in_dim(y_RN, y, offset, 0)

    nothing = vary_like(zeros_varying((len(x_RK), w_EKN.shape[2]), dtype, x_RK), w_EKN)
    return _for_blocks(sizes_E, len(x_RK), block, nothing)


def _outer(x_RI: Array, dy_RO: Array, sizes_E: Array | None) -> Array:
    def outer(x: Array, dy: Array) -> Array:
        return jnp.einsum("ri,ro->io", x, dy, preferred_element_type=jnp.float32)

    if sizes_E is None:
        return outer(x_RI, dy_RO)[None]

    def block(dw_EIO: Array, expert: Array, offset: Array, own: Array) -> Array:
        x, dy = (jnp.where(own, lax.dynamic_slice_in_dim(a, offset, len(own)), 0) for a in (x_RI, dy_RO))
        dw = lax.dynamic_index_in_dim(dw_EIO, expert, keepdims=False) + outer(x, dy)
        return lax.dynamic_update_index_in_dim(dw_EIO, dw, expert, 0)

    nothing = zeros_varying((len(sizes_E), x_RI.shape[1], dy_RO.shape[1]), jnp.float32, dy_RO)
    return _for_blocks(sizes_E, len(x_RI), block, nothing)


def _scaled_dot(x: ScaledRows, w: ScaledBlocks, sizes_E: Array | None, dtype: DTypeLike) -> Array:
    def plain(x: ScaledRows, w: ScaledBlocks, sizes: Array | None) -> Array:
        return _dot(dequantise_rows(x), dequantise_blocks(w).mT, sizes, jnp.float32).astype(dtype)

    def kernel(x: ScaledRows, w: ScaledBlocks, sizes: Array | None) -> Array:
        from moejax.kernels import grouped_fp8

        return grouped_fp8.scaled_grouped_dot(*x, *w, one_group(sizes, len(x.values)), dtype)

    return by_platform(kernel, plain, x, w, sizes_E)


def _scaled_outer(x: ScaledColumns, dy: ScaledColumns, sizes_E: Array | None) -> Array:
    def plain(x: ScaledColumns, dy: ScaledColumns, sizes: Array | None) -> Array:
        padded_E = None if sizes is None else -(-sizes // TILE) * TILE
        return _outer(dequantise_columns(x).T, dequantise_columns(dy).T, padded_E)

    def kernel(x: ScaledColumns, dy: ScaledColumns, sizes: Array | None) -> Array:
        from moejax.kernels import grouped_fp8

        return grouped_fp8.scaled_grouped_outer(*x, *dy, one_group(sizes, x.values.shape[1]))

    return by_platform(kernel, plain, x, dy, sizes_E)


# ------------------------------------------------------------------------------------------------------------- pieces


def _for_blocks(sizes_E: Array, num_rows: int, body: Callable[..., Any], carry: Any) -> Any:
    """`carry` after `body(carry, expert, offset, own)` for blocks of rows that cover all groups.

    `own` [rows, 1] says which rows of a block are in the group and not in an earlier block. A group of up to `_LARGE`
    rows is one block, of the least length that holds it; blocks of one length are a loop, whatever their experts.
    """
    large, small = (min(rows, num_rows) for rows in (_LARGE, _SMALL))
    *shorter, _ = lengths = [min(rows, large) for rows in range(small, large + small, small)]
    ends_E = jnp.cumsum(sizes_E)
    starts_E, whole_E = ends_E - sizes_E, sizes_E // large
    rest_E = starts_E + whole_E * large
    last_E = -(-(ends_E - rest_E) // small)  # which length a group's last block has, from 1 on; 0: it has none

    def blocks(rows: int, number_E: Array, first_E: Array, carry: Any) -> Any:
        until_E = jnp.cumsum(number_E)

        def block(i: Array, carry: Any) -> Any:
            expert = (until_E <= i).sum()
            first = first_E[expert] + (i - until_E[expert] + number_E[expert]) * rows
            offset = jnp.minimum(first, num_rows - rows)
            place = offset + jnp.arange(rows)
            return body(carry, expert, offset, ((place >= first) & (place < ends_E[expert]))[:, None])

        return lax.fori_loop(0, until_E[-1], block, carry)

    carry = blocks(large, whole_E + (last_E == len(lengths)), starts_E, carry)
    for kind, rows in enumerate(shorter, 1):
        carry = blocks(rows, (last_E == kind).astype(sizes_E.dtype), rest_E, carry)
    return carry
