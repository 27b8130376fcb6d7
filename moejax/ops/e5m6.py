"""Numbers of 12 bits, one of sign, 5 of exponent, 6 of mantissa, in which FP8 training keeps the attention's output.

The backward pass of attention reads it beside the linear layer after it, and E4M3 would be too coarse
(arXiv:2412.19437, section 3.3.3). Each 128 numbers of a row share a scale, a power of two. E5M6 is float16 without its
last four bits. Two numbers lie in three bytes: the low eight bits of each in one array, the high four of both in
another.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moejax.varying import vary_like

TILE = 128
LARGEST = 15  # exponent below which a tile's largest number is scaled to lie; the format holds numbers twice as large


class Packed(NamedTuple):
    """Rows [*B, I]."""

    low: Array  # uint8 [*B, I]
    high: Array  # uint8 [*B, ceil(I / 2)]; the first of a pair in the low bits
    scales: Array  # float32 [*B, ceil(I / 128)]


def pack(x_BI: Float[Array, "*B I"]) -> Packed:
    """Rounds numbers of bfloat16 to nearest, ties to even; finer ones are rounded to float16 first.

    Below 2^-29 of a tile's largest number steps are equal, and below 2^-36, or 2^-120, it is 0.
    """
    width = x_BI.shape[-1]
    tiles = _tiled(x_BI.astype(jnp.float32), TILE)
    _, exponent = jnp.frexp(jnp.abs(tiles).max(-1))
    scales = vary_like(jnp.ldexp(jnp.float32(1), jnp.clip(exponent - LARGEST, -100, 127)), tiles)  # as in fp8.py
    halves = (tiles / scales[..., None]).astype(jnp.float16).reshape(*x_BI.shape[:-1], -1)[..., :width]
    bits = lax.bitcast_convert_type(halves, jnp.uint16)
    bits = (bits + 7 + ((bits >> 4) & 1)) >> 4
    pairs = _tiled((bits >> 8).astype(jnp.uint8), 2)
    return Packed(bits.astype(jnp.uint8), pairs[..., 0] | pairs[..., 1] << 4, scales)


def unpack(packed: Packed) -> Float[Array, "*B I"]:
    """The numbers, float32."""
    *rows, width = packed.low.shape
    high = jnp.stack([packed.high & 15, packed.high >> 4], axis=-1).reshape(*rows, -1)[..., :width]
    bits = (high.astype(jnp.uint16) << 12) | (packed.low.astype(jnp.uint16) << 4)
    tiles = _tiled(lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32), TILE)
    return (tiles * packed.scales[..., None]).reshape(*rows, -1)[..., :width]


def _tiled(x_BI: Array, size: int) -> Array:
    """[*B, I] -> [*B, ceil(I / size), size], with zeros at the end."""
    *rows, width = x_BI.shape
    padded = jnp.pad(x_BI, [(0, 0)] * len(rows) + [(0, -width % size)])
    return padded.reshape(*rows, -1, size)
