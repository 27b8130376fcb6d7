"""Grouped products of E4M3 numbers: a scale for each 1 x 128 of the rows and each 128 x 128 of the matrices.

Products of 128 pairs are added up by the tensor cores, which keep about 14 bits of them, then multiplied by both scales
and added to the others in float32 (arXiv:2412.19437, section 3.3.2). Both factors lie with the contraction contiguous.

R rows, E experts, I and O dims of a product, T tokens in M tiles of 128; in kernels [K, N] is the matrix of a dot, or
the gradient of a matrix.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.kernels.grouped import load, place, store
from moejax.kernels.launch import launch
from moejax.kernels.sizes import GROUP, SCALED_DOT, SCALED_OUTER, TILE
from moejax.kernels.tiles import num_tiles, offsets, row_tiles


def scaled_grouped_dot(
    x_RK: Float[Array, "R K"],
    x_scales: Float[Array, "R _"],
    w_ENK: Float[Array, "E N K"],
    w_scales: Float[Array, "E _ _"],
    sizes_E: Int[Array, "E"],
    dtype: DTypeLike,
) -> Float[Array, "R N"]:
    """Each row times the transpose of its expert's matrix, in `dtype`; 0 for rows beyond the groups.

    Args:
        x_RK: values of the rows.
        x_scales: [R, ceil(K / 128)], one for each 128 of a row.
        w_ENK: values of the matrices, the contracted dim last.
        w_scales: [E, ceil(N / 128), ceil(K / 128)].
        sizes_E: rows of each group.
        dtype: of the result.
    """
    (num_rows, num_inner), columns = x_RK.shape, w_ENK.shape[1]
    tiles = row_tiles(sizes_E, num_rows, SCALED_DOT.first)
    return launch(
        scaled_dot_kernel,
        x_RK,
        x_scales,
        w_ENK,
        w_scales,
        *tiles,
        out=jax.ShapeDtypeStruct((num_rows, columns), dtype),
        grid=(tiles.expert.size * triton.cdiv(columns, SCALED_DOT.second),),
        num_warps=SCALED_DOT.num_warps,
        flops=2 * num_rows * num_inner * columns,
        num_stages=SCALED_DOT.num_stages,
        R=num_rows,
        K=num_inner,
        N=columns,
        TILES=tiles.expert.size,
        BM=SCALED_DOT.first,
        BN=SCALED_DOT.second,
        BK=TILE,
        GROUP=GROUP,
    )


def scaled_grouped_outer(
    x_IT: Float[Array, "I T"],
    x_scales: Float[Array, "M I"],
    dy_OT: Float[Array, "O T"],
    dy_scales: Float[Array, "M O"],
    sizes_E: Int[Array, "E"],
    onto_EIO: Float[Array, "E I O"] | None = None,
) -> Float[Array, "E I O"]:
    """x^T dy of each group, float32: the gradient of the matrices. An empty group's is exactly 0.

    Both factors are in tiles of up to 128 tokens of one group, counted from its start and filled up with zeros, with a
    scale for each tile and channel. With `onto` (float32) the sum of both, in the same buffer if the caller needs it no
    more; where a group is empty it is left as it is.
    """
    num_experts, (inputs, num_tokens), outputs = sizes_E.size, x_IT.shape, dy_OT.shape[0]
    arrays = [x_IT, x_scales, dy_OT, dy_scales, offsets(num_tiles(sizes_E, TILE))]
    return launch(
        scaled_outer_kernel,
        *arrays,
        *([] if onto_EIO is None else [onto_EIO]),
        out=jax.ShapeDtypeStruct((num_experts, inputs, outputs), jnp.float32),
        grid=(triton.cdiv(inputs, SCALED_OUTER.first) * triton.cdiv(outputs, SCALED_OUTER.second), num_experts),
        num_warps=SCALED_OUTER.num_warps,
        flops=2 * num_tokens * inputs * outputs,
        num_stages=SCALED_OUTER.num_stages,
        **({"twin": None} if onto_EIO is None else {"aliases": {len(arrays): 0}}),
        T=num_tokens,
        K=inputs,
        N=outputs,
        BT=TILE,
        BK=SCALED_OUTER.first,
        BN=SCALED_OUTER.second,
        GROUP=GROUP,
        ONTO=onto_EIO is not None,
    )


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def scaled_dot_kernel(
    x,
    x_scale,
    w,
    w_scale,
    expert,
    start,
    end,
    y,
    R: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [R, N] = x [R, K] times the transpose of w [E, N, K], each 128 of K scaled by itself; a program has one tile.

    BN divides 128, so that a block's columns share their scales; BK is 128. Rows of the tile that are another group's
    are computed and not stored. Has not run on a GPU yet.
    """
    NN: tl.constexpr = (N + BN - 1) // BN
    KT: tl.constexpr = (K + BK - 1) // BK
    tile, column = place(TILES, NN, GROUP)
    e = tl.load(expert + tile).to(tl.int64)
    row, last = tl.load(start + tile) + tl.arange(0, BM), tl.load(end + tile)
    row_in = tl.minimum(row, R - 1).to(tl.int64)
    n, k = column * BN + tl.arange(0, BN), tl.arange(0, BK)
    x_at = x + row_in[:, None] * K + k[None, :]
    w_at = w + e * (K * N) + clamp(n, N, N % BN == 0)[None, :] * K + k[:, None]
    x_scale_at = x_scale + row_in * KT
    w_scale_at = w_scale + (e * ((N + 127) // 128) + column * BN // 128) * KT
    sums = tl.zeros((BM, BN), tl.float32)
    for step in range(tl.where(e < 0, 0, KT)):
        x_block = load(x_at, None, k < K - step * BK, True, K % BK == 0)
        w_block = load(w_at, k < K - step * BK, None, K % BK == 0, True)
        scale = tl.load(x_scale_at + step) * tl.load(w_scale_at + step)
        sums += tl.dot(x_block, w_block) * scale[:, None]
        x_at += BK
        w_at += BK
    store(y, sums, row, row < last, n, N, False)


@triton.jit
def scaled_outer_kernel(
    x,
    x_scale,
    dy,
    dy_scale,
    bounds,
    dw,
    twin,
    T: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    ONTO: tl.constexpr,
):
    """dw [E, K, N] (+)= x [K, T] times the transpose of dy [N, T], over the tiles from bounds[e] to bounds[e + 1].

    BT is 128: a step of the loop is a tile, and is scaled by itself. A program has one block of one expert's. `twin` is
    `dw` again, or None. Has not run on a GPU yet.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NN: tl.constexpr = (N + BN - 1) // BN
    e = tl.program_id(1)
    start, end = tl.load(bounds + e), tl.load(bounds + e + 1)
    k_block, n_block = place(NK, NN, GROUP)
    k, n = k_block * BK + tl.arange(0, BK), n_block * BN + tl.arange(0, BN)
    token = start.to(tl.int64) * BT + tl.arange(0, BT)
    x_at = x + clamp(k, K, K % BK == 0).to(tl.int64)[:, None] * T + token[None, :]
    dy_at = dy + clamp(n, N, N % BN == 0).to(tl.int64)[None, :] * T + token[:, None]
    sums = tl.zeros((BK, BN), tl.float32)
    for tile in range(start, end):
        x_scales = tl.load(x_scale + tile * K + k, mask=k < K, other=0.0)
        dy_scales = tl.load(dy_scale + tile * N + n, mask=n < N, other=0.0)
        sums += tl.dot(tl.load(x_at), tl.load(dy_at)) * x_scales[:, None] * dy_scales[None, :]
        x_at += BT
        dy_at += BT
    if not ONTO or start < end:
        store(dw + e.to(tl.int64) * (K * N), sums, k, k < K, n, N, ONTO)


@triton.jit
def clamp(index, LENGTH: tl.constexpr, ALL: tl.constexpr):
    """`index`, or the last one where it is beyond LENGTH; if ALL are below, the compiler need not know of that."""
    if not ALL:
        index = tl.minimum(index, LENGTH - 1)
    return index
