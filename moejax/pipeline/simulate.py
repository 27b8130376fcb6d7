"""What a program costs: time, bubble, activations in flight, weight gradients put off; and whether it can run at all.

Times are in any unit. A cell starts when its rank is free and everything that it needs has happened and arrived.
"""

import dataclasses
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moejax.config import ConfigError
from moejax.pipeline.schedule import Cell, Event, Op, Program


class ScheduleError(Exception):
    """A program cannot run, or a table does not do what its program says."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """How long things take. The default is Figure 5's: F = I = W, and joining saves nothing."""

    F: float = 1.0
    I: float = 1.0  # noqa: E741
    W: float = 1.0
    B: float | None = None  # None: I + W
    FB: float | None = None  # a joined pair; None: F + B
    send: float = 0.0  # from one rank to another

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not (0 < value < math.inf or (name == "send" and value == 0)):
                raise ConfigError(f"costs.{name}", value, "a time above 0")

    @classmethod
    def parsed(cls, words: Iterable[str]) -> "Costs":
        """The costs that words such as F=1 or send=0.1 set; the others have their defaults."""
        values = {}
        for word in words:
            name, _, value = word.partition("=")
            try:
                values[name] = float(value)
            except ValueError as error:
                raise ConfigError("costs", word, "KIND=TIME, as in F=1.5") from error
        return cls.of(values)

    @classmethod
    def of(cls, values: Mapping[str, float]) -> "Costs":
        """The costs by their names; the others have their defaults."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values.keys() - names:
            raise ConfigError("costs", name, f"one of {', '.join(names)}")
        return cls(**values)

    @property
    def full_backward(self) -> float:
        """Time of B."""
        return self.I + self.W if self.B is None else self.B

    @property
    def joined(self) -> float:
        """Time of F&B."""
        return self.F + self.full_backward if self.FB is None else self.FB

    def late(self, cell: Cell, stages: tuple[int, ...] = ()) -> float:
        """Of a cell's time the end, for which no other rank waits: none."""
        return 0.0

    def cell(self, cell: Cell, stages: tuple[int, ...] = ()) -> float:
        """Time of a cell, whatever its stages; of an idle one, (), 0."""
        if len(cell) == 2:
            return self.joined
        return sum({"F": self.F, "I": self.I, "W": self.W, "B": self.full_backward}[op.kind] for op in cell)


UNIT = Costs()


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """How long things take where stages differ."""

    single: Mapping[tuple[str, int], float]  # of a kind and a stage
    joined: Mapping[tuple[int, int], float]  # of a pair: the stage of its F, and of its B
    after: Mapping[tuple[int, int], float]  # of a pair: what of its time comes after its results, which leave before
    send: float = 0.0  # from one rank to another

    def late(self, cell: Cell, stages: tuple[int, ...]) -> float:
        """Of a cell's time the end, for which no other rank waits."""
        return self.after[stages[0], stages[1]] if len(cell) == 2 else 0.0

    def cell(self, cell: Cell, stages: tuple[int, ...]) -> float:
        """Time of a cell whose ops are of these stages; of an idle one 0."""
        if len(cell) == 2:
            return self.joined[stages[0], stages[1]]
        return sum(self.single[op.kind, stage] for op, stage in zip(cell, stages, strict=True))


class Span(NamedTuple):
    """A cell and when it ran."""

    start: float
    end: float
    cell: Cell


@dataclass(frozen=True)
class Timeline:
    """When every rank ran its cells."""

    program: Program
    spans: tuple[tuple[Span, ...], ...] = field(repr=False)  # [ranks][position]

    @property
    def makespan(self) -> float:
        """Time until the last cell of any rank has ended."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def bubble(self) -> np.ndarray:
        """Time that each rank idles within the makespan, [ranks]."""
        busy = [sum(end - start for start, end, _ in spans) for spans in self.spans]
        return self.makespan - np.array(busy)


def simulate(program: Program, costs: Costs | StageCosts = UNIT) -> Timeline:
    """Runs every cell as soon as it can.

    Raises:
        ScheduleError: the program does not pass `check`, or ranks wait for each other for ever.
    """
    check(program)
    ended: dict[Event, float] = {}
    spans: list[list[Span]] = [[] for _ in program.cells]
    asleep: dict[Event, list[int]] = {}
    awake = deque(range(program.num_ranks))
    while awake:
        rank = awake.popleft()
        for cell in program.cells[rank][len(spans[rank]) :]:
            own = [event_of(rank, op) for op in cell]
            needs = [event for op in cell for event in program.needs(rank, op) if event not in own]
            missing = next((event for event in needs if event not in ended), None)
            if missing is not None:
                asleep.setdefault(missing, []).append(rank)
                break
            arrived = [ended[event] + (costs.send if event.rank != rank else 0.0) for event in needs]
            start = max([spans[rank][-1].end if spans[rank] else 0.0, *arrived])
            stages = program.stages_of(rank, cell)
            spans[rank].append(Span(start, start + costs.cell(cell, stages), cell))
            for event in own:
                ended[event] = spans[rank][-1].end - costs.late(cell, stages)
                awake.extend(asleep.pop(event, ()))
    if asleep:
        waits = (
            f"rank {rank} for {event.kind}{event.chunk}.{event.microbatch} of rank {event.rank}"
            for event, ranks in asleep.items()
            for rank in ranks
        )
        raise ScheduleError(f"{program.name}: ranks wait for ever: {', '.join(waits)}")
    return Timeline(program, tuple(map(tuple, spans)))


def event_of(rank: int, op: Op) -> Event:
    """What has happened when `rank` has run `op`."""
    return Event(rank, "B" if op.kind == "I" else op.kind, op.chunk, op.microbatch)


def check(program: Program) -> None:
    """Raises ScheduleError unless every micro-batch has F, and B or I and W, once on each stage.

    A program without any backward needs F only. In a cell of two F comes first, and its partner is a B.
    """
    forward_only = program.is_forward_only
    for rank, cells in enumerate(program.cells):
        for cell in cells:
            if "".join(op.kind for op in cell) not in ("F", "B", "I", "W", "FB"):
                raise ScheduleError(f"{program.name}: rank {rank} has the cell {' '.join(map(str, cell))}")
        count = Counter(op for cell in cells for op in cell)
        for chunk in range(program.num_chunks):
            for microbatch in range(program.microbatches_per_chunk):
                passes = tuple(count.pop(Op(kind, chunk, microbatch), 0) for kind in "FBIW")
                if passes not in ([(1, 0, 0, 0)] if forward_only else [(1, 1, 0, 0), (1, 0, 1, 1)]):
                    times = " ".join(f"{kind}x{number}" for kind, number in zip("FBIW", passes, strict=True))
                    raise ScheduleError(f"{program.name}: rank {rank} runs {chunk}.{microbatch} as {times}")
        if count:
            raise ScheduleError(f"{program.name}: rank {rank} runs {', '.join(map(str, count))}, of no micro-batch")


# ------------------------------------------------------------------------------------------------------------ memory


def activations(program: Program) -> np.ndarray:
    """Most micro-batches on each rank whose F has started and whose B or I has not ended, chunks added up, [ranks]."""
    return _peak(program, first="F", last="BI")


def deferred_w(program: Program) -> np.ndarray:
    """Most weight gradients put off on each rank at any time, [ranks]."""
    return _peak(program, first="I", last="W")


def _peak(program: Program, first: str, last: str) -> np.ndarray:
    peaks = np.zeros(program.num_ranks, int)
    for rank, cells in enumerate(program.cells):
        held = 0
        for cell in cells:
            held += sum(op.kind in first for op in cell)
            peaks[rank] = max(peaks[rank], held)
            held -= sum(op.kind in last for op in cell)
    return peaks


# ---------------------------------------------------------------------------------------------------- published values


def published_bubble(name: str, stages: int, costs: Costs = UNIT) -> float:
    """Bubble of a rank by Table 2 of the DeepSeek-V3 report; GPipe's, which is not in it, equals 1F1B's."""
    F, B, W, FB = costs.F, costs.full_backward, costs.W, costs.joined
    match name:
        case "gpipe" | "one_f_one_b":
            return (stages - 1) * (F + B)
        case "zb1p":
            return (stages - 1) * (F + B - 2 * W)
        case "dualpipe" | "dualpipe_v":
            return (stages / 2 - 1) * (FB + B - 3 * W)
    raise ValueError(f"Table 2 does not have {name}")


def published_activations(name: str, stages: int, microbatches: int) -> int:
    """Activations on a rank by Table 2, at most as many as there are micro-batches; GPipe's are all."""
    match name:
        case "gpipe":
            return microbatches
        case "one_f_one_b" | "zb1p":
            return min(stages, microbatches)
        case "dualpipe" | "dualpipe_v":
            return stages + 1
    raise ValueError(f"Table 2 does not have {name}")
