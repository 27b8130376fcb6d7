"""Runs a table inside `jax.shard_map`: one scan over its slots, whatever the schedule.

In a slot a rank runs the cell that the table names for it. Each kind of cell stands behind a loop of no or one trip,
which works in place where a branch would copy all that the ranks keep; so in a cell only collectives over axes on which
the table is the same may stand. The transfers between ranks stand outside of the cells: which ranks meet depends on the
slot alone. What a joined cell leaves for later, weights' gradients of one layer, is computed between the start and the
end of the transfers that most joined cells end with (DualPipe's two of the steady state).
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moejax.pipeline.carry import JOINED, Carry, Outcome, Row, recorded
from moejax.pipeline.cells import Cells
from moejax.pipeline.pools import get, put, varying, when
from moejax.pipeline.table import Edges, Table, Transfer
from moejax.pipeline.whole import WholePasses


def run(table: Table, rows: Row, cells: Cells | WholePasses, keep_record: bool = False) -> Outcome:
    """The gradients and sums of all micro-batches.

    Args:
        table: the static part of the schedule.
        rows: its columns of this rank, int32 [slots].
        cells: what runs those that the table names: of stages, or without any.
        keep_record: whether `Outcome.ran` is to say what ran.
    """
    rows, transfer = varying(rows), jnp.asarray(table.transfer)
    slots = jnp.arange(table.num_slots)
    present = [index for index, kind in enumerate(table.kinds) if kind]
    between = _between(table, cells) if isinstance(cells, Cells) else None
    only = present[0] if (table.rows.cell == present[0]).all() else None  # then nothing depends on the slot

    def slot(carry: Carry, this: tuple[Row, Array, Array]) -> tuple[Carry, None]:
        row, transfer, number = this
        for index in present:

            def cell(carry: Carry, z: Array, kind: tuple[str, ...] = table.kinds[index]) -> Carry:
                own = jax.tree.map(lambda column: column + z, row)
                carry = recorded(carry, kind, own, number + z) if keep_record else carry
                return cells.run(kind, carry, own)

            carry = cell(carry, jnp.zeros_like(row.cell)) if index == only else when(row.cell == index, cell, carry)
        return between(carry, row, transfer) if between else carry, None

    record = jnp.zeros((table.num_slots if keep_record else 0, 2, 3), jnp.int32)
    return lax.scan(slot, cells.start(record), (rows, transfer, slots))[0].outcome


def _between(table: Table, cells: Cells) -> Callable[[Carry, Row, Array], Carry]:
    """What stands between two slots: transfers, and what joined cells have left."""
    joined = table.kinds.index(JOINED) if JOINED in table.kinds else -1
    beside = _ends_of_joined(table, joined)

    def late(carry: Carry, row: Row, condition: Array) -> Carry:
        return when(condition, lambda carry, z: cells.late(carry, jax.tree.map(lambda c: c + z, row)), carry)

    def between(carry: Carry, row: Row, transfer: Array) -> Carry:
        if joined > 0:
            is_beside = jnp.asarray([index in beside for index in range(len(table.transfers))])[transfer]
            carry = late(carry, row, (row.cell == joined) & ~is_beside)
        got = tuple(jnp.zeros_like(get(carry.hidden, row.send_x)) for _ in "xg")
        for index in beside:
            edges = table.transfers[index]
            always = bool((table.rows.cell[table.transfer == index] == joined).all())  # on all ranks

            def exchange(state: tuple, z: Array, edges: Transfer = edges, always: bool = always) -> tuple:
                own = jax.tree.map(lambda column: column + z, row)
                got = _moved(edges, state[1].hidden, own, state[0])
                left = cells.late(state[1], own) if always else late(state[1], own, own.cell == joined)
                return got, left

            got, carry = when(transfer == index, exchange, (got, carry))
        others = (Transfer((), ()) if index in beside else edges for index, edges in enumerate(table.transfers))
        x, g = lax.switch(transfer, [functools.partial(_moved, edges) for edges in others], carry.hidden, row, got)
        return dataclasses.replace(carry, hidden=put(put(carry.hidden, x, row.receive_x), g, row.receive_g))

    return between


def _ends_of_joined(table: Table, joined: int) -> list[int]:
    """The two transfers that most joined cells end with."""
    cells = Counter[int]()
    for transfer, row in zip(table.transfer.tolist(), table.rows.cell, strict=True):
        cells[transfer] += int((row == joined).sum())
    return [index for index, count in cells.most_common() if index and count][:2]


def _moved(edges: Transfer, hidden: Array, row: Row, else_: tuple[Array, Array]) -> tuple[Array, Array]:
    """What comes to this rank; `else_`: what is returned where nothing is sent to any."""

    def move(place: Array, edges: Edges, else_: Array) -> Array:
        return lax.ppermute(get(hidden, place), "pipe", list(edges)) if edges else else_

    return move(row.send_x, edges.x, else_[0]), move(row.send_g, edges.g, else_[1])
