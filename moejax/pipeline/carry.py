"""What cells are given, what they keep from slot to slot, and what comes of them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.pipeline.pools import put
from moejax.pipeline.table import Rows

Row: TypeAlias = Any  # `Rows` whose columns are jax arrays: those of one rank, or one number of each
jax.tree_util.register_dataclass(Rows)


@dataclass(frozen=True)
class Work:
    """What the cells do. Micro-batches are numbers below the table's `num_microbatches`."""

    layer: Callable[[Any, tuple[Array, Any]], tuple[Array, Any]]  # (weights, (x, integers)) -> (x, stats)
    integers: Callable[[Array], Any]  # what the layers read of a micro-batch beside x
    enter: Callable[[Any, Array], Array]  # (extras, micro-batch) -> the first stage's x
    # (extras, guests, last x, micro-batch) -> (objective, sums)
    leave: Callable[[Any, Any, Array, Array], tuple[Array, Any]]
    dstats: Any  # cotangents of a layer's stats; None for integers
    layers: tuple[int, ...]  # how many each stage has
    guests: int = 0  # places after the last stage's layers, whose weights `leave` reads; else it is given None


@jax.tree_util.register_dataclass
@dataclass
class Outcome:
    """What a rank has after the last slot; everything is its own sum over its micro-batches."""

    dstack: Any  # float32 gradients of the layers of all copies
    dextras: Any  # float32 gradients of what enters and leaves
    stats: Any  # of the layers of all copies: [layers, ...]
    sums: Any  # of `leave`
    ran: Array  # int32 [slots, ops of a cell, 3]: 1 + place in KINDS, stage, micro-batch; without slots unless kept


@jax.tree_util.register_dataclass
@dataclass
class Carry:
    """What goes from slot to slot."""

    hidden: Array  # [entries, rows, positions, dim]
    residual: list[Array]  # [layers of a stage, entries, ...]
    deferred: list[Array]
    taken: list[Array]  # what one layer's forward left: out of `residual`, for a joined cell
    late: list[Array]  # what the I of a joined cell's last layer leaves for its W, which runs beside the transfers
    outcome: Outcome


KINDS = "FBIW"
JOINED = ("F", "B")


def recorded(carry: Carry, kind: tuple[str, ...], row: Row, slot: Array) -> Carry:
    """Notes what a cell runs."""
    ran = carry.outcome.ran
    for place, op in enumerate(kind):
        name = {"F": "f", "W": "w"}.get(op, "b")
        entry = [jnp.full_like(row.cell, 1 + KINDS.index(op)), getattr(row, f"{name}_stage")]
        ran = put(ran, jnp.stack([*entry, getattr(row, f"{name}_microbatch")]), slot, jnp.full_like(slot, place))
    return with_outcome(carry, ran=ran)


def with_outcome(carry: Carry, **changes: Any) -> Carry:
    """The carry with parts of its outcome changed."""
    return dataclasses.replace(carry, outcome=dataclasses.replace(carry.outcome, **changes))
