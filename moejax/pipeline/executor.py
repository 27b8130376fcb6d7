"""Runs a table inside `jax.shard_map`: one scan over its slots, whatever the schedule.

In a slot a rank runs the cell that the table names for it. Each kind of cell stands behind a loop of no or one trip,
which works in place where a branch would copy all that the ranks keep; so in a cell only collectives over axes on which
the table is the same may stand. The transfers between ranks stand outside of the cells: which ranks meet depends on the
slot alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moejax.pipeline.cells import Carry, Cells, Outcome, Row, Work, recorded
from moejax.pipeline.pools import get, put, varying, when
from moejax.pipeline.table import Edges, Table


def run(table: Table, rows: Row, work: Work, stack: Any, extras: Any, x: Array, keep_record: bool = False) -> Outcome:
    """The gradients and sums of all micro-batches.

    Args:
        table: the static part of the schedule.
        rows: its columns of this rank, int32 [slots].
        work: the functions of the model.
        stack: the weights of all parameter copies' layers that this rank holds, [copies x most layers of a stage, ...],
            varying over every mesh axis. A stage that has fewer layers uses the first places.
        extras: the weights that `enter` and `leave` read, varying likewise.
        x: an array like those between the stages.
        keep_record: whether `Outcome.ran` is to say what ran.
    """
    cells = Cells(table, work, stack, extras, x)
    rows, transfer = varying(rows), jnp.asarray(table.transfer)
    slots = jnp.arange(table.num_slots)
    present = [index for index, kind in enumerate(table.kinds) if kind]

    def slot(carry: Carry, this: tuple[Row, Array, Array]) -> tuple[Carry, None]:
        row, transfer, number = this
        for index in present:

            def cell(carry: Carry, z: Array, kind: tuple[str, ...] = table.kinds[index]) -> Carry:
                own = jax.tree.map(lambda column: column + z, row)
                carry = recorded(carry, kind, own, number + z) if keep_record else carry
                return cells.run(kind, carry, own)

            carry = when(row.cell == index, cell, carry)
        return dataclasses.replace(carry, hidden=_transferred(table, transfer, carry.hidden, row)), None

    return lax.scan(slot, cells.start(x, keep_record), (rows, transfer, slots))[0].outcome


def _transferred(table: Table, transfer: Array, hidden: Array, row: Row) -> Array:
    """The pool after a slot's transfers: every rank reads what it sends before it writes what it gets."""

    def move(value: Array, edges: Edges) -> Array:
        return lax.ppermute(value, "pipe", list(edges)) if edges else jnp.zeros_like(value)

    def branch(x_edges: Edges, g_edges: Edges) -> Callable[[Array, Array], tuple[Array, Array]]:
        return lambda x, g: (move(x, x_edges), move(g, g_edges))

    branches = [branch(*edges) for edges in table.transfers]
    x, g = lax.switch(transfer, branches, get(hidden, row.send_x), get(hidden, row.send_g))
    return put(put(hidden, x, row.receive_x), g, row.receive_g)
