"""Tiles of rows: every row in exactly one, whatever the sizes of the groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.kernels.tiles import num_tiles, offsets, row_tiles

GROUPS = {
    "uneven": (13, 40, 8, 1),
    "empty ones": (0, 17, 0, 0, 16, 0),
    "whole tiles": (8, 16, 24),
    "all rows to one": (0, 0, 61),
    "one group": (61,),
    "one row each": (1,) * 9,
    "no rows": (0, 0, 0),
}
BEYOND = {"no rows beyond": 0, "a few rows beyond": 3, "many rows beyond": 40}


def naive(sizes, num_rows, rows_per_tile):
    tiles, start = [], 0
    for expert, size in [*enumerate(sizes), (-1, num_rows - sum(sizes))]:
        tiles += [(expert, start + first, start + size) for first in range(0, size, rows_per_tile)]
        start += size
    unused = num_rows // rows_per_tile + len(sizes) + 1 - len(tiles)
    assert unused >= 0
    return np.array(tiles + [(-1, num_rows, num_rows)] * unused).reshape(-1, 3)


@pytest.mark.parametrize("beyond", BEYOND.values(), ids=BEYOND.keys())
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS.keys())
def test_row_tiles_match_naive(sizes, beyond):
    num_rows = sum(sizes) + beyond
    tiles = row_tiles(jnp.array(sizes), num_rows, 8)
    np.testing.assert_array_equal(np.stack(tiles, axis=1), naive(sizes, num_rows, 8))
    assert {a.dtype for a in tiles} == {jnp.dtype("int32")}


def test_row_tiles_begin_where_tiles_of_columns_do():
    """The order of experts' tiles is the order in which quantised columns lie."""
    sizes = jnp.array([5, 0, 128, 300, 1])
    expert = np.asarray(row_tiles(sizes, 500, 128).expert)
    firsts = np.asarray(offsets(num_tiles(sizes, 128)))
    assert firsts.tolist() == [0, 1, 1, 2, 5, 6]
    for e in range(5):
        assert (expert[firsts[e] : firsts[e + 1]] == e).all()
    assert (expert[firsts[-1] :] == -1).all()


def test_row_tiles_of_devices_differ():
    """Inside of a shard_map that checks over which axes arrays vary, each device has its own."""
    sizes = np.array([[3, 9, 1], [0, 2, 8]], np.int32)
    mesh = jax.make_mesh((2,), ("x",))

    def local(sizes):
        return jnp.stack(row_tiles(sizes[0], 14, 4), axis=1)[None]

    spread = jax.device_put(sizes, NamedSharding(mesh, P("x")))
    tiles = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(spread)
    np.testing.assert_array_equal(tiles, np.stack([naive(s, 14, 4) for s in sizes]))
