"""DeepSeek-V3's fine-grained FP8 (arXiv:2412.19437, section 3.3): numbers that share a scale in tiles.

Every FP8 number is E4M3. A scale is made online, from the largest magnitude of its own tile. No finite number becomes
NaN: what is larger than the format holds is clipped. What tiles are made of depends on what is summed over in the
product that they go into:

- rows: each 128 numbers of a row share a scale: activations and gradients on their way forward or back
- columns: each 128 tokens share one, per channel: both factors of a weight's gradient, in which tokens are summed over
- blocks: 128 x 128 numbers share one: weights, whose transposes so need no other scales

R rows (tokens), E experts (one in a dense layer), I and O dims of a product, N and K those of a weight as it is
multiplied, of which K is summed over; M tiles of tokens.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.kernels.tiles import column_tiles
from moejax.ops.platform import by_platform
from moejax.varying import vary_like

TILE = 128
E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # of E4M3
LEAST = 1e-4  # the largest magnitude of a tile is taken to be no less


class ScaledRows(NamedTuple):
    """Numbers whose scales are of 1 x 128."""

    values: Array  # E4M3 [*B, I]
    scales: Array  # float32 [*B, ceil(I / 128)]


class KeptRows(NamedTuple):
    """`ScaledRows` as a backward pass keeps them, from `keep_rows` to `kept_rows`.

    As bytes, for two reasons. XLA for CPUs writes E4M3 into a larger array (a layer's into that of all layers) by
    turning all of it into float16 and back. And of a number that is saved and also used JAX rounds what is used
    (`reduce_precision`), where XLA takes E4M3 to end at 240, as if it had an infinity: larger ones would become NaN.
    """

    bits: Array  # uint8 [*B, I]
    scales: Array  # float32 [*B, ceil(I / 128)]


class ScaledColumns(NamedTuple):
    """Numbers whose scales are of 128 tokens x 1, transposed.

    A tile has tokens of one expert, counted from the first of them; what is missing in its last is 0. The tiles of the
    experts follow each other; those left over have 0.
    """

    values: Array  # E4M3 [I, M * 128]
    scales: Array  # float32 [M, I]


class ScaledBlocks(NamedTuple):
    """Weights whose scales are of 128 x 128."""

    values: Array  # E4M3 [E, N, K]
    scales: Array  # float32 [E, ceil(N / 128), ceil(K / 128)]


# ---------------------------------------------------------------------------------------------------------- quantisers


def quantise_rows(x: Float[Array, "*B I"], power_of_two: bool = False) -> ScaledRows:
    """Tiles along the last dim. `power_of_two`: scales are rounded up to one."""

    def plain(x: Array) -> ScaledRows:
        tiles = _tiled(x.astype(jnp.float32), x.ndim - 1)
        scales = _scales(jnp.abs(tiles).max(-1), power_of_two)
        values = _cast(tiles, scales[..., None]).reshape(*x.shape[:-1], -1)
        return ScaledRows(values[..., : x.shape[-1]], scales)

    def kernel(x: Array) -> ScaledRows:
        from moejax.kernels import quantise

        found = quantise.quantise_rows(x.reshape(-1, x.shape[-1]), power_of_two)
        return ScaledRows(*(a.reshape(*x.shape[:-1], -1) for a in found))

    return by_platform(kernel, plain, x)


def dequantise_rows(x: ScaledRows) -> Float[Array, "*B I"]:
    """What `quantise_rows` stands for, float32."""
    scales = jnp.repeat(x.scales, TILE, axis=-1)[..., : x.values.shape[-1]]
    return x.values.astype(jnp.float32) * scales


def quantise_columns(
    x_RI: Float[Array, "R I"] | ScaledRows, sizes_E: Int[Array, "E"] | None, power_of_two: bool = False
) -> ScaledColumns:
    """Tiles along the tokens of each expert; None: of one that has all.

    Of rows that are in FP8 already, what they stand for is quantised anew.
    """

    def plain(x: Array | ScaledRows, sizes: Array | None) -> ScaledColumns:
        x_RI = dequantise_rows(x) if isinstance(x, ScaledRows) else x.astype(jnp.float32)
        tiles_MTI = _tiled(x_RI, 0) if sizes is None else _tiles_of_experts(x_RI, sizes)
        scales_MI = _scales(jnp.abs(tiles_MTI).max(1), power_of_two)
        values = _cast(tiles_MTI, scales_MI[:, None])
        return ScaledColumns(values.reshape(-1, x_RI.shape[1]).T, scales_MI)

    def kernel(x: Array | ScaledRows, sizes: Array | None) -> ScaledColumns:
        from moejax.kernels import quantise

        rows = len(x.values) if isinstance(x, ScaledRows) else len(x)
        return ScaledColumns(*quantise.quantise_columns(x, one_group(sizes, rows), power_of_two))

    return by_platform(kernel, plain, x_RI, sizes_E)


def quantise_both(
    x_RI: Float[Array, "R I"], sizes_E: Int[Array, "E"] | None, power_of_two: bool = False
) -> tuple[ScaledRows, ScaledColumns]:
    """Rows and columns, which a kernel makes in one read; beyond the groups rows are undefined, columns are none."""

    def plain(x: Array, sizes: Array | None) -> tuple[ScaledRows, ScaledColumns]:
        return quantise_rows(x, power_of_two), quantise_columns(x, sizes, power_of_two)

    def kernel(x: Array, sizes: Array | None) -> tuple[ScaledRows, ScaledColumns]:
        from moejax.kernels import quantise

        rows, columns = quantise.quantise_both(x, one_group(sizes, len(x)), power_of_two)
        return ScaledRows(*rows), ScaledColumns(*columns)

    return by_platform(kernel, plain, x_RI, sizes_E)


def dequantise_columns(x: ScaledColumns) -> Float[Array, "I T"]:
    """What `quantise_columns` stands for, float32, T = M * 128."""
    return x.values.astype(jnp.float32) * jnp.repeat(x.scales.T, TILE, axis=1)


def quantise_blocks(w_EIO: Float[Array, "E I O"], transposed: bool) -> ScaledBlocks:
    """Blocks of each expert's matrix, or of its transpose."""

    def plain(w_EIO: Array) -> ScaledBlocks:
        tiles = _tiled(_tiled(w_EIO.astype(jnp.float32), 1), 3)  # [E, C, 128, D, 128]
        scales = _scales(jnp.abs(tiles).max((2, 4)), power_of_two=False)
        values = _cast(tiles, scales[:, :, None, :, None])
        values = values.reshape(len(w_EIO), tiles.shape[1] * TILE, -1)[:, : w_EIO.shape[1], : w_EIO.shape[2]]
        return ScaledBlocks(values.mT, scales.mT) if transposed else ScaledBlocks(values, scales)

    def kernel(w_EIO: Array) -> ScaledBlocks:
        from moejax.kernels import quantise

        return ScaledBlocks(*quantise.quantise_blocks(w_EIO, transposed))

    return by_platform(kernel, plain, w_EIO)


def dequantise_blocks(w: ScaledBlocks) -> Float[Array, "E N K"]:
    """What `quantise_blocks` stands for, float32."""
    _, rows, columns = w.values.shape
    scales = jnp.repeat(jnp.repeat(w.scales, TILE, axis=1)[:, :rows], TILE, axis=2)[:, :, :columns]
    return w.values.astype(jnp.float32) * scales


# ---------------------------------------------------------------------------------------------- for the backward pass


def keep_rows(rows: ScaledRows, name: str | None = None) -> KeptRows:
    """`name`: under which policies of `jax.checkpoint` know them."""
    kept = KeptRows(lax.bitcast_convert_type(rows.values, jnp.uint8), rows.scales)
    return kept if name is None else KeptRows(*(checkpoint_name(a, name) for a in kept))


def kept_rows(kept: KeptRows) -> ScaledRows:
    """What `keep_rows` was given."""
    return ScaledRows(lax.bitcast_convert_type(kept.bits, E4M3), kept.scales)


# ------------------------------------------------------------------------------------------------------------- pieces


def one_group(sizes_E: Int[Array, "E"] | None, num_rows: int) -> Int[Array, "E"]:
    """The sizes, where None says that one expert has all rows."""
    return jnp.full((1,), num_rows, jnp.int32) if sizes_E is None else sizes_E


def _tiled(x: Array, dim: int) -> Array:
    """`x` with the dim cut into [tiles, 128]; zeros fill the last one."""
    length = x.shape[dim]
    padding = [(0, -length % TILE if d == dim else 0) for d in range(x.ndim)]
    return jnp.pad(x, padding).reshape(*x.shape[:dim], -1, TILE, *x.shape[dim + 1 :])


def _tiles_of_experts(x_RI: Array, sizes_E: Array) -> Array:
    """[M, 128, I], M depending on shapes alone; 0 where a tile has no row."""
    tiles = column_tiles(sizes_E, len(x_RI), TILE)
    place_MT = tiles.start[:, None] + jnp.arange(TILE)
    own_MT = (place_MT < tiles.end[:, None]) & (tiles.expert >= 0)[:, None]
    return x_RI.at[jnp.where(own_MT, place_MT, len(x_RI))].get(mode="fill", fill_value=0)


def _scales(largest: Array, power_of_two: bool) -> Array:
    """The scale with which a tile of that largest magnitude fits."""
    scales = jnp.maximum(largest, LEAST) * jnp.float32(1 / LARGEST)  # XLA makes that of a division, eager JAX does not
    if not power_of_two:
        return scales
    mantissa, exponent = jnp.frexp(scales)
    powers = jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))
    return vary_like(powers, largest)  # jax 0.12 marks what ldexp returns as equal on all devices


def _cast(x: Array, scales: Array) -> Array:
    """Rounded to nearest even; the reciprocal is what kernels multiply by, too."""
    return jnp.clip(x * (1 / scales), -LARGEST, LARGEST).astype(E4M3)
