"""Tiles of rows that are sorted by expert: what a program of a kernel works on, made from the groups' sizes.

Groups lie one after another without padding, so a tile is up to so many rows of one group, counted from its start.

R rows, E experts, N tiles.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class RowTiles(NamedTuple):
    """Tiles in the order of their rows: first all experts', then those of rows beyond the groups, then unused ones."""

    expert: Int[Array, "N"]  # -1: the rows are beyond the groups, or there are none
    start: Int[Array, "N"]  # the first row
    end: Int[Array, "N"]  # where the group ends: rows from there on are not the tile's


def row_tiles(sizes_E: Int[Array, "E"], num_rows: int, rows_per_tile: int) -> RowTiles:
    """All tiles, R // `rows_per_tile` + E + 1 of them, whatever the sizes. Each of the rows is in exactly one.

    Args:
        sizes_E: rows of each group; they may sum to less than `num_rows`.
        num_rows: R.
        rows_per_tile: what a tile has, if it is not the last of its group.
    """
    num_experts = sizes_E.shape[0]
    starts = offsets(jnp.concatenate([sizes_E.astype(jnp.int32), jnp.full(1, num_rows, jnp.int32) - sizes_E.sum()]))
    firsts = offsets(num_tiles(jnp.diff(starts), rows_per_tile))
    tile_N = jnp.arange(num_rows // rows_per_tile + num_experts + 1, dtype=jnp.int32)
    group_N = (tile_N[:, None] >= firsts[1:]).sum(1)  # num_experts: beyond the groups; one more: unused
    start_N = jnp.minimum(starts[group_N] + (tile_N - firsts[group_N]) * rows_per_tile, num_rows)
    end_N = starts[jnp.minimum(group_N + 1, num_experts + 1)]
    return RowTiles(jnp.where(group_N < num_experts, group_N, -1).astype(jnp.int32), start_N, end_N)


def column_tiles(sizes_E: Int[Array, "E"], num_rows: int, rows_per_tile: int) -> RowTiles:
    """The tiles of experts alone, with -1 for those left over: as many as groups of any sizes can need."""
    most = (num_rows + (rows_per_tile - 1) * sizes_E.shape[0]) // rows_per_tile
    return RowTiles(*(array[:most] for array in row_tiles(sizes_E, num_rows, rows_per_tile)))


def num_tiles(sizes_E: Int[Array, "E"], rows_per_tile: int) -> Int[Array, "E"]:
    """How many tiles each group has."""
    return -(-sizes_E // rows_per_tile)


def offsets(sizes_E: Int[Array, "E"]) -> Int[Array, "E+1"]:
    """Where each group begins, and where the last one ends."""
    return jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), sizes_E.astype(jnp.int32)]), dtype=jnp.int32)
