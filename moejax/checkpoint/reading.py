"""How the arrays of a checkpoint come onto a mesh: how many at a time, who reads them, and how the others get them.

Where the state has copies (mesh axis `replica`) in several processes, the devices of replica 0 read, and what they read
travels to the others over the interconnect. An array that is cut over `replica` has no copies: all read their parts.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

STAGED_BYTES = 2**28  # of a device: arrays that do not stay as they are read are read in groups of so much, or alone
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by size: bits arrive as they are, some NaN would not


def groups(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """The indices of `sizes` in groups, of which each has a sum of at most `limit`, or one element."""
    group: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(index)
        total += size
    if group:
        yield group


def device_bytes(like: jax.ShapeDtypeStruct) -> int:
    """What one device holds of an array."""
    assert like.sharding is not None
    return math.prod(like.sharding.shard_shape(like.shape)) * like.dtype.itemsize


def as_read(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """`like` on the devices that read it: those of replica 0, where that spares a process the reading; else all."""
    sharding = like.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape.get("replica", 1) == 1:
        return like
    cut = {axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
    first = sharding.mesh.devices.take([0], axis=sharding.mesh.axis_names.index("replica"))
    if "replica" in cut or _processes(first) == _processes(sharding.mesh.devices):
        return like
    mesh = Mesh(first, sharding.mesh.axis_names, axis_types=sharding.mesh.axis_types)
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=NamedSharding(mesh, sharding.spec))


def is_here(like: jax.ShapeDtypeStruct) -> bool:
    """Whether this process has a part of the array."""
    assert like.sharding is not None
    return bool(like.sharding.addressable_devices)


def spread(array: Array | None, like: jax.ShapeDtypeStruct) -> Array:
    """An array that lies on the devices of replica 0, on all: bit by bit the same, also what is -0.0 or NaN.

    Each device holds it twice meanwhile. Arrays of 2 bytes travel as 4: some transports do not add fewer.

    Args:
        array: as `as_read` says; None in a process that has no part of that.
        like: where it goes.
    """
    sharding = like.sharding
    assert isinstance(sharding, NamedSharding)
    shape = (sharding.mesh.shape["replica"], *like.shape)
    every = NamedSharding(sharding.mesh, P("replica", *sharding.spec))
    read = {} if array is None else {shard.device: shard.data for shard in array.addressable_shards}
    empty = np.zeros(sharding.shard_shape(like.shape), like.dtype)
    parts = [
        jax.device_put(read.get(device, empty), device)[None] for device in every.addressable_devices_indices_map(shape)
    ]
    copies = jax.make_array_from_single_device_arrays(shape, every, parts, dtype=like.dtype)
    return _sum_of_copies(copies, sharding)


@functools.partial(jax.jit, static_argnums=1)
def _sum_of_copies(copies: Array, sharding: NamedSharding) -> Array:
    """All but one are zeros."""
    bits = BITS[copies.dtype.itemsize]

    def one(copy: Array) -> Array:
        whole = lax.psum(lax.bitcast_convert_type(copy[0], bits).astype(jnp.uint32), "replica")
        return lax.bitcast_convert_type(whole.astype(bits), copy.dtype)

    spec = P("replica", *sharding.spec)
    return jax.shard_map(one, mesh=sharding.mesh, in_specs=spec, out_specs=sharding.spec)(copies)


def bytes_read() -> int:
    """What this process has read of the files of arrays since it began."""
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def by_replica(mesh: Mesh, by_process: Sequence[int]) -> list[int]:
    """The sums over the processes of each replica, in order; a process that has several counts for its first."""
    rows = np.moveaxis(mesh.devices, mesh.axis_names.index("replica"), 0)
    sums, counted = [0] * len(rows), set[int]()
    for replica, devices in enumerate(rows):
        sums[replica] = sum(by_process[process] for process in _processes(devices) - counted)
        counted |= _processes(devices)
    return sums


def _processes(devices: Any) -> set[int]:
    return {device.process_index for device in devices.flat}
