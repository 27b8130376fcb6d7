"""Every array of a run's training state: its shape, where it lies, and what each device holds of it.

With a pipeline also what each of its stages runs.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from rich.table import Table

from moejax.config import ModelConfig, RunConfig
from moejax.mesh import AXES, resolve
from moejax.pipeline.layout import costs, lay_out
from moejax.pipeline.stages import program_of
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


@dataclass(frozen=True)
class StageRow:
    """One stage of a pipeline."""

    stage: int
    ranks: tuple[int, ...]  # that run it; with DualPipe two, one for each direction
    layers: str  # what it runs, layers numbered from 0
    moe_layers: int
    forward_flops: int  # per token
    share: float  # of the forward FLOPs of the stage that has most


def state_arrays(config: RunConfig, num_devices: int | None = None) -> list[ArrayRow]:
    """The arrays of the state that `config` trains, on a mesh of devices that need not exist.

    Args:
        config: the model, the optimizer and the mesh.
        num_devices: what a -1 in the mesh is filled up to; None: as many as the other lengths need.

    Raises:
        ConfigError: the model does not divide over the mesh.
    """
    config = _resolved(config, num_devices)
    mesh = AbstractMesh(
        tuple(getattr(config.mesh, axis) for axis in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES)
    )
    state = abstract_state(config, mesh)
    return [_row(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def stage_rows(config: RunConfig, num_devices: int | None = None) -> list[StageRow]:
    """The stages of the pipeline, first to last; none without one. Arguments and errors as of `state_arrays`."""
    config = _resolved(config, num_devices)
    if config.mesh.pipe == 1:
        return []
    program, layout = program_of(config), lay_out(config)
    chunks = [(rank, chunk) for rank in range(program.num_ranks) for chunk in range(program.num_chunks)]
    flops = costs(config, layout)
    return [
        StageRow(
            stage=stage,
            ranks=tuple(rank for rank, chunk in chunks if program.stage(rank, chunk) == stage),
            layers=_pieces(config.model, stage == 0, stage == len(flops) - 1, layout.first_layer[stage], moe_layers),
            moe_layers=moe_layers,
            forward_flops=flops[stage],
            share=flops[stage] / max(flops),
        )
        for stage, moe_layers in enumerate(layout.layers)
    ]


def _pieces(model: ModelConfig, is_first: bool, is_last: bool, first_moe: int, moe_layers: int) -> str:
    """What a stage runs: `embedding, dense 0-2, MoE 3-4`."""
    dense = model.num_dense_layers
    pieces = ["embedding", _span("dense", 0, dense)] if is_first else []
    pieces.append(_span("MoE", dense + first_moe, moe_layers))
    pieces += ["head", _span("MTP", model.num_layers, model.mtp.depth)] if is_last else []
    return ", ".join(filter(None, pieces))


def _span(kind: str, first: int, count: int) -> str:
    return "" if count == 0 else f"{kind} {first}" if count == 1 else f"{kind} {first}-{first + count - 1}"


def _resolved(config: RunConfig, num_devices: int | None) -> RunConfig:
    lengths = [getattr(config.mesh, axis) for axis in AXES]
    return resolve(config, num_devices or math.prod(length for length in lengths if length != -1))


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


def as_json(rows: list[ArrayRow], stages: Sequence[StageRow] = ()) -> dict[str, Any]:
    """The rows and their sums, and the stages if there are any."""
    return {
        **({"layout": [asdict(stage) for stage in stages]} if stages else {}),
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


def as_stage_table(stages: list[StageRow]) -> Table:
    """The stages and the mean of their shares, for the console."""
    table = Table(box=None)
    for heading in ("stage", "ranks"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("runs", no_wrap=True)
    table.add_column("FLOPs, % of the largest", justify="right", no_wrap=True)
    for row in stages:
        table.add_row(str(row.stage), ", ".join(map(str, row.ranks)), row.layers, f"{100 * row.share:.1f}")
    mean = sum(row.share for row in stages) / len(stages)
    table.add_row("[bold]mean", "", "", f"{100 * mean:.1f}")
    return table


def _sums(rows: list[ArrayRow]) -> tuple[str, str]:
    return _mb(sum(row.bytes for row in rows)), _mb(sum(row.bytes_per_device for row in rows))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.3f}"
