"""Every array of a run's training state: its shape, where it lies, and what each device holds of it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from rich.table import Table

from moejax.config import RunConfig
from moejax.mesh import AXES, resolve
from moejax.train.state import abstract_state


@dataclass(frozen=True)
class ArrayRow:
    """One array of the training state."""

    part: str  # params, router_bias, opt_state, ema, step
    name: str  # path inside the part
    shape: tuple[int, ...]
    dtype: str
    spec: str  # mesh axes over which each dim is cut
    bytes: int  # of the whole array
    bytes_per_device: int


def state_arrays(config: RunConfig, num_devices: int | None = None) -> list[ArrayRow]:
    """The arrays of the state that `config` trains, on a mesh of devices that need not exist.

    Args:
        config: the model, the optimizer and the mesh.
        num_devices: what a -1 in the mesh is filled up to; None: as many as the other lengths need.

    Raises:
        ConfigError: the model does not divide over the mesh.
    """
    lengths = [getattr(config.mesh, axis) for axis in AXES]
    given = math.prod(length for length in lengths if length != -1)
    config = resolve(config, num_devices or given)
    mesh = AbstractMesh(
        tuple(getattr(config.mesh, axis) for axis in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES)
    )
    state = abstract_state(config, mesh)
    return [_row(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def _row(path: tuple, leaf: jax.ShapeDtypeStruct) -> ArrayRow:
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    shard = leaf.sharding.shard_shape(leaf.shape)  # type: ignore[union-attr]
    return ArrayRow(
        part=names[0],
        name=".".join(name for name in names[1:] if name != "value"),
        shape=leaf.shape,
        dtype=leaf.dtype.name,
        spec=_spec(leaf.sharding),  # type: ignore[arg-type]
        bytes=leaf.size * leaf.dtype.itemsize,
        bytes_per_device=math.prod(shard) * leaf.dtype.itemsize,
    )


def _spec(sharding: jax.sharding.NamedSharding) -> str:
    """For each dim the mesh axes, longer than 1, over which it is cut; `-`: it is whole."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec]
    cut = [[axis for axis in entry if axis is not None and sharding.mesh.shape[axis] > 1] for entry in entries]
    return ", ".join(" x ".join(axes) or "-" for axes in cut)


def as_json(rows: list[ArrayRow]) -> dict[str, Any]:
    """The rows and their sums."""
    return {
        "arrays": [asdict(row) for row in rows],
        "bytes": sum(row.bytes for row in rows),
        "bytes_per_device": sum(row.bytes_per_device for row in rows),
    }


def as_table(rows: list[ArrayRow]) -> Table:
    """The rows and their sums, part by part, for the console."""
    table = Table(box=None)
    for heading in ("array", "shape", "dtype", "cut over"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MB", "MB per device"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in dict.fromkeys(row.part for row in rows):
        own = [row for row in rows if row.part == part]
        for row in own:
            shape = " x ".join(map(str, row.shape))
            table.add_row(f"{part} {row.name}", shape, row.dtype, row.spec, _mb(row.bytes), _mb(row.bytes_per_device))
        if len(own) > 1:
            table.add_row(f"[bold]{part}, all", "", "", "", *_sums(own))
    table.add_row("[bold]training state", "", "", "", *_sums(rows))
    return table


def _sums(rows: list[ArrayRow]) -> tuple[str, str]:
    return _mb(sum(row.bytes for row in rows)), _mb(sum(row.bytes_per_device for row in rows))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.3f}"
