"""The cheapest ways to train a model on so many devices: meshes, micro-batches, schedules, recompute, precision.

Every candidate is checked as a run's settings are, then ordered by a time that it cannot beat, its busiest rank's. From
the fastest on, memory and the simulated schedule decide, until ten fit that nothing left can beat.
"""

import dataclasses
import functools
import heapq
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from moejax.config import ConfigError, RunConfig
from moejax.mesh import resolve
from moejax.pipeline.layout import lay_out
from moejax.pipeline.schedule import Program
from moejax.pipeline.simulate import activations, simulate
from moejax.pipeline.stages import program_of, require_pipeline
from moejax.plan.hardware import Hardware
from moejax.plan.memory import memory
from moejax.plan.plan import ROOM
from moejax.plan.time import Cells
from moejax.plan.weights import weights_of
from moejax.plan.work import kept_bytes

SCHEDULES = ("dualpipe", "dualpipe_v", "one_f_one_b", "zb1p")
WANTED, MISSES = 10, 5
SMALL = "does not fit in memory"


@dataclass(frozen=True)
class Found:
    """A plan that fits, or one that is fast and does not."""

    config: RunConfig
    step: float  # seconds
    bytes: float  # of the fullest device
    tokens_per_second: float  # of one device
    dollars_per_trillion: float  # tokens

    @property
    def label(self) -> dict[str, Any]:
        """What is different from other plans, in the words of the command line."""
        mesh, pipeline = self.config.mesh, self.config.pipeline
        return {
            "mesh.pipe": mesh.pipe,
            "mesh.data": mesh.data,
            "mesh.expert": mesh.expert,
            "mesh.expert-nodes": mesh.expert_nodes,
            "mesh.sharding": mesh.sharding,
            "pipeline.schedule": pipeline.schedule if mesh.pipe > 1 else "",
            "pipeline.microbatches": pipeline.num_microbatches,
            "model.remat": self.config.model.remat,
            "precision": self.config.precision,
        }


@dataclass(frozen=True)
class Search:
    """What a search has found."""

    hardware: Hardware
    devices: int
    candidates: int
    best: tuple[Found, ...]  # cheapest first
    misses: tuple[Found, ...]  # the fastest that do not fit
    rejected: dict[str, int]  # reason, and how many


def search(config: RunConfig, hardware: Hardware, devices: int) -> Search:
    """The ten cheapest plans of a model and a batch on so many devices.

    What saves memory costs time (computing again, FSDP), and is tried only where a plan does not fit without it.

    Raises:
        ConfigError: nothing fits; the line says what came nearest.
    """
    rejected: Counter[str] = Counter()
    queue: list[tuple[float, int, RunConfig]] = []
    numbers, tried = itertools.count(), 0

    def enter(valid: RunConfig) -> None:
        nonlocal tried
        tried += 1
        if _least_bytes(valid) <= ROOM * hardware.memory:
            heapq.heappush(queue, (_bound(valid, hardware), next(numbers), valid))
        else:
            rejected[SMALL] += 1
            for smaller in _smaller(valid):
                enter(smaller)

    for given in _candidates(config, devices):
        valid = _checked(config, given, devices, rejected)
        if valid is not None:
            enter(valid)
    best: list[Found] = []
    misses: list[Found] = []
    sizes = _Sizes()
    while queue and (len(best) < WANTED or queue[0][0] < best[WANTED - 1].step):
        bound, _, valid = heapq.heappop(queue)
        size = sizes.of(valid, ROOM * hardware.memory)
        if size > ROOM * hardware.memory:
            rejected[SMALL] += 1
            misses.append(_found(valid, hardware, devices, bound, size))
            for smaller in _smaller(valid):
                enter(smaller)
            continue
        step = _step(valid, hardware)
        best = sorted([*best, _found(valid, hardware, devices, step, size)], key=lambda found: found.step)
    rejected["slower than the ten best"] += len(queue) + max(len(best) - WANTED, 0)
    if not best:
        raise ConfigError("--search", devices, _nearest(misses))
    total = tried + rejected.total() - rejected[SMALL] - rejected["slower than the ten best"]
    return Search(hardware, devices, total, tuple(best[:WANTED]), tuple(misses[:MISSES]), dict(+rejected))


def _smaller(config: RunConfig) -> list[RunConfig]:
    """The next plans that need less memory and more time."""
    found = []
    for remat, more in itertools.pairwise(("none", "cheap", "full")):
        if config.model.remat == remat:
            found.append(dataclasses.replace(config, model=dataclasses.replace(config.model, remat=more)))  # type: ignore[arg-type]
    if config.model.remat == "none" and config.mesh.sharding == "zero1" and config.mesh.gather_axes:
        found.append(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sharding="fsdp")))
    return found


def _nearest(misses: list[Found]) -> str:
    """What is wanted where nothing fits."""
    least = min(misses, key=lambda miss: miss.bytes, default=None)
    if least is None:
        return "more devices or more memory: not even the weights fit, or no mesh divides the batch and the model"
    words = " ".join(f"--{name} {value}" for name, value in least.label.items() if value)
    return f"more devices or more memory: the least is {least.bytes / 1e9:.1f} GB a device, with {words}"


# -------------------------------------------------------------------------------------------------------- candidates


def _candidates(config: RunConfig, devices: int) -> Iterator[dict[str, Any]]:
    """Settings of plans, of those that are like but for memory the fastest; not all of them are valid."""
    for pipe, expert in itertools.product(_divisors(devices), _divisors(devices)):
        if devices % (pipe * expert) or config.model.moe.num_experts % expert:
            continue
        mesh = {"pipe": pipe, "replica": 1, "data": devices // (pipe * expert), "expert": expert}
        mesh |= {"expert_nodes": max(1, expert // 8)}
        schedules = SCHEDULES if pipe > 1 else ("dualpipe",)
        for schedule, rows, precision in itertools.product(schedules, (1, 2, 4), ("bf16", "fp8")):
            yield {"mesh": mesh, "schedule": schedule, "rows": rows, "precision": precision}


def _checked(config: RunConfig, given: dict[str, Any], devices: int, rejected: Counter[str]) -> RunConfig | None:
    """The run of a candidate; None, and the reason counted, where its settings are not valid."""
    mesh = given["mesh"]
    batch = given["rows"] * mesh["data"] * mesh["expert"]
    if config.data.batch_size % batch:
        rejected["the batch does not divide over the mesh"] += 1
        return None
    pipeline = {"schedule": given["schedule"], "layers": None, "microbatches": config.data.batch_size // batch}
    try:
        made = dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, sharding="zero1", **mesh),
            pipeline=dataclasses.replace(config.pipeline, **pipeline),
            model=dataclasses.replace(config.model, remat="none"),
            precision=given["precision"],
            schedule=dataclasses.replace(config.schedule, ramp_start=None),
        )
        made = resolve(made, devices)
        require_pipeline(made, [made.data.batch_size])
    except ConfigError as error:
        rejected[_reason(error)] += 1
        return None
    return made


def _reason(error: ConfigError) -> str:
    """Why settings are not valid, without the numbers."""
    if error.place == "pipeline.microbatches":
        return "too few micro-batches for the schedule"
    if error.place == "mesh.pipe":
        return "too many stages, or stages that the schedule cannot have"
    return f"{error.place} does not divide over the mesh"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


# ---------------------------------------------------------------------------------------------------------- judgement


def _bound(config: RunConfig, hardware: Hardware) -> float:
    """Seconds that a step takes at least: those of the rank with most to do."""
    cells = Cells(config, hardware)
    ranks = (sum(n * cells.of(*cell).total() for cell, n in own.items()) for own in _cells_of(program_of(config)))
    return max(ranks) + cells.outside().total()


def _step(config: RunConfig, hardware: Hardware) -> float:
    """Seconds of a step, of cells that start as soon as they can: within a few percent of the table's replay."""
    cells, program = Cells(config, hardware), program_of(config)
    return simulate(program, cells.costs(program)).makespan + cells.outside().total()


@functools.lru_cache(maxsize=256)
def _cells_of(program: Program) -> list[Counter[tuple[tuple[str, ...], tuple[int, ...]]]]:
    """How often each rank runs a cell of the same kinds and stages."""
    return [
        Counter((tuple(op.kind for op in cell), program.stages_of(rank, cell)) for cell in cells)
        for rank, cells in enumerate(program.cells)
    ]


def _least_bytes(config: RunConfig) -> float:
    """Of the training state, the weights and gradients of the stages in use, and what passes leave for each other."""
    piped, cfg = config.mesh.pipe > 1, config.optimizer
    state = 4 + 2 * (2 if cfg.moments == "bf16" else 4) + (4 if cfg.ema_decay else 0)
    program = program_of(config)
    copies = 2 if program.placement == "dual" else 1
    total = 0.0
    for weight in weights_of(config):
        own = weight.layers / config.mesh.pipe if weight.part == "moe_blocks" else weight.layers
        total += state * own * weight.shard
        if weight.part == "moe_blocks" and config.mesh.sharding == "zero1":
            total += copies * own * weight.whole * (weight.use_bytes + 4)  # gradients are float32
    return total + (max(lay_out(config).layers) * _in_flight(program) * kept_bytes(config) if piped else 0.0)


@functools.lru_cache(maxsize=256)
def _in_flight(program: Program) -> int:
    return int(activations(program).max())


class _Sizes:
    """Bytes of the fullest device. What a layer's passes need while they run is traced, which takes seconds."""

    def __init__(self) -> None:
        self.beyond: dict[tuple[str, ...], list[tuple[int, float]]] = {}  # of like layers: rows, bytes above the least

    def of(self, config: RunConfig, limit: float) -> float:
        """Exact, unless four fifths of what like layers need are too much already; then about as much as it is.

        Like are layers of the same sharding, recompute and precision, on no more rows.
        """
        rows = config.rows_of_microbatch // config.mesh.batch_shards
        known = self.beyond.setdefault((config.mesh.sharding, config.model.remat, config.precision), [])
        least = _least_bytes(config)
        about = least + 0.8 * min((beyond for fewer, beyond in known if fewer <= rows), default=0.0)
        if about > limit:
            return about
        held: Counter[int] = Counter()
        for part in memory(config):
            held[part.rank] += part.bytes
        known.append((rows, max(held.values()) - least))
        return max(held.values())


def _found(config: RunConfig, hardware: Hardware, devices: int, step: float, size: float) -> Found:
    tokens = config.data.batch_size * config.data.sequence_length
    price = devices * step * hardware.dollars_per_hour / 3600
    return Found(config, step, size, tokens / step / devices, price / tokens * 1e12)


# ------------------------------------------------------------------------------------------------------------- results


def as_table(found: Search) -> Group:
    """The best plans, the fastest that do not fit, and why the others are not there."""
    title = f"{found.candidates:,} plans on {found.devices} {found.hardware.name}; the cheapest that fit"
    reasons = [f"{count:>7,} {reason}" for reason, count in sorted(found.rejected.items(), key=lambda r: -r[1])]
    misses: list[Any] = ["", "fastest that do not fit, with the least time they take", "", _plans(found.misses)]
    return Group(title, "", _plans(found.best), *(misses if found.misses else []), "", *reasons)


def _plans(plans: tuple[Found, ...]) -> Table:
    table = Table(box=None)
    headings = ("pipe", "data", "expert", "nodes", "sharding", "schedule", "micro-batches", "remat", "precision")
    for heading in (*headings, "GB", "step, s", "tokens/s per GPU", "$M per 1T tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in plans:
        numbers = (f"{one.bytes / 1e9:.1f}", f"{one.step:.4g}", f"{one.tokens_per_second:,.0f}")
        table.add_row(*map(str, one.label.values()), *numbers, f"{one.dollars_per_trillion / 1e6:.3g}")
    return table


def as_json(found: Search) -> dict[str, Any]:
    """The same; bytes, seconds, dollars."""

    def plans(those: tuple[Found, ...]) -> list[dict[str, Any]]:
        numbers = ("step", "bytes", "tokens_per_second", "dollars_per_trillion")
        return [one.label | {name: getattr(one, name) for name in numbers} for one in those]

    return {
        "hardware": found.hardware.name,
        "devices": found.devices,
        "candidates": found.candidates,
        "best": plans(found.best),
        "misses": plans(found.misses),
        "rejected": found.rejected,
    }
