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

_LARGE, _SMALL = 384, 128  # rows of a product inside a group, and at its end


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

    def expert(y_RN: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w_KN, start, size = group
        w_KN = w_KN.astype(x_RK.dtype)

        def block(y_RN: Array, offset: Array, rows: int, own: Array | None) -> Array:
            y = (lax.dynamic_slice_in_dim(x_RK, offset, rows) @ w_KN).astype(dtype)
            if own is not None:
                y = jnp.where(own, y, lax.dynamic_slice_in_dim(y_RN, offset, rows))
            return lax.dynamic_update_slice_in_dim(y_RN, y, offset, 0)

        return _for_blocks(start, size, len(x_RK), block, y_RN), None

    nothing = vary_like(zeros_varying((len(x_RK), w_EKN.shape[2]), dtype, x_RK), w_EKN)
    return lax.scan(expert, nothing, (w_EKN, _starts(sizes_E), sizes_E))[0]


def _outer(x_RI: Array, dy_RO: Array, sizes_E: Array | None) -> Array:
    def outer(x: Array, dy: Array) -> Array:
        return jnp.einsum("ri,ro->io", x, dy, preferred_element_type=jnp.float32)

    if sizes_E is None:
        return outer(x_RI, dy_RO)[None]

    def expert(_: None, group: tuple[Array, Array]) -> tuple[None, Array]:
        start, size = group

        def block(dw_IO: Array, offset: Array, rows: int, own: Array | None) -> Array:
            x, dy = (lax.dynamic_slice_in_dim(a, offset, rows) for a in (x_RI, dy_RO))
            if own is not None:
                x, dy = jnp.where(own, x, 0), jnp.where(own, dy, 0)
            return dw_IO + outer(x, dy)

        nothing = zeros_varying((x_RI.shape[1], dy_RO.shape[1]), jnp.float32, dy_RO)
        return None, _for_blocks(start, size, len(x_RI), block, nothing)

    return lax.scan(expert, None, (_starts(sizes_E), sizes_E))[1]


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


def _for_blocks(start: Array, size: Array, num_rows: int, body: Callable[..., Any], carry: Any) -> Any:
    """`carry` after `body(carry, offset, rows, own)` for blocks of rows that cover `size` rows from `start`.

    `own` says which rows of a block are in the group and not in an earlier block; None: all. Only the small blocks at
    the end of a group have others.
    """
    large, small = (min(rows, num_rows) for rows in (_LARGE, _SMALL))
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
