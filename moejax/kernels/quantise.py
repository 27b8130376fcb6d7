"""Quantisers for NVIDIA Hopper, in Triton: E4M3 numbers with a scale a tile, in the layouts that products read.

All of them only move memory: each reads its input from there once, in whole sectors, and writes all that is made of
it. They give the very bits of `moejax.ops.fp8`: a scale is the tile's largest magnitude (at least 1e-4) times 1 / 448,
which is what XLA makes of a division by 448, rounded up to a power of two where that is asked; numbers are multiplied
by its reciprocal, clipped, and rounded to nearest even.

- rows: values [R, I], scales [R, C]: tiles of 1 x 128;
- columns: values [I, M * 128], scales [M, I]: tiles of up to 128 rows of one group, counted from the group's start,
  with zeros where the group has no more rows, tile after tile and group after group; tiles left over are zeros;
- blocks: values [E, N, K], scales [E, N / 128, K / 128] rounded up.

R rows, sorted by expert: the first `sizes_E[0]` are expert 0's, and so on; E experts, I and O dims of a product,
C = ceil(I / 128), M tiles of rows.
"""

from typing import Any

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import ShapeDtypeStruct
from jaxtyping import Array, Float, Int

from moejax.kernels.launch import launch
from moejax.kernels.sizes import TILE
from moejax.kernels.tiles import column_tiles, row_tiles

E4M3 = jnp.float8_e4m3fn
Tiles = tuple[Array, Array]  # values E4M3, scales float32


def quantise_rows(x_RI: Float[Array, "R I"], power_of_two: bool = False) -> Tiles:
    """Rows, of any float."""
    rows, width = x_RI.shape
    tiles = 32  # a program: 8 Ki numbers
    return launch(
        _rows_kernel,
        x_RI,
        out=rows_shape(rows, width),
        grid=(triton.cdiv(rows * triton.cdiv(width, TILE), tiles),),
        num_warps=4,
        num_stages=1,
        R=rows,
        WIDTH=width,
        TILES=tiles,
        POWER_OF_TWO=power_of_two,
    )


def quantise_both(
    x_RI: Float[Array, "R I"], sizes_E: Int[Array, "E"], power_of_two: bool = False
) -> tuple[Tiles, Tiles]:
    """Rows and columns, in one read. Rows beyond the groups are 0 in the rows."""
    found = _by_tile(_both_kernel, (x_RI,), sizes_E, rows_shape(*x_RI.shape), power_of_two)
    return found[:2], found[2:]


def quantise_columns(x: Float[Array, "R I"] | Tiles, sizes_E: Int[Array, "E"], power_of_two: bool = False) -> Tiles:
    """Columns of x [R, I], which may be rows: then their products with their scales, float32, are quantised anew."""
    if isinstance(x, tuple):
        return _by_tile(_columns_again_kernel, x, sizes_E, (), power_of_two)
    return _by_tile(_columns_kernel, (x,), sizes_E, (), power_of_two)


def quantise_blocks(w_EIO: Float[Array, "E I O"], transposed: bool = False) -> Tiles:
    """Blocks of each expert's matrix, in place or transposed: [E, O, I]."""
    experts, height, width = w_EIO.shape
    blocks = triton.cdiv(height, TILE), triton.cdiv(width, TILE)
    shape, scales = ((width, height), blocks[::-1]) if transposed else ((height, width), blocks)
    return launch(
        _blocks_kernel,
        w_EIO,
        out=(ShapeDtypeStruct((experts, *shape), E4M3), ShapeDtypeStruct((experts, *scales), jnp.float32)),
        grid=(*blocks[::-1], experts),
        num_warps=8,
        num_stages=1,
        HEIGHT=height,
        WIDTH=width,
        TRANSPOSED=transposed,
    )


def rows_shape(rows: int, width: int) -> tuple[ShapeDtypeStruct, ShapeDtypeStruct]:
    """Of values and scales."""
    return ShapeDtypeStruct((rows, width), E4M3), ShapeDtypeStruct((rows, triton.cdiv(width, TILE)), jnp.float32)


def columns_shape(tiles: int, width: int) -> tuple[ShapeDtypeStruct, ShapeDtypeStruct]:
    """Of values and scales."""
    return ShapeDtypeStruct((width, tiles * TILE), E4M3), ShapeDtypeStruct((tiles, width), jnp.float32)


def _by_tile(
    kernel: Any, arrays: tuple[Array, ...], sizes_E: Array, rows: tuple[ShapeDtypeStruct, ...], power_of_two: bool
) -> Any:
    """Rows of the shapes `rows`, and columns, by a program for each 128 rows of a group x 128."""
    (num_rows, width), tiles = arrays[0].shape, row_tiles(sizes_E, arrays[0].shape[0], TILE)
    count = column_tiles(sizes_E, num_rows, TILE).expert.size
    return launch(
        kernel,
        *arrays,
        *tiles,
        out=(*rows, *columns_shape(count, width)),
        grid=(triton.cdiv(width, TILE), tiles.expert.size),
        num_warps=8,
        num_stages=1,
        WIDTH=width,
        M=count,
        POWER_OF_TWO=power_of_two,
    )


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _rows_kernel(
    x, values, scales, R: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """Tiles are numbered along a row, then row by row. Has not run on a GPU yet."""
    C: tl.constexpr = (WIDTH + 127) // 128
    MASKED: tl.constexpr = (R * C) % TILES != 0 or WIDTH % 128 != 0
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    col = (tile % C)[:, None] * 128 + tl.arange(0, 128)[None, :]
    at = (tile // C).to(tl.int64)[:, None] * WIDTH + col
    inside = (tile < R * C)[:, None] & (col < WIDTH)
    q, scale = quantised(load(x + at, inside, MASKED).to(tl.float32), 1, POWER_OF_TWO)
    tl.store(values + at, q, inside if MASKED else None)
    tl.store(scales + tile, scale, tile < R * C if MASKED else None)


@triton.jit
def _both_kernel(
    x, experts, starts, ends, values, scales, columns, column_scales,
    WIDTH: tl.constexpr, M: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """A block is read again, from the cache, for its columns: held, it takes the registers of a second program.

    Has not run on a GPU yet.
    """
    c, tile = tl.program_id(0), tl.program_id(1)
    start, own, real = rows_of(tile, experts, starts, ends)
    block = load_block(x, start, real, c, WIDTH).to(tl.float32)
    store_rows(block, start, own, c, values, scales, WIDTH, POWER_OF_TWO)
    block = load_block(x, start, real, c, WIDTH).to(tl.float32)
    store_columns(block, tile, c, columns, column_scales, WIDTH, M, POWER_OF_TWO)


@triton.jit
def _columns_kernel(
    x, experts, starts, ends, columns, column_scales, WIDTH: tl.constexpr, M: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """Has not run on a GPU yet."""
    c, tile = tl.program_id(0), tl.program_id(1)
    start, _, real = rows_of(tile, experts, starts, ends)
    block = load_block(x, start, real, c, WIDTH).to(tl.float32)
    store_columns(block, tile, c, columns, column_scales, WIDTH, M, POWER_OF_TWO)


@triton.jit
def _columns_again_kernel(
    values, scales, experts, starts, ends, columns, column_scales,
    WIDTH: tl.constexpr, M: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """Has not run on a GPU yet."""
    c, tile = tl.program_id(0), tl.program_id(1)
    start, _, real = rows_of(tile, experts, starts, ends)
    block = load_rows(values, scales, start, real, c, WIDTH)
    store_columns(block, tile, c, columns, column_scales, WIDTH, M, POWER_OF_TWO)


@triton.jit
def _blocks_kernel(w, values, scales, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Has not run on a GPU yet."""
    MASKED: tl.constexpr = HEIGHT % 128 != 0 or WIDTH % 128 != 0
    HIGH: tl.constexpr = (HEIGHT + 127) // 128
    WIDE: tl.constexpr = (WIDTH + 127) // 128
    o, i, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, col = i * 128 + tl.arange(0, 128), o * 128 + tl.arange(0, 128)
    inside = (row < HEIGHT)[:, None] & (col < WIDTH)[None, :]
    matrix = expert.to(tl.int64) * (HEIGHT * WIDTH)
    at = row[:, None] * WIDTH + col[None, :]
    block = load(w + matrix + at, inside, MASKED).to(tl.float32)
    scale = scale_of(tl.max(tl.max(magnitude(block), 1), 0), False)
    q = to_e4m3(block, reciprocal(scale, False))
    if TRANSPOSED:
        q, inside = tl.trans(q), (col < WIDTH)[:, None] & (row < HEIGHT)[None, :]
        at = col[:, None] * HEIGHT + row[None, :]
        block_at = (expert * WIDE + o) * HIGH + i
    else:
        block_at = (expert * HIGH + i) * WIDE + o
    tl.store(values + matrix + at, q, inside if MASKED else None)
    tl.store(scales + block_at, scale)


# ------------------------------------------------------------- pieces of kernels: blocks of 128 rows of one group x 128


@triton.jit
def rows_of(tile, experts, starts, ends):
    """A tile's first row, which of its 128 rows exist, and which of these are an expert's."""
    start = tl.load(starts + tile)
    own = start + tl.arange(0, 128) < tl.load(ends + tile)
    return start, own, own & (tl.load(experts + tile) >= 0)


@triton.jit
def load_block(x, start, real, c, WIDTH: tl.constexpr):
    """Columns c * 128 and on of the rows from `start`; 0 where there is nothing real."""
    row, col = tl.arange(0, 128), tl.arange(0, 128)
    inside = real[:, None]
    if WIDTH % 128 != 0:
        inside = inside & (c * 128 + col < WIDTH)[None, :]
    return tl.load(x + start.to(tl.int64) * WIDTH + c * 128 + row[:, None] * WIDTH + col[None, :], inside, other=0.0)


@triton.jit
def load_rows(values, scales, start, real, c, WIDTH: tl.constexpr):
    """The same of rows in tiles, float32."""
    C: tl.constexpr = (WIDTH + 127) // 128
    scale = tl.load(scales + start.to(tl.int64) * C + c + tl.arange(0, 128) * C, real, other=0.0)
    return load_block(values, start, real, c, WIDTH).to(tl.float32) * scale[:, None]


@triton.jit
def store_rows(block, start, own, c, values, scales, WIDTH: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Quantises the rows of a block."""
    C: tl.constexpr = (WIDTH + 127) // 128
    row, col = tl.arange(0, 128), tl.arange(0, 128)
    q, scale = quantised(block, 1, POWER_OF_TWO)
    inside = own[:, None]
    if WIDTH % 128 != 0:
        inside = inside & (c * 128 + col < WIDTH)[None, :]
    tl.store(values + start.to(tl.int64) * WIDTH + c * 128 + row[:, None] * WIDTH + col[None, :], q, inside)
    tl.store(scales + start.to(tl.int64) * C + c + row * C, scale, own)


@triton.jit
def store_columns(block, tile, c, columns, scales, WIDTH: tl.constexpr, M: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Quantises the columns of a block, and transposes it; a tile beyond the last holds none of a group."""
    if tile < M:
        row, col = tl.arange(0, 128), tl.arange(0, 128)
        inside = c * 128 + col < WIDTH if WIDTH % 128 != 0 else col < 128
        q, scale = quantised(block, 0, POWER_OF_TWO)
        first = columns + c.to(tl.int64) * (128 * M * 128) + tile * 128
        tl.store(first + col[:, None] * (M * 128) + row[None, :], tl.trans(q), inside[:, None])
        tl.store(scales + tile.to(tl.int64) * WIDTH + c * 128 + col, scale, inside)


@triton.jit
def quantised(block, AXIS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Values and scales of a float32 block whose tiles lie along AXIS."""
    scale = scale_of(tl.max(magnitude(block), AXIS), POWER_OF_TWO)
    return to_e4m3(block, tl.expand_dims(reciprocal(scale, POWER_OF_TWO), AXIS)), scale


@triton.jit
def magnitude(x):
    """The bits of |x|, float32: integers in the order of the magnitudes, with NaN above them all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, POWER_OF_TWO: tl.constexpr):
    """The scale with which a tile fits whose largest magnitude has these bits.

    What is added to the bits of a float32 carries into its exponent unless it is a power of two. A power of two for
    what is not finite is 1, as in `moejax.ops.fp8`.
    """
    largest = largest.to(tl.float32, bitcast=True)
    scale = tl.maximum(largest, 1e-4, propagate_nan=tl.PropagateNan.ALL) * (1 / 448)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, (bits + 0x7FFFFF) & 0x7F800000, 0x3F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def reciprocal(scale, POWER_OF_TWO: tl.constexpr):
    """1 / scale, rounded to nearest; of a power of two without a division, from its exponent."""
    if POWER_OF_TWO:
        return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:  # noqa: RET505 (Triton compiles one branch)
        return tl.div_rn(1.0, scale)


@triton.jit
def to_e4m3(x, factor):
    """The conversion clips to the largest numbers of the format; NaN stays NaN."""
    return (x * factor).to(tl.float8e4nv)


@triton.jit
def load(at, inside, MASKED: tl.constexpr):
    """What is there, 0 outside."""
    if MASKED:
        return tl.load(at, inside, other=0.0)
    else:  # noqa: RET505 (Triton compiles one branch)
        return tl.load(at)
