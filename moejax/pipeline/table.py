"""A program as the table of integers that an executor reads: slots, buffers and transfers.

The table has one row per slot and rank. In a slot every rank runs at most one cell and then takes part in at most one
transfer of activations (x) and one of their gradients (g). Slots are the times at which cells start when every cell
starts as early as it can; a transfer is made when both of its ranks are between two cells, so that neither waits for
the other and the table takes no longer than the program. Ranks that a slot's transfer does not name do not meet.

What a rank keeps lies in three pools, whose entries are given out and taken back like registers, so that each pool is
as small as the program allows:

    hidden    activations between stages, their gradients, received or to be sent, and the last stage's output until
              its B
    residual  what F leaves for B, or for I and W
    deferred  what I leaves for W

An op reads its entries before it writes any, and what it reads may be what it writes. The ops of a joined pair can be
run one after the other, or both at a time if they read everything first. A slot's transfers take everything before they
put anything. Where a column has no entry to name it has the pool's size: the hidden pool needs an entry there, which no
value outlives.
"""

import dataclasses
import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moejax.pipeline.schedule import Cell, Op, Program
from moejax.pipeline.simulate import UNIT, Costs, simulate
from moejax.pipeline.slots import Move, slots_of

Edges = tuple[tuple[int, int], ...]  # (from rank, to rank)


@dataclass(frozen=True, eq=False)
class Rows:
    """What each rank does in each slot; every array is int32 [slots, ranks].

    The columns of an op mean something only where `cell` is of a kind with that op, except `send` and `receive`.
    """

    cell: np.ndarray  # index into Table.kinds
    f_stage: np.ndarray
    f_copy: np.ndarray  # which of the rank's parameter copies: its chunk
    f_microbatch: np.ndarray  # here and below in the numbers of the whole step, [0, num_microbatches)
    f_x: np.ndarray  # hidden: F's input, unused in stage 0
    f_y: np.ndarray  # hidden: takes F's output
    f_residual: np.ndarray  # takes what F saves
    b_stage: np.ndarray  # b: B or I
    b_copy: np.ndarray
    b_microbatch: np.ndarray
    b_g: np.ndarray  # hidden: gradient of the stage's output; in the last stage the output itself
    b_x: np.ndarray  # hidden: takes the gradient of the stage's input
    b_residual: np.ndarray
    b_deferred: np.ndarray  # takes what I leaves for W
    w_stage: np.ndarray
    w_copy: np.ndarray
    w_microbatch: np.ndarray
    w_residual: np.ndarray
    w_deferred: np.ndarray
    send_x: np.ndarray  # hidden: what the slot's transfer of activations takes from here
    receive_x: np.ndarray  # hidden: where that transfer puts what comes here; the last entry where nothing does
    send_g: np.ndarray  # the same of gradients
    receive_g: np.ndarray


UNUSED = -1  # while a table is built: an entry that is never read
HIDDEN = ("f_x", "f_y", "b_g", "b_x", "send_x", "receive_x", "send_g", "receive_g")
POOL_OF = {
    **dict.fromkeys(HIDDEN, "hidden"),
    **dict.fromkeys(("f_residual", "b_residual", "w_residual"), "residual"),
    **dict.fromkeys(("b_deferred", "w_deferred"), "deferred"),
}


class Transfer(NamedTuple):
    """Which ranks send to which at the end of a slot; each rank sends and receives one of each at most."""

    x: Edges
    g: Edges


@dataclass(frozen=True, eq=False)
class Table:
    """A program, laid out in slots. Everything but `rows` is static: known when the executor is traced."""

    program: Program
    rows: Rows
    kinds: tuple[tuple[str, ...], ...]  # the kinds of a cell's ops; the first: idle
    transfers: tuple[Transfer, ...]  # the different ones that occur; the first: none
    transfer: np.ndarray  # of each slot, index into `transfers`, int32 [slots]
    num_hidden: int  # sizes of the pools
    num_residual: int
    num_deferred: int

    @property
    def num_slots(self) -> int:
        """Slots from the start of the step to its end."""
        return len(self.transfer)


def build(program: Program, costs: Costs = UNIT) -> Table:
    """Lays a program out in slots. `costs`: by which cells and transfers are timed, each above 0.

    Raises:
        ScheduleError: the program cannot run.
    """
    slots = slots_of(simulate(program, costs))
    shape = len(slots), program.num_ranks
    columns = {field.name: np.full(shape, UNUSED, np.int32) for field in dataclasses.fields(Rows)}
    registers = [_Registers(program, rank) for rank in range(program.num_ranks)]
    kinds: dict[tuple[str, ...], int] = {(): 0}
    transfers: dict[Transfer, int] = {Transfer((), ()): 0}
    transfer = np.zeros(len(slots), np.int32)
    for slot, (cells, moves) in enumerate(slots):
        for rank, cell in enumerate(cells):
            kind = tuple(op.kind for op in cell)
            row = {"cell": kinds.setdefault(kind, len(kinds))} | registers[rank].run(cell)
            for name, value in row.items():
                columns[name][slot, rank] = value
        for move in moves:
            columns[f"send_{move.what}"][slot, move.source] = registers[move.source].send(move)
        for move in moves:
            columns[f"receive_{move.what}"][slot, move.target] = registers[move.target].receive(move)
        edges = Transfer(*(tuple(sorted((m.source, m.target) for m in moves if m.what == what)) for what in "xg"))
        transfer[slot] = transfers.setdefault(edges, len(transfers))
    sizes = {pool: max(own.pools[pool].size for own in registers) for pool in ("hidden", "residual", "deferred")}
    for name, column in columns.items():
        column[column == UNUSED] = sizes[POOL_OF[name]] if name in POOL_OF else 0
    return Table(
        program=program,
        rows=Rows(**columns),
        kinds=tuple(kinds),
        transfers=tuple(transfers),
        transfer=transfer,
        **{f"num_{pool}": size for pool, size in sizes.items()},
    )


# ----------------------------------------------------------------------------------------------------------- buffers


class _Pool:
    """Entries 0, 1, ..., of which the lowest free one is given out."""

    def __init__(self) -> None:
        self.size = 0
        self.free: list[int] = []
        self.holds: dict[tuple, int] = {}

    def put(self, *value: object) -> int:
        if not self.free:
            heapq.heappush(self.free, self.size)
            self.size += 1
        self.holds[value] = heapq.heappop(self.free)
        return self.holds[value]

    def look(self, *value: object) -> int:
        return self.holds[value]

    def take(self, *value: object) -> int:
        heapq.heappush(self.free, self.holds[value])
        return self.holds.pop(value)


class _Registers:
    """The pools of one rank, and which entry holds what while the slots go by."""

    def __init__(self, program: Program, rank: int):
        self.program, self.rank = program, rank
        self.keeps = not program.is_forward_only
        self.pools = {"hidden": _Pool(), "residual": _Pool(), "deferred": _Pool()}

    def run(self, cell: Cell) -> dict[str, int]:
        """The columns of a cell."""
        row: dict[str, int] = {}
        for op in cell:
            row |= self._read(op)
            row |= self._write(op)
        return row

    def send(self, move: Move) -> int:
        return self.pools["hidden"].take("send", move.what, move.source_chunk, move.microbatch)

    def receive(self, move: Move) -> int:
        return self.pools["hidden"].put(move.what, move.target_chunk, move.microbatch)

    def _read(self, op: Op) -> dict[str, int]:
        kind, chunk, microbatch = op
        hidden, residual, deferred = self.pools.values()
        stage = self.program.stage(self.rank, chunk)
        name = {"F": "f", "W": "w"}.get(kind, "b")
        half = chunk * self.program.microbatches_per_chunk if self.program.placement == "dual" else 0
        row = {f"{name}_stage": stage, f"{name}_copy": chunk, f"{name}_microbatch": half + microbatch}
        if kind == "F":
            row["f_x"] = hidden.take("x", chunk, microbatch) if stage > 0 else UNUSED
        if kind in "BI":
            row["b_g"] = hidden.take("g", chunk, microbatch)
        if kind == "I":
            row["b_residual"] = residual.look(chunk, microbatch)
        if kind in "BW":
            row[f"{name}_residual"] = residual.take(chunk, microbatch)
        if kind == "W":
            row["w_deferred"] = deferred.take(chunk, microbatch)
        return row

    def _write(self, op: Op) -> dict[str, int]:
        kind, chunk, microbatch = op
        hidden, residual, deferred = self.pools.values()
        if kind == "W":
            return {}
        row = {}
        if kind == "F" and self.keeps:
            row["f_residual"] = residual.put(chunk, microbatch)
        if kind == "I":
            row["b_deferred"] = deferred.put(chunk, microbatch)
        what, column = ("x", "f_y") if kind == "F" else ("g", "b_x")
        target = self.program.sends(self.rank, op)
        if target is None:  # the last stage's own B reads its output; nobody the gradient of the first stage's input
            row[column] = hidden.put("g", chunk, microbatch) if kind == "F" and self.keeps else UNUSED
        elif target[0] == self.rank:
            row[column] = hidden.put(what, target[1], microbatch)
        else:
            row[column] = hidden.put("send", what, chunk, microbatch)
        return row
