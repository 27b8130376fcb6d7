"""Pipeline schedules as data: what every rank runs, in which order, for a number of stages and of micro-batches.

    F     forward of one micro-batch through one stage
    B     its backward: gradients of the input and of the weights
    I, W  the two halves of B: the gradient of the input, and later that of the weights
    F&B   a forward and the backward of another micro-batch in one cell, the communication of each behind the other

A rank holds one chunk of the model, a stage, or two (`chunk` 0 and 1). Where stages lie is the program's `placement`:

    line  rank r holds stage r; micro-batches travel down, to higher ranks
    dual  DualPipe: chunk 0 of rank r is stage r; chunk 1 is a copy of stage P-1-r, through which the other half of the
          micro-batches travels up. Each half has its own numbers from 0.
    v     DualPipeV: 2D stages on D ranks; chunk 0 is stage r, chunk 1 stage 2D-1-r. Every micro-batch travels down
          through chunks 0, turns on the last rank, and comes back up.

Sources: DeepSeek-V3 report (arXiv:2412.19437) section 3.2.1, Figure 5 and Table 2; deepseek-ai/DualPipe for the order
of the eight steps; Qi et al. (arXiv:2401.10241) for ZB1P, called ZB-H1 there.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from moejax.config import ConfigError


class Op(NamedTuple):
    """One pass of one micro-batch through one chunk of a rank."""

    kind: str  # F, B, I or W
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.chunk}.{self.microbatch}"


Cell = tuple[Op, ...]  # what a rank runs as one unit: one op, the F and the B of a joined pair, or those of one pass


class Event(NamedTuple):
    """That a rank has finished an op; `kind` B stands for I too: both give the gradient of the input."""

    rank: int
    kind: str  # F, B or W
    chunk: int
    microbatch: int


@dataclass(frozen=True)
class Program:
    """Every rank's cells in their order."""

    name: str
    placement: Literal["line", "dual", "v"]
    num_microbatches: int  # of both directions together
    cells: tuple[tuple[Cell, ...], ...] = field(repr=False)  # [ranks][position]

    def __str__(self) -> str:
        """A line for each rank, as F0.3&B1.0 for micro-batch 3 of chunk 0 joined with micro-batch 0 of chunk 1."""
        return "\n".join(" ".join("&".join(map(str, cell)) for cell in cells) for cells in self.cells)

    @property
    def num_ranks(self) -> int:
        """Devices along the pipeline."""
        return len(self.cells)

    @property
    def num_stages(self) -> int:
        """Parts that the model is cut into."""
        return self.num_ranks * (2 if self.placement == "v" else 1)

    @property
    def num_chunks(self) -> int:
        """Stages that a rank holds."""
        return 1 if self.placement == "line" else 2

    @property
    def microbatches_per_chunk(self) -> int:
        """Micro-batches that pass through one chunk of a rank."""
        return self.num_microbatches // (2 if self.placement == "dual" else 1)

    @property
    def is_forward_only(self) -> bool:
        """Whether no backward occurs."""
        return all(op.kind == "F" for cells in self.cells for cell in cells for op in cell)

    def stage(self, rank: int, chunk: int) -> int:
        """The stage that is this chunk of this rank."""
        return rank if chunk == 0 else self.num_stages - 1 - rank

    def stages_of(self, rank: int, cell: Cell) -> tuple[int, ...]:
        """The stages of a cell's ops."""
        return tuple(self.stage(rank, op.chunk) for op in cell)

    def beside(self, rank: int, chunk: int, step: int) -> tuple[int, int] | None:
        """Rank and chunk of the stage `step` further along a micro-batch's way; None beyond the first or last."""
        stage = self.stage(rank, chunk) + step
        if not 0 <= stage < self.num_stages:
            return None
        if self.placement == "dual":
            return (stage, 0) if chunk == 0 else (self.num_ranks - 1 - stage, 1)
        return (stage, 0) if stage < self.num_ranks else (self.num_stages - 1 - stage, 1)

    def needs(self, rank: int, op: Op) -> list[Event]:
        """What must have happened before `rank` can run `op`."""
        kind, chunk, microbatch = op
        if kind == "W":
            return [Event(rank, "B", chunk, microbatch)]
        events = [] if kind == "F" else [Event(rank, "F", chunk, microbatch)]
        source = self.beside(rank, chunk, -1 if kind == "F" else 1)
        if source is not None:
            events.append(Event(source[0], "F" if kind == "F" else "B", source[1], microbatch))
        return events

    def sends(self, rank: int, op: Op) -> tuple[int, int] | None:
        """Rank and chunk that need the result of `op` next, which may lie on the same rank; None where none does."""
        if op.kind == "W":
            return None
        return self.beside(rank, op.chunk, 1 if op.kind == "F" else -1)


# --------------------------------------------------------------------------------------------------------- schedules


def unpiped(microbatches: int) -> Program:
    """One stage: each micro-batch passes forward and back in one cell."""
    _require_positive(1, microbatches)
    cells = tuple((Op("F", 0, microbatch), Op("B", 0, microbatch)) for microbatch in range(microbatches))
    return Program("unpiped", "line", microbatches, (cells,))


def gpipe(stages: int, microbatches: int) -> Program:
    """GPipe: all forwards, then all backwards (Huang et al., arXiv:1811.06965)."""
    _require_positive(stages, microbatches)
    words = ["F0"] * microbatches + ["B0"] * microbatches
    return _line("gpipe", microbatches, [words] * stages)


def one_f_one_b(stages: int, microbatches: int) -> Program:
    """1F1B: a rank runs ahead by as many forwards as there are ranks after it, then alternates."""
    _require_positive(stages, microbatches)
    ranks = []
    for rank in range(stages):
        ahead = min(stages - 1 - rank, microbatches)
        ranks.append(["F0"] * ahead + ["F0", "B0"] * (microbatches - ahead) + ["B0"] * ahead)
    return _line("one_f_one_b", microbatches, ranks)


def zb1p(stages: int, microbatches: int) -> Program:
    """ZB1P: 1F1B with B in halves; rank r puts off W until r + 1 wait, and fills the end of the step with them."""
    _require_positive(stages, microbatches)
    ranks = []
    for rank in range(stages):
        ahead = min(stages - 1 - rank, microbatches)
        words = ["F0"] * ahead
        for done in range(microbatches):
            words += ["F0"] * (done < microbatches - ahead) + ["I0"] + ["W"] * (done >= rank)
        ranks.append(words + ["W"] * min(rank, microbatches))
    return _line("zb1p", microbatches, ranks)


def dualpipe(stages: int, microbatches: int) -> Program:
    """DualPipe (section 3.2.1): half of the micro-batches enters at either end, on two copies of the parameters.

    Raises:
        ConfigError: stages are odd, or micro-batches are odd or fewer than 2 * stages.
    """
    _require_even_stages(stages)
    least = 2 * stages
    if microbatches < least or microbatches % 2:
        near = sorted({max(least, microbatches - 1), max(least, microbatches + 1)})
        wanted = f"an even number, at least 2 * stages = {least}; the nearest: {' or '.join(map(str, near))}"
        raise ConfigError("microbatches", microbatches, wanted)
    ranks = []
    for rank in range(stages):
        words = dualpipe_words(min(rank, stages - 1 - rank), stages // 2, microbatches // 2)
        ranks.append(_numbered(words, flip=rank >= stages // 2))
    return Program("dualpipe", "dual", microbatches, tuple(ranks))


def dualpipe_v(stages: int, microbatches: int) -> Program:
    """DualPipeV: the upper half of DualPipe's ranks with the two directions joined; stages / 2 ranks, one copy.

    Raises:
        ConfigError: stages are odd, or micro-batches are fewer than stages.
    """
    _require_even_stages(stages)
    if microbatches < stages:
        raise ConfigError("microbatches", microbatches, f"at least as many as stages; the nearest: {stages}")
    ranks = [_numbered(dualpipe_words(rank, stages // 2, microbatches)) for rank in range(stages // 2)]
    return Program("dualpipe_v", "v", microbatches, tuple(ranks))


def dualpipe_words(h: int, half: int, microbatches: int) -> list[str]:
    """The eight steps of one rank in the notation of deepseek-ai/DualPipe.

    The digit is a phase: 0 is the direction in which the nearer end of the pipeline feeds micro-batches. Ranks r and
    P-1-r thus run the same words. W is the oldest weight gradient that was put off.

    Args:
        h: ranks between this one and the nearer end.
        half: half the number of ranks.
        microbatches: of one direction.
    """
    inner, outer = half - h - 1, h + 1  # ranks of this half further in, and those from its end to here
    is_middle = inner == 0
    words = ["F0"] * (2 * inner)  # step 1
    words += ["F0", "F1"] * outer  # 2
    words += ["I1", "W", "F1"] * inner  # 3
    words += ["F0", "B1", "F1&B0"] if is_middle else ["F0&B1", "F1&B0"]  # 4: the middle's first pair is not joined
    words += ["F0&B1", "F1&B0"] * (microbatches - 2 * half + h)
    words += ["B1", "F1&B0"] * inner  # 5
    words += [f"{'B' if i < outer else 'I'}{1 - i % 2}" for i in range(2 * outer)]  # 6: W is put off from half way on
    words += ["W", "I0"] * inner  # 7
    words += ["W"] * outer  # 8
    return words


SCHEDULES: dict[str, Callable[[int, int], Program]] = {
    "gpipe": gpipe,
    "one_f_one_b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipe_v": dualpipe_v,
}


@functools.lru_cache(maxsize=64)
def named(name: str, stages: int, microbatches: int, *, max_deferred_w: int | None = None) -> Program:
    """The schedule of that name, at most `max_deferred_w` weight gradients put off.

    Raises:
        ConfigError: there is no such schedule, or it does not exist for these numbers.
    """
    if name not in SCHEDULES:
        raise ConfigError("schedule", name, f"one of {', '.join(SCHEDULES)}")
    return bounded(SCHEDULES[name](stages, microbatches), max_deferred_w)


# ---------------------------------------------------------------------------------------------------------- variants


def bounded(program: Program, max_deferred_w: int | None) -> Program:
    """The program with at most `max_deferred_w` weight gradients put off on a rank at any time; None: unchanged.

    An I that would be one too many comes after the W of the oldest, and the W that the program has later is then the
    next oldest's. With 0 every I and W is a B.
    """
    if max_deferred_w is None:
        return program
    if max_deferred_w < 0:
        raise ConfigError("max_deferred_w", max_deferred_w, "0 or more")
    cells = []
    for before in program.cells:
        after: list[Cell] = []
        waiting: deque[Op] = deque()
        for cell in before:
            kind, chunk, microbatch = cell[0]
            if kind == "I" and max_deferred_w == 0:
                after.append((Op("B", chunk, microbatch),))
                continue
            if kind == "W" or (kind == "I" and len(waiting) == max_deferred_w):
                after += [(waiting.popleft(),)] if waiting else []
            if kind == "I":
                waiting.append(Op("W", chunk, microbatch))
            if kind != "W":
                after.append(cell)
        cells.append(tuple(after))
    return replace(program, cells=tuple(cells))


def forward_only(program: Program) -> Program:
    """The program's forwards in their order, for evaluation."""
    cells = [[tuple(op for op in cell if op.kind == "F") for cell in cells] for cells in program.cells]
    return replace(program, cells=tuple(tuple(cell for cell in rank if cell) for rank in cells))


# ------------------------------------------------------------------------------------------------------------ pieces


def _line(name: str, microbatches: int, ranks: Iterable[list[str]]) -> Program:
    return Program(name, "line", microbatches, tuple(_numbered(words) for words in ranks))


def _numbered(words: list[str], *, flip: bool = False) -> tuple[Cell, ...]:
    """Gives each op its chunk and micro-batch: in order of each chunk's F, of its B or I, and first put off of W.

    `flip`: phase 0 of the words is chunk 1.
    """
    counts: dict[tuple[str, int], int] = {}
    put_off: deque[Op] = deque()
    cells = []
    for word in words:
        ops = []
        for part in word.split("&"):
            if part == "W":
                ops.append(put_off.popleft())
                continue
            kind, chunk = part[0], int(part[1]) ^ flip
            pass_ = "F" if kind == "F" else "B", chunk
            microbatch = counts.get(pass_, 0)
            counts[pass_] = microbatch + 1
            ops.append(Op(kind, chunk, microbatch))
            if kind == "I":
                put_off.append(Op("W", chunk, microbatch))
        cells.append(tuple(ops))
    return tuple(cells)


def _require_positive(stages: int, microbatches: int) -> None:
    for place, value in (("stages", stages), ("microbatches", microbatches)):
        if value < 1:
            raise ConfigError(place, value, "1 or more")


def _require_even_stages(stages: int) -> None:
    if stages < 2 or stages % 2:
        near = sorted({max(2, stages - 1), max(2, stages + 1)})
        raise ConfigError("stages", stages, f"an even number; the nearest: {' or '.join(map(str, near))}")
