"""The plan of a run: does it fit, how fast will it be, what will it cost. Nothing is compiled, no device is needed."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table

from moejax.config import ConfigError, RunConfig
from moejax.mesh import AXES, resolve
from moejax.pipeline.stages import require_pipeline
from moejax.plan.arrays import ArrayRow, state_arrays
from moejax.plan.cost import Cost, cost, steps_by_rows
from moejax.plan.hardware import Hardware, load_hardware
from moejax.plan.memory import Part, memory
from moejax.plan.time import Timing, estimate
from moejax.plan.traffic import Transfer, transfers
from moejax.report.plan import draw_plan

ROOM = 0.95  # share of a device's memory that a step may take: the rest is the runtime's, and lost between arrays


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts."""

    config: RunConfig  # its mesh resolved
    hardware: Hardware
    memory: tuple[Part, ...]  # of the devices of each pipeline rank
    timing: Timing
    cost: Cost
    arrays: tuple[ArrayRow, ...]  # of the training state, and where they lie
    notes: tuple[str, ...]  # what would stop the run

    @property
    def bytes_by_rank(self) -> dict[int, int]:
        """What a device of each pipeline rank holds at most."""
        found: dict[int, int] = {}
        for part in self.memory:
            found[part.rank] = found.get(part.rank, 0) + part.bytes
        return found

    @property
    def fits(self) -> bool:
        """Whether the fullest device has room for its parts."""
        return max(self.bytes_by_rank.values()) <= ROOM * self.hardware.memory

    def traffic(self, rank: int = 0) -> list[Transfer]:
        """What a device of a pipeline rank sends in a step: every kind of collective, its bytes, how often it runs."""
        return transfers(self.config, rank, self.hardware.devices_per_node)

    def draw(self) -> Figure:
        """Memory of each rank, the work of each rank, and where the time of a step goes."""
        ranks = sorted(self.bytes_by_rank)
        held = {(part.name, part.rank): part.bytes for part in self.memory}
        names = dict.fromkeys(part.name for part in self.memory)
        by_part = {name: [float(held.get((name, rank), 0)) for rank in ranks] for name in names}
        title, timing = f"{self.config.name} on {self.timing.devices} {self.hardware.name}", self.timing
        return draw_plan(title, by_part, self.hardware.memory, timing.parts, timing.busy, timing.bubble)


def plan(config: RunConfig, hardware: str | Hardware = "h800", devices: int | None = None) -> Plan:
    """The plan of a run.

    Args:
        config: the run.
        hardware: a name or a JSON file (`hardware.load_hardware`), or what was read from one.
        devices: what a -1 in the mesh is filled up to; None: as many as the other lengths need.

    Raises:
        ConfigError: the mesh does not fit the model, the batch or the schedule; the hardware is not known.
    """
    lengths = [getattr(config.mesh, axis) for axis in AXES]
    config = resolve(config, devices or math.prod(length for length in lengths if length != -1))
    require_pipeline(config, [config.data.batch_size])
    chip = hardware if isinstance(hardware, Hardware) else load_hardware(hardware)
    parts, timing, arrays = tuple(memory(config)), estimate(config, chip), state_arrays(config)
    made = Plan(config, chip, parts, timing, cost(config, chip, timing, arrays), tuple(arrays), ())
    return dataclasses.replace(made, notes=tuple(_notes(made)))


def _notes(made: Plan) -> list[str]:
    """What would stop the run, or let it be slower than it has to be."""
    config, found, held = made.config, [], made.bytes_by_rank
    if not made.fits:
        rank = max(held, key=held.__getitem__)
        most = f"{ROOM:.0%} of {_gb(made.hardware.memory)} GB"
        found.append(f"does not fit: a device of rank {rank} holds {_gb(held[rank])} GB, more than {most}")
    try:
        require_pipeline(config, list(steps_by_rows(config)))
    except ConfigError as error:
        found.append(f"the run would not start: {error}")
    busy = made.timing.busy
    mean = sum(busy) / len(busy)
    if max(busy) > 1.1 * mean:
        rank = busy.index(max(busy))
        found.append(
            f"rank {rank} has {max(busy) / mean - 1:.0%} more to do than the mean of the ranks, which wait for it"
        )
    return found


# ---------------------------------------------------------------------------------------------------------- for people


def as_table(made: Plan) -> Group:
    """Memory, time and cost, for the console."""
    config, mesh = made.config, made.config.mesh
    lengths = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1) or "one device"
    schedule = f"{config.pipeline.schedule}, " if mesh.pipe > 1 else ""
    title = f"{config.name} on {made.timing.devices} {made.hardware.name}: {lengths}; {schedule}"
    title += f"{config.pipeline.num_microbatches} micro-batches, {config.precision}, remat {config.model.remat}"
    notes = [f"note: {note}" for note in made.notes]
    return Group(title, *notes, "", _memory_table(made), "", _time_table(made), "", _cost_table(made))


def _memory_table(made: Plan) -> Table:
    names = list(dict.fromkeys(part.name for part in made.memory))
    held = {(part.rank, part.name): part.bytes for part in made.memory}
    totals = made.bytes_by_rank
    table = _table("GB of a device", *(f"rank {rank}" for rank in _shown(totals)))
    for name in names:
        table.add_row(name, *(_gb(held.get((rank, name), 0)) for rank in _shown(totals)))
    table.add_row("[bold]all", *(f"[bold]{_gb(totals[rank])}" for rank in _shown(totals)))
    table.add_row("% of the device's", *(f"{100 * totals[rank] / made.hardware.memory:.0f}" for rank in _shown(totals)))
    return table


def _shown(totals: dict[int, int]) -> list[int]:
    """Ranks that have a column: one of those that hold the same, up to eight, the fullest among them."""
    different = {total: rank for rank, total in reversed(totals.items())}
    fullest = sorted(different, reverse=True)[:8]
    return sorted(different[total] for total in fullest)


def _time_table(made: Plan) -> Table:
    timing = made.timing
    unit, factor = ("seconds", 1.0) if timing.step >= 0.1 else ("ms", 1e3)
    table = _table("a step", unit, "%")
    rows = [*timing.cells.items(), ("", 0.0), *timing.parts.largest_first(), ("[bold]step", timing.step)]
    for name, seconds in rows:
        numbers = (f"{factor * seconds:.3f}", f"{100 * seconds / timing.step:.1f}") if seconds else ("", "")
        table.add_row(name, *numbers)
    return table


def _cost_table(made: Plan) -> Table:
    timing, run = made.timing, made.cost
    table = _table("the run", "")
    for name, value in (
        ("tokens/s per GPU", f"{timing.tokens_per_second:,.0f}"),
        ("MFU, attention's causal half counted", f"{timing.mfu:.1%}"),
        ("steps, tokens", f"{run.steps:,}, {_many(run.tokens)}"),
        ("per trillion tokens", _spent(run.gpu_hours_per_trillion, run.dollars_per_trillion)),
        ("days per trillion tokens", f"{run.days_per_trillion:.1f}"),
        ("all tokens", _spent(run.gpu_hours, run.dollars)),
        ("failures", f"{run.failures:,.0f}, one in {run.hours_between_failures:.1f} h"),
        ("a save", f"{run.save_seconds:.1f} s, on the storage after {run.write_seconds:.0f} s"),
        ("interval that loses least", f"{run.interval / 60:.1f} min"),
        ("goodput", f"{run.goodput:.1%}"),
        ("all tokens, with failures", _spent(run.gpu_hours_with_failures, run.dollars_with_failures)),
        ("wall clock, with failures", _wall_clock(run.hours / max(run.goodput, 1e-9))),
    ):
        table.add_row(name, value)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None)
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table


def _spent(hours: float, dollars: float) -> str:
    spent = f"{hours / 1e3:,.1f}K" if hours >= 1e3 else f"{hours:.3g}"
    return f"{spent} GPU-hours, " + (f"${dollars / 1e6:,.3f}M" if dollars >= 1e5 else f"${dollars:,.2f}")


def _many(tokens: float) -> str:
    return f"{tokens / 1e12:.2f}T" if tokens >= 1e10 else f"{tokens:,.0f}"


def _wall_clock(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:.1f} h" if hours < 24 else f"{hours / 24:.1f} days"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


# -------------------------------------------------------------------------------------------------------- for programs


def as_json(made: Plan) -> dict[str, Any]:
    """All numbers: bytes, seconds, hours of wall clock, GPU-hours, dollars."""
    timing = made.timing
    return {
        "name": made.config.name,
        "hardware": dataclasses.asdict(made.hardware),
        "mesh": dataclasses.asdict(made.config.mesh),
        "pipeline": dataclasses.asdict(made.config.pipeline),
        "precision": made.config.precision,
        "remat": made.config.model.remat,
        "devices": timing.devices,
        "fits": made.fits,
        "notes": list(made.notes),
        "memory": [dataclasses.asdict(part) for part in made.memory],
        "bytes_by_rank": list(made.bytes_by_rank.values()),
        "step_seconds": timing.step,
        "seconds_by_part": dict(timing.parts),
        "seconds_by_cell": dict(timing.cells),
        "bubble_by_rank": list(timing.bubble),
        "tokens_per_second": timing.tokens_per_second,
        "mfu": timing.mfu,
        "cost": dataclasses.asdict(made.cost),
    }
