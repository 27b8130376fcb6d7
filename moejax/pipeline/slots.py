"""The slots of a table: which cells start at the same time, and which values then travel between ranks.

Slots are the times at which cells start when each starts as early as it can. A transfer is made as soon as both of its
ranks are between two cells, so that neither waits for the other.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np

from moejax.pipeline.schedule import Cell, Event
from moejax.pipeline.simulate import ScheduleError, Timeline, event_of


class Move(NamedTuple):
    """A value that leaves one rank's chunk for the chunk of another rank that needs it next."""

    what: str  # x or g
    microbatch: int
    source: int
    source_chunk: int
    target: int
    target_chunk: int


class Slot(NamedTuple):
    """What starts at one time, and what is moved before the next slot."""

    cells: list[Cell]  # of each rank; () where it starts none
    moves: list[Move]


def slots_of(timeline: Timeline) -> list[Slot]:
    """A slot for every time at which a cell starts; another one where a rank would get two x, or two g, at a time."""
    times = sorted({_exact(span.start) for spans in timeline.spans for span in spans})
    number = {time: index for index, time in enumerate(times)}
    cells: list[list[Cell]] = [[()] * timeline.program.num_ranks for _ in times]
    runs = np.zeros((timeline.program.num_ranks, len(times)), bool)  # whether the rank is within a cell at that time
    started = {}
    for rank, spans in enumerate(timeline.spans):
        for start, end, cell in spans:
            first, last = number[_exact(start)], bisect_left(times, _exact(end))
            if first == last:
                raise ScheduleError(f"a cell of {timeline.program.name} takes no time: {cell[0]} of rank {rank}")
            cells[first][rank] = cell
            runs[rank, first + 1 : last] = True
            started.update({event_of(rank, op): first for op in cell})
    moves: list[list[Move]] = [[] for _ in times]  # made before the cells of that time
    for move, end in _moves(timeline):
        needed = started[Event(move.target, "F" if move.what == "x" else "B", move.target_chunk, move.microbatch)]
        possible = range(bisect_left(times, _exact(end)), needed + 1)
        meet = (at for at in possible if not runs[move.source, at] and not runs[move.target, at])
        moves[next(meet, needed)].append(move)
    slots = []
    for here, after in zip(cells, [*moves[1:], []], strict=True):
        rounds = _rounds(after)
        slots += [Slot(here, rounds[0])] + [Slot([()] * len(here), more) for more in rounds[1:]]
    return slots


def _moves(timeline: Timeline) -> Iterator[tuple[Move, float]]:
    """Every value that changes ranks, and when it is there."""
    for rank, spans in enumerate(timeline.spans):
        for _, end, cell in spans:
            for op in cell:
                target = timeline.program.sends(rank, op)
                if target is not None and target[0] != rank:
                    yield Move("x" if op.kind == "F" else "g", op.microbatch, rank, op.chunk, *target), end


def _rounds(moves: list[Move]) -> list[list[Move]]:
    """Groups of moves; in each a rank sends one x and one g at most, and receives one of each."""
    rounds: list[list[Move]] = [[]]
    taken: set[tuple] = set()
    for move in moves:
        ends = [(move.what, "from", move.source), (move.what, "to", move.target)]
        at = next(n for n in count() if not any((n, *end) in taken for end in ends))
        taken.update((at, *end) for end in ends)
        if at == len(rounds):
            rounds.append([])
        rounds[at].append(move)
    return rounds


def _exact(time: float) -> float:
    """The time without what sums of fractions in another order leave."""
    return round(time, 9)
