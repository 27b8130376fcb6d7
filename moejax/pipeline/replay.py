"""What a table does, replayed without devices: which value lies where, and how long it takes.

Both replays read the table's numbers as an executor does, and use its program only to compare.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moejax.pipeline.schedule import Cell, Op
from moejax.pipeline.simulate import UNIT, Costs, ScheduleError, Span, StageCosts, Timeline
from moejax.pipeline.table import POOL_OF, Edges, Table, Transfer


class Value(NamedTuple):
    """A value by its name. `what`: x, input of the stage; g, gradient of its output; residual; deferred."""

    what: str
    stage: int
    microbatch: int


Pools = dict[str, list[Value | None]]  # of a rank: what lies in each entry


def check(table: Table) -> None:
    """Raises ScheduleError unless the table does what its program says.

    Every op finds its own input, residual and deferred part in the entries that it reads, at the time it reads them;
    so no transfer is late or wrong, and nothing is written over that is still needed. The two ops of a joined pair are
    of different micro-batches. Every rank runs exactly the cells of the program, in their order.
    """
    sizes = {"hidden": table.num_hidden, "residual": table.num_residual, "deferred": table.num_deferred}
    pools: list[Pools] = [{pool: [None] * (size + 1) for pool, size in sizes.items()} for _ in table.program.cells]
    for slot in range(table.num_slots):
        for rank, own in enumerate(pools):
            _run_cell(table, slot, rank, own)
        _exchange(table, slot, pools)
    for rank, cells in enumerate(table.program.cells):
        if tuple(cell for _, cell in cells_of(table, rank)) != cells:
            raise ScheduleError(f"{table.program.name}: rank {rank} does not run the cells of its program")


def execute(table: Table, costs: Costs | StageCosts = UNIT) -> Timeline:
    """When every rank runs its cells if they go through the table slot by slot.

    At the end of a slot the ranks that a transfer connects, directly or through others, wait for one another: the time
    of a send that waits for its partner, at its worst.
    """
    groups = [_connected(transfer) for transfer in table.transfers]
    cells = [dict(cells_of(table, rank)) for rank in range(table.program.num_ranks)]
    now = [0.0] * len(cells)
    spans: list[list[Span]] = [[] for _ in cells]
    for slot in range(table.num_slots):
        ready = list(now)  # to send
        for rank, own in enumerate(cells):
            if slot in own:
                cell, stages = own[slot], table.program.stages_of(rank, own[slot])
                spans[rank].append(Span(now[rank], now[rank] + costs.cell(cell, stages), cell))
                now[rank] = spans[rank][-1].end
                ready[rank] = now[rank] - costs.late(cell, stages)
        for group in groups[table.transfer[slot]]:
            together = max(ready[rank] for rank in group) + costs.send
            for rank in group:
                now[rank] = max(now[rank], together)
    return Timeline(table.program, tuple(map(tuple, spans)))


def cells_of(table: Table, rank: int) -> Iterator[tuple[int, Cell]]:
    """Slots in which the rank runs a cell, and the cell, read back from the table's numbers."""
    for slot in range(table.num_slots):
        ops = []
        for kind, stage, microbatch, _ in _ops(table, slot, rank):
            chunk = int(stage != table.program.stage(rank, 0))
            ops.append(Op(kind, chunk, microbatch % table.program.microbatches_per_chunk))
        if ops:
            yield slot, tuple(ops)


# ------------------------------------------------------------------------------------------------------------ pieces

PREFIX = {"F": "f", "B": "b", "I": "b", "W": "w"}


def _ops(table: Table, slot: int, rank: int) -> Iterator[tuple[str, int, int, int]]:
    """Kind, stage, micro-batch and parameter copy of each op of a cell."""
    for kind in table.kinds[table.rows.cell[slot, rank]]:
        stage, microbatch, copy = (
            _entry(table, slot, rank, f"{PREFIX[kind]}_{name}") for name in ("stage", "microbatch", "copy")
        )
        yield kind, stage, microbatch, copy


def _entry(table: Table, slot: int, rank: int, column: str) -> int:
    return int(getattr(table.rows, column)[slot, rank])


def _run_cell(table: Table, slot: int, rank: int, pools: Pools) -> None:
    """Compares what all ops read, as if they did so at a time, and again one op after the other."""
    ops = list(_ops(table, slot, rank))
    if len({microbatch for _, _, microbatch, _ in ops}) < len(ops):
        raise ScheduleError(f"slot {slot}: rank {rank} joins two ops of one micro-batch")
    touched = [_touched(table, rank, *op) for op in ops]
    for reads, _ in touched:
        _compare(table, slot, rank, pools, reads)
    for reads, writes in touched:
        _compare(table, slot, rank, pools, reads)
        for column, value in writes.items():
            _put(pools[POOL_OF[column]], _entry(table, slot, rank, column), value)


def _compare(table: Table, slot: int, rank: int, pools: Pools, reads: dict[str, Value]) -> None:
    for column, value in reads.items():
        found = pools[POOL_OF[column]][_entry(table, slot, rank, column)]
        if found != value:
            raise ScheduleError(f"slot {slot}: rank {rank} wants {value} in {column}, which holds {found}")


def _touched(
    table: Table, rank: int, kind: str, stage: int, microbatch: int, copy: int
) -> tuple[dict[str, Value], dict[str, Value]]:
    """The values that an op reads and writes, by the columns that say where."""
    program = table.program
    chunk = int(stage != program.stage(rank, 0))
    if (stage, copy) != (program.stage(rank, chunk), chunk):
        raise ScheduleError(f"rank {rank} has no stage {stage} in parameter copy {copy}")
    residual, deferred = (Value(what, stage, microbatch) for what in ("residual", "deferred"))
    y = Value("x", stage + 1, microbatch)
    if kind == "F":
        x = {"f_x": Value("x", stage, microbatch)} if stage > 0 else {}
        return x, {"f_y": y, "f_residual": residual}
    if kind == "W":
        return {"w_residual": residual, "w_deferred": deferred}, {}
    g = Value("g", stage, microbatch) if stage < program.num_stages - 1 else y
    writes = {"b_x": Value("g", stage - 1, microbatch)}
    return {"b_g": g, "b_residual": residual}, writes | ({"b_deferred": deferred} if kind == "I" else {})


def _exchange(table: Table, slot: int, pools: list[Pools]) -> None:
    """Moves the slot's values, all taken before any is put; a rank to which nothing is sent puts something too."""
    transfer = table.transfers[table.transfer[slot]]
    arrived: list[tuple[int, str, Value | None]] = []
    for what, edges in zip("xg", transfer, strict=True):
        sources, targets = dict(edges), {target: source for source, target in edges}
        if len(sources) < len(edges) or len(targets) < len(edges):
            raise ScheduleError(f"slot {slot}: a rank sends two {what} or receives two")
        for rank in range(len(pools)):
            value = None
            if rank in targets:
                value = pools[targets[rank]]["hidden"][_entry(table, slot, targets[rank], f"send_{what}")]
            arrived.append((rank, f"receive_{what}", value))
    for rank, column, value in arrived:
        _put(pools[rank]["hidden"], _entry(table, slot, rank, column), value)


def _put(pool: list[Value | None], entry: int, value: Value | None) -> None:
    pool[entry] = value if entry < len(pool) - 1 else None


def _connected(transfer: Transfer) -> list[set[int]]:
    """Ranks that meet in a transfer, in groups."""
    groups: list[set[int]] = []
    edges: Edges = transfer.x + transfer.g
    for edge in edges:
        touched = [group for group in groups if group & set(edge)]
        groups = [group for group in groups if group not in touched] + [set(edge).union(*touched)]
    return groups
