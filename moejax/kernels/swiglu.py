"""SwiGLU with the routing weight for NVIDIA Hopper, in Triton: forward and backward, in BF16 and to and from E4M3.

The product before the activation is h [R, 2 * F], gate | up. What the down projection reads is
u = round(silu(gate) * up) * weight: rounded to BF16 before and after the weight, as in `moejax.ops.swiglu`. All of it
is computed in float32; a kernel reads its inputs from memory once. E4M3 numbers are in tiles as `quantise` has them:
rows and columns, of the BF16 numbers that the unfused operations would give.

R rows, sorted by expert; F the experts' width, C = ceil(F / 128) tiles of it, M tiles of rows.
"""

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import ShapeDtypeStruct
from jaxtyping import Array, Float, Int

from moejax.kernels.launch import launch
from moejax.kernels.quantise import (
    Tiles,
    columns_shape,
    load,
    load_block,
    load_rows,
    quantise_both,
    quantise_columns,
    quantise_rows,
    quantised,
    rows_of,
    rows_shape,
    store_columns,
    store_rows,
)
from moejax.kernels.sizes import TILE
from moejax.kernels.tiles import column_tiles, row_tiles

_TILES = 16  # of 1 x 128, a program of the kernels that go row by row


def weighted_swiglu(h_RG: Float[Array, "R G"], weights_R: Float[Array, "R"]) -> Float[Array, "R F"]:
    """u [R, F] in `h`'s dtype."""
    rows, width = h_RG.shape[0], h_RG.shape[1] // 2
    out = ShapeDtypeStruct((rows, width), h_RG.dtype)
    return launch(_forward_kernel, h_RG, weights_R, out=out, **_by_row(rows, width))


def weighted_swiglu_rows(h_RG: Float[Array, "R G"], weights_R: Float[Array, "R"]) -> tuple[Tiles, Tiles]:
    """u as rows for the down projection, and h as rows, which the backward pass keeps.

    Where a tile of `h` would hold gate and up, it takes a pass for each.
    """
    rows, width = h_RG.shape[0], h_RG.shape[1] // 2
    if width % TILE:
        return quantise_rows(weighted_swiglu(h_RG, weights_R)), quantise_rows(h_RG)
    out = (*rows_shape(rows, width), *rows_shape(rows, 2 * width))
    found = launch(_forward_rows_kernel, h_RG, weights_R, out=out, **_by_row(rows, width))
    return found[:2], found[2:]


def swiglu_gradient(
    h_RG: Float[Array, "R G"], du_RF: Float[Array, "R F"], weights_R: Float[Array, "R"]
) -> tuple[Float[Array, "R G"], Float[Array, "R"]]:
    """The gradients of h [R, 2 * F], in its dtype, and of the weights [R], float32."""
    rows, width = du_RF.shape
    shapes = ShapeDtypeStruct(h_RG.shape, h_RG.dtype), ShapeDtypeStruct((triton.cdiv(width, TILE), rows), jnp.float32)
    dh_RG, dweights_CR = launch(_gradient_kernel, h_RG, du_RF, weights_R, out=shapes, **_by_row(rows, width))
    return dh_RG, dweights_CR.sum(0)


def swiglu_gradient_tiles(
    h: Tiles, du_RF: Float[Array, "R F"], weights_R: Float[Array, "R"], sizes_E: Int[Array, "E"]
) -> tuple[Tiles, Tiles, Tiles, Float[Array, "R"]]:
    """The gradient of h as rows and as columns, u as columns, and the weights' gradient [R], float32.

    `h`: what `weighted_swiglu_rows` gave, taken as bfloat16. Rows beyond the groups give 0. The activation is made by a
    kernel of its own, which reads h a second time: all in one takes more registers than a thread can have. It also can
    wait, with the gradients of the experts.
    """
    (rows, width), tiles = du_RF.shape, row_tiles(sizes_E, du_RF.shape[0], TILE)
    if width % TILE:
        return _gradient_in_passes(h, du_RF, weights_R, sizes_E)
    count, parts = column_tiles(sizes_E, rows, TILE).expert.size, triton.cdiv(width, TILE)
    *dh, dweights_CR = launch(
        _gradient_tiles_kernel,
        *h,
        du_RF,
        weights_R,
        *tiles,
        out=(
            *rows_shape(rows, 2 * width),
            *columns_shape(count, 2 * width),
            ShapeDtypeStruct((parts, rows), jnp.float32),
        ),
        grid=(2 * parts, tiles.expert.size),
        num_warps=16,
        num_stages=1,
        R=rows,
        F=width,
        M=count,
    )
    u = launch(
        _forward_columns_kernel,
        *h,
        weights_R,
        *tiles,
        out=columns_shape(count, width),
        grid=(parts, count),
        num_warps=8,
        num_stages=1,
        F=width,
        M=count,
    )
    return tuple(dh[:2]), tuple(dh[2:]), u, dweights_CR.sum(0)


def _by_row(rows: int, width: int) -> dict:
    grid = (triton.cdiv(rows * triton.cdiv(width, TILE), _TILES),)
    return {"grid": grid, "num_warps": 4, "num_stages": 1, "R": rows, "F": width, "TILES": _TILES}


def _gradient_in_passes(
    h: Tiles, du_RF: Float[Array, "R F"], weights_R: Float[Array, "R"], sizes_E: Int[Array, "E"]
) -> tuple[Tiles, Tiles, Tiles, Float[Array, "R"]]:
    """The same where a tile of `h` holds gate and up."""
    values, scales = h
    h_RG = (values.astype(jnp.float32) * jnp.repeat(scales, TILE, axis=1)[:, : values.shape[1]]).astype(du_RF.dtype)
    real = (jnp.arange(len(h_RG)) < sizes_E.sum())[:, None]
    h_RG, du_RF, weights_R = jnp.where(real, h_RG, 0), jnp.where(real, du_RF, 0), jnp.where(real[:, 0], weights_R, 0)
    dh_RG, dweights_R = swiglu_gradient(h_RG, du_RF, weights_R)
    u = quantise_columns(weighted_swiglu(h_RG, weights_R), sizes_E)
    return *quantise_both(dh_RG, sizes_E), u, dweights_R


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _forward_kernel(h, weights, u, R: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr):
    """Has not run on a GPU yet."""
    _, row, col, inside = _tiles_of_rows(R, F, TILES)
    MASKED: tl.constexpr = _masked(R, F, TILES)
    at = row.to(tl.int64)[:, None] * (2 * F) + col
    gate, up = load(h + at, inside, MASKED), load(h + at + F, inside, MASKED)
    weight = load(weights + row, row < R, MASKED)
    tl.store(u + row.to(tl.int64)[:, None] * F + col, _weighted(gate, up, weight), inside if MASKED else None)


@triton.jit
def _forward_rows_kernel(
    h, weights, u, u_scales, values, scales, R: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr
):
    """The tiles of gate and up that meet in one of u. Has not run on a GPU yet."""
    C: tl.constexpr = F // 128
    tile, row, col, inside = _tiles_of_rows(R, F, TILES)
    MASKED: tl.constexpr = _masked(R, F, TILES)
    at = row.to(tl.int64)[:, None] * (2 * F) + col
    gate, up = load(h + at, inside, MASKED), load(h + at + F, inside, MASKED)
    weight = load(weights + row, row < R, MASKED)
    q, scale = quantised(_weighted(gate, up, weight).to(tl.float32), 1, False)
    tl.store(u + row.to(tl.int64)[:, None] * F + col, q, inside if MASKED else None)
    tl.store(u_scales + tile, scale, row < R if MASKED else None)
    first = scales + tile + row * C  # row * 2C + its tile, which is tile - row * C
    q, scale = quantised(gate.to(tl.float32), 1, False)
    tl.store(values + at, q, inside if MASKED else None)
    tl.store(first, scale, row < R if MASKED else None)
    q, scale = quantised(up.to(tl.float32), 1, False)
    tl.store(values + at + F, q, inside if MASKED else None)
    tl.store(first + C, scale, row < R if MASKED else None)


@triton.jit
def _gradient_kernel(h, du, weights, dh, dweights, R: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr):
    """The weights' gradient is left in parts, one for each 128 columns. Has not run on a GPU yet."""
    C: tl.constexpr = (F + 127) // 128
    tile, row, col, inside = _tiles_of_rows(R, F, TILES)
    MASKED: tl.constexpr = _masked(R, F, TILES)
    at = row.to(tl.int64)[:, None] * (2 * F) + col
    gate, up = load(h + at, inside, MASKED), load(h + at + F, inside, MASKED)
    d = load(du + row.to(tl.int64)[:, None] * F + col, inside, MASKED)
    weight = load(weights + row, row < R, MASKED)
    dgate, dup, dweight = _gradients(gate, up, d.to(tl.float32), weight)
    tl.store(dh + at, dgate, inside if MASKED else None)
    tl.store(dh + at + F, dup, inside if MASKED else None)
    tl.store(dweights + (tile % C) * R + row, dweight, row < R if MASKED else None)


@triton.jit
def _gradient_tiles_kernel(
    h, h_scales, du, weights, experts, starts, ends, dh, dh_scales, dh_columns, dh_column_scales, dweights,
    R: tl.constexpr, F: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One program has a block of gate's gradient, the next one that of up's, and finds in the cache what both read.

    A program that has both takes more registers than there are. Has not run on a GPU yet.
    """
    C: tl.constexpr = F // 128
    c, tile = tl.program_id(0) // 2, tl.program_id(1)
    start, own, real = rows_of(tile, experts, starts, ends)
    if tl.program_id(0) % 2 == 0:
        gate, up, weight = _load_hidden(h, h_scales, weights, start, real, c, F)
        d = load_block(du, start, real, c, F).to(tl.float32)
        dgate, _dup, dweight = _gradients(gate, up, d, weight)
        tl.store(dweights + c * R + start + tl.arange(0, 128), dweight, own)
        store_rows(dgate.to(tl.float32), start, own, c, dh, dh_scales, 2 * F, False)
        store_columns(dgate.to(tl.float32), tile, c, dh_columns, dh_column_scales, 2 * F, M, False)
    else:
        gate, up, weight = _load_hidden(h, h_scales, weights, start, real, c, F)
        d = load_block(du, start, real, c, F).to(tl.float32)
        _dgate, dup, _dweight = _gradients(gate, up, d, weight)
        store_rows(dup.to(tl.float32), start, own, c + C, dh, dh_scales, 2 * F, False)
        store_columns(dup.to(tl.float32), tile, c + C, dh_columns, dh_column_scales, 2 * F, M, False)


@triton.jit
def _forward_columns_kernel(
    h, h_scales, weights, experts, starts, ends, columns, scales,
    F: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Has not run on a GPU yet."""
    c, tile = tl.program_id(0), tl.program_id(1)
    start, _, real = rows_of(tile, experts, starts, ends)
    gate, up, weight = _load_hidden(h, h_scales, weights, start, real, c, F)
    store_columns(_weighted(gate, up, weight).to(tl.float32), tile, c, columns, scales, F, M, False)


@triton.jit
def _load_hidden(h, scales, weights, start, real, c, F: tl.constexpr):
    """Gate and up of a block, bfloat16, and the weights of its rows."""
    gate = load_rows(h, scales, start, real, c, 2 * F).to(tl.bfloat16)
    up = load_rows(h, scales, start, real, c + F // 128, 2 * F).to(tl.bfloat16)
    return gate, up, tl.load(weights + start + tl.arange(0, 128), real, other=0.0)


@triton.jit
def _tiles_of_rows(R: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr):
    """A program's tiles of 1 x 128, numbered along a row, then row by row: their rows and columns, and which exist."""
    C: tl.constexpr = (F + 127) // 128
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    row, col = tile // C, (tile % C)[:, None] * 128 + tl.arange(0, 128)[None, :]
    return tile, row, col, (row < R)[:, None] & (col < F)


@triton.constexpr_function
def _masked(rows, width, tiles):
    return width % 128 != 0 or rows * (width // 128) % tiles != 0


@triton.jit
def _activation(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, rounded, and the two factors of its gradient by gate."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return (silu * up).to(dtype).to(tl.float32), sigmoid, silu


@triton.jit
def _weighted(gate, up, weight):
    """u, in the dtype of gate and up."""
    activation, _, _ = _activation(gate.to(tl.float32), up.to(tl.float32), gate.dtype)
    return (activation * weight[:, None]).to(gate.dtype)


@triton.jit
def _gradients(gate, up, du, weight):
    """Those of gate and up, in their dtype, and the weight's, summed over these columns."""
    dtype: tl.constexpr = gate.dtype
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    activation, sigmoid, silu = _activation(gate, up, dtype)
    dweight = tl.sum(du * activation, 1)
    du *= weight[:, None]
    dgate = du * up * (sigmoid + silu * (1 - sigmoid))
    return dgate.to(dtype), (du * silu).to(dtype), dweight
