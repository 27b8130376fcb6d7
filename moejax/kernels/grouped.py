"""Grouped products in BF16: rows sorted by expert, each times the matrix of its expert, and the matrices' gradients.

Groups lie one after another without padding, of any size. Products are added up in float32. Rows beyond the last group
give 0 and take no part in gradients: they may hold anything.

R rows, E experts, I and O dims of a product; in kernels [K, N] is the matrix of a dot, or the gradient of a matrix.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.kernels.launch import launch
from moejax.kernels.sizes import GROUP, blocks
from moejax.kernels.tiles import offsets, row_tiles


def grouped_dot(
    x_RI: Float[Array, "R I"],
    w_EIO: Float[Array, "E I O"],
    sizes_E: Int[Array, "E"],
    dtype: DTypeLike,
    transposed: bool = False,
) -> Float[Array, "R O"]:
    """Each row times its expert's matrix, in `dtype`; 0 for rows beyond the groups.

    `transposed`: [R, O] rows times the transposes, which are read where they are: the gradient of the rows.

    Raises:
        ValueError: rows or matrices are not bfloat16.
    """
    _check_bf16(x_RI, w_EIO)
    num_rows, num_inner = x_RI.shape
    columns = w_EIO.shape[1] if transposed else w_EIO.shape[2]
    block = blocks(columns)
    tiles = row_tiles(sizes_E, num_rows, block.first)
    return launch(
        dot_kernel,
        x_RI,
        w_EIO,
        *tiles,
        out=jax.ShapeDtypeStruct((num_rows, columns), dtype),
        grid=(tiles.expert.size * triton.cdiv(columns, block.second),),
        num_warps=block.num_warps,
        flops=2 * num_rows * num_inner * columns,
        num_stages=block.num_stages,
        R=num_rows,
        K=num_inner,
        N=columns,
        K_STRIDE=1 if transposed else columns,
        N_STRIDE=num_inner if transposed else 1,
        TILES=tiles.expert.size,
        BM=block.first,
        BN=block.second,
        BK=block.inner,
        GROUP=GROUP,
    )


def grouped_outer(
    x_RI: Float[Array, "R I"],
    dy_RO: Float[Array, "R O"],
    sizes_E: Int[Array, "E"],
    onto_EIO: Float[Array, "E I O"] | None = None,
) -> Float[Array, "E I O"]:
    """x^T dy of each group, float32: the gradient of `grouped_dot`'s matrices. An empty group's is exactly 0.

    With `onto` (float32) the sum of both, in the same buffer if the caller needs it no more; where a group is empty it
    is left as it is.

    Raises:
        ValueError: rows are not bfloat16.
    """
    _check_bf16(x_RI, dy_RO)
    num_experts, (_, inputs), (_, outputs) = sizes_E.size, x_RI.shape, dy_RO.shape
    block = blocks(outputs)
    arrays = [x_RI, dy_RO, offsets(sizes_E)]
    return launch(
        outer_kernel,
        *arrays,
        *([] if onto_EIO is None else [onto_EIO]),
        out=jax.ShapeDtypeStruct((num_experts, inputs, outputs), jnp.float32),
        grid=(triton.cdiv(inputs, block.first) * triton.cdiv(outputs, block.second), num_experts),
        num_warps=block.num_warps,
        flops=2 * len(x_RI) * inputs * outputs,
        num_stages=block.num_stages,
        **({"twin": None} if onto_EIO is None else {"aliases": {len(arrays): 0}}),
        K=inputs,
        N=outputs,
        BM=block.inner,
        BK=block.first,
        BN=block.second,
        GROUP=GROUP,
        ONTO=onto_EIO is not None,
    )


def _check_bf16(*arrays: Array) -> None:
    for array in arrays:
        if array.dtype != jnp.bfloat16:
            raise ValueError(f"the kernel multiplies bfloat16, not {array.dtype} {array.shape}")


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def dot_kernel(
    x,
    w,
    expert,
    start,
    end,
    y,
    R: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    K_STRIDE: tl.constexpr,
    N_STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [R, N] = x [R, K] times w [E], whose element (k, n) is at k * K_STRIDE + n * N_STRIDE; a program has one tile.

    Rows of the tile that are another group's are computed and not stored. Has not run on a GPU yet.
    """
    NN: tl.constexpr = (N + BN - 1) // BN
    tile, column = place(TILES, NN, GROUP)
    e = tl.load(expert + tile).to(tl.int64)
    row, last = tl.load(start + tile) + tl.arange(0, BM), tl.load(end + tile)
    n, k = column * BN + tl.arange(0, BN), tl.arange(0, BK)
    x_at = x + tl.minimum(row, R - 1).to(tl.int64)[:, None] * K + k[None, :]
    w_at = w + e * (K * N) + k[:, None] * K_STRIDE + n[None, :] * N_STRIDE
    sums = tl.zeros((BM, BN), tl.float32)
    for first in range(0, tl.where(e < 0, 0, K), BK):
        x_block = load(x_at, None, k < K - first, True, K % BK == 0)
        w_block = load(w_at, k < K - first, n < N, K % BK == 0, N % BN == 0)
        sums = tl.dot(x_block, w_block, sums)
        x_at += BK
        w_at += BK * K_STRIDE
    store(y, sums, row, row < last, n, N, False)


@triton.jit
def outer_kernel(
    x,
    dy,
    bounds,
    dw,
    twin,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    ONTO: tl.constexpr,
):
    """dw [E, K, N] (+)= x^T dy over the rows from bounds[e] to bounds[e + 1]; a program has one block of one expert's.

    `twin` is `dw` again, or None. Has not run on a GPU yet.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NN: tl.constexpr = (N + BN - 1) // BN
    e = tl.program_id(1)
    start, end = tl.load(bounds + e), tl.load(bounds + e + 1)
    k_block, n_block = place(NK, NN, GROUP)
    k, n, row = k_block * BK + tl.arange(0, BK), n_block * BN + tl.arange(0, BN), tl.arange(0, BM)
    x_at = x + (start + row).to(tl.int64)[None, :] * K + k[:, None]
    dy_at = dy + (start + row).to(tl.int64)[:, None] * N + n[None, :]
    sums = tl.zeros((BK, BN), tl.float32)
    for first in range(start, end, BM):
        x_block = load(x_at, k < K, row < end - first, K % BK == 0, False)
        dy_block = load(dy_at, row < end - first, n < N, False, N % BN == 0)
        sums = tl.dot(x_block, dy_block, sums)
        x_at += BM * K
        dy_at += BM * N
    if not ONTO or start < end:
        store(dw + e.to(tl.int64) * (K * N), sums, k, k < K, n, N, ONTO)


@triton.jit
def place(FIRST: tl.constexpr, SECOND: tl.constexpr, GROUP: tl.constexpr):
    """Which of the FIRST x SECOND blocks is this program's: GROUP of the first dim go through the second together."""
    program = tl.program_id(0)
    group = program // (GROUP * SECOND) * GROUP
    width = tl.minimum(FIRST - group, GROUP)
    inside = program % (GROUP * SECOND)
    return group + inside % width, inside // width


@triton.jit
def load(at, rows, columns, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    """The block `at`, with 0 where `rows` or `columns` is false; those of which all are true cost nothing."""
    if ALL_ROWS and ALL_COLUMNS:
        block = tl.load(at)
    elif ALL_ROWS:
        block = tl.load(at, mask=columns[None, :], other=0.0)
    elif ALL_COLUMNS:
        block = tl.load(at, mask=rows[:, None], other=0.0)
    else:
        block = tl.load(at, mask=rows[:, None] & columns[None, :], other=0.0)
    return block


@triton.jit
def store(to, block, row, own, column, N: tl.constexpr, ONTO: tl.constexpr):
    """Writes those rows of a block that are its `own`, and columns below N, or adds them to what is there.

    To add takes no registers: the L2 cache does it. Each number is added to once, so that the sum is always the same.
    """
    at = to + row.to(tl.int64)[:, None] * N + column[None, :]
    inside = own[:, None] & (column < N)[None, :]
    if ONTO:
        tl.atomic_add(at, block, mask=inside, sem="relaxed")
    else:
        tl.store(at, block.to(to.dtype.element_ty), mask=inside)
