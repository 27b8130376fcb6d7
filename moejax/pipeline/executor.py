"""Runs a table inside `jax.shard_map`: one scan over its slots, whatever the schedule.

In a slot a rank runs the cell that the table names for it. Each kind of cell stands behind a loop of no or one trip,
which works in place where a branch would copy all that the ranks keep; so in a cell only collectives over axes on which
the table is the same may stand. The transfers between ranks stand outside of the cells: which ranks meet depends on the
slot alone.

A stage is `depth` layers, traced once (`backward.trace_stage`). What its forward leaves for its backward, and that for
the weight gradients that are put off, lies in pools whose entries the table gives out.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moejax.mesh import AXES
from moejax.ops.varying import vary_over
from moejax.pipeline.backward import StageFunctions, trace_stage
from moejax.pipeline.table import Edges, Rows, Table

Tree = TypeVar("Tree")
Row: TypeAlias = Any  # `Rows` whose columns are jax arrays: those of one rank, or one number of each
jax.tree_util.register_dataclass(Rows)


@dataclass(frozen=True)
class Work:
    """What the cells do. Micro-batches are numbers below the table's `num_microbatches`."""

    layer: Callable[[Any, tuple[Array, Any]], tuple[Array, Any]]  # (weights, (x, integers)) -> (x, stats)
    integers: Callable[[Array], Any]  # what the layers read of a micro-batch beside x
    enter: Callable[[Any, Array], Array]  # (extras, micro-batch) -> the first stage's x
    leave: Callable[[Any, Array, Array], tuple[Array, Any]]  # (extras, last x, micro-batch) -> (objective, sums)
    dstats: Any  # cotangents of a layer's stats; None for integers


@jax.tree_util.register_dataclass
@dataclass
class Outcome:
    """What a rank has after the last slot; everything is its own sum over its micro-batches."""

    dcopies: list[list[Any]]  # float32 gradients of each copy's layers
    dextras: Any  # float32 gradients of what enters and leaves
    stats: list[list[Any]]  # of each copy's layers
    sums: Any  # of `leave`


@jax.tree_util.register_dataclass
@dataclass
class _Carry:
    hidden: Array  # [entries, rows, positions, dim]
    residual: list[list[Array]]  # of each layer: [entries, ...]
    deferred: list[list[Array]]
    outcome: Outcome


def run(table: Table, rows: Row, work: Work, copies: Sequence[Sequence[Any]], extras: Any, x: Array) -> Outcome:
    """The gradients and sums of all micro-batches.

    Args:
        table: the static part of the schedule.
        rows: its columns of this rank, int32 [slots].
        work: the functions of the model.
        copies: the weights of the layers of each parameter copy that this rank holds, varying over every mesh axis.
        extras: the weights that `enter` and `leave` read, varying likewise.
        x: an array like those between the stages.
    """
    functions = trace_stage(work.layer, copies[0][0], (x, work.integers(jnp.zeros((), jnp.int32))))
    cells = _Cells(table, work, functions, copies, extras)
    rows, transfer = _varying(rows), jnp.asarray(table.transfer)
    present = [index for index, kind in enumerate(table.kinds) if kind]

    def slot(carry: _Carry, this: tuple[Row, Array]) -> tuple[_Carry, None]:
        row, transfer = this
        for index in present:

            def cell(carry: _Carry, z: Array, kind: tuple = table.kinds[index]) -> _Carry:
                return cells.run(kind, carry, jax.tree.map(lambda column: column + z, row))

            carry = _when(row.cell == index, cell, carry)
        return dataclasses.replace(carry, hidden=_transferred(table, transfer, carry.hidden, row)), None

    return lax.scan(slot, cells.start(x), (rows, transfer))[0].outcome


class _Cells:
    """The cells of one rank."""

    def __init__(
        self, table: Table, work: Work, functions: StageFunctions, copies: Sequence[Sequence[Any]], extras: Any
    ):
        self.table, self.work, self.functions, self.copies, self.extras = table, work, functions, copies, extras
        self.last_stage = table.program.num_stages - 1
        self.keeps = not table.program.is_forward_only
        # leaf 0 of a layer's input is x; the others are integers that can be looked up again
        self.stored = [i for i, leaf in enumerate(functions.residual_inputs) if not leaf]

    def start(self, x: Array) -> _Carry:
        """Empty pools and sums."""
        functions, depth = self.functions, len(self.copies[0])

        def pool(entries: int, like: Any) -> Array:
            return jnp.zeros((entries + 1, *like.shape), like.dtype)

        residual = [[pool(self.table.num_residual, functions.residuals[i]) for i in self.stored] for _ in range(depth)]
        deferred = [[pool(self.table.num_deferred, like) for like in functions.kept] for _ in range(depth)]
        zero = jnp.zeros((), jnp.int32)
        layer_input = x, self.work.integers(zero)
        stats = [[_zero_results(self.work.layer, weights, layer_input) for weights in copy] for copy in self.copies]
        outcome = Outcome(
            dcopies=[[_zeros(layer) for layer in copy] for copy in self.copies],
            dextras=_zeros(self.extras),
            stats=stats,
            sums=_zero_results(self.work.leave, self.extras, x, zero),
        )
        kept = (residual, deferred if self.table.num_deferred else [[]]) if self.keeps else ([[]], [[]])
        return _varying(_Carry(pool(self.table.num_hidden, x), *kept, outcome))

    def run(self, kind: tuple[tuple[str, int], ...], carry: _Carry, row: Row) -> _Carry:
        """One cell."""
        for op, copy in kind:
            with jax.named_scope(op):
                if op == "F":
                    carry = self.forward(carry, row, copy)
                elif op == "W":
                    carry = self.weight_gradients(carry, row, copy)
                else:
                    carry = self.backward(carry, row, copy, put_off=op == "I")
        return carry

    def forward(self, carry: _Carry, row: Row, copy: int) -> _Carry:
        def enter(hidden: Array, z: Array) -> Array:
            return _put(hidden, row.f_x + z, self.work.enter(self.extras, row.f_microbatch + z))

        hidden = _when(row.f_stage == 0, enter, carry.hidden)
        x, integers = _get(hidden, row.f_x), self.work.integers(row.f_microbatch)
        residual, stats = list(carry.residual), list(carry.outcome.stats[copy])
        for layer, weights in enumerate(self.copies[copy]):
            x, found, saved = self.functions.forward(weights, (x, integers))
            stats[layer] = jax.tree.map(jnp.add, stats[layer], found)
            if self.keeps:
                pools = zip(residual[layer], self.stored, strict=True)
                residual[layer] = [_put(pool, row.f_residual, saved[i]) for pool, i in pools]
        outcome = dataclasses.replace(carry.outcome, stats=_replaced(carry.outcome.stats, copy, stats))
        carry = _Carry(_put(hidden, row.f_y, x), residual, carry.deferred, outcome)
        return carry if self.keeps else self.count_losses(carry, row, x)

    def count_losses(self, carry: _Carry, row: Row, y: Array) -> _Carry:
        """What `leave` sums up, where there is no backward pass to do it."""

        def leave(sums: Any, z: Array) -> Any:
            return jax.tree.map(jnp.add, sums, self.work.leave(self.extras, y, row.f_microbatch + z)[1])

        sums = _when(row.f_stage == self.last_stage, leave, carry.outcome.sums)
        return dataclasses.replace(carry, outcome=dataclasses.replace(carry.outcome, sums=sums))

    def backward(self, carry: _Carry, row: Row, copy: int, put_off: bool) -> _Carry:
        carry = self.leave(carry, row)
        dx = _get(carry.hidden, row.b_g)
        deferred, dcopy = list(carry.deferred), list(carry.outcome.dcopies[copy])
        for layer in reversed(range(len(self.copies[copy]))):
            weights, residuals = (
                self.copies[copy][layer],
                self.residuals(carry, layer, row.b_residual, row.b_microbatch),
            )
            if put_off:
                (dx, _), kept = self.functions.backward_input(weights, residuals, dx, self.work.dstats)
                pools = zip(deferred[layer], kept, strict=True)
                deferred[layer] = [_put(pool, row.b_deferred, value) for pool, value in pools]
            else:
                (dx, _), dweights = self.functions.backward(weights, residuals, dx, self.work.dstats)
                dcopy[layer] = jax.tree.map(jnp.add, dcopy[layer], dweights)
        outcome = dataclasses.replace(carry.outcome, dcopies=_replaced(carry.outcome.dcopies, copy, dcopy))
        outcome = self.enter(outcome, row, dx)
        return _Carry(_put(carry.hidden, row.b_x, dx), carry.residual, deferred, outcome)

    def weight_gradients(self, carry: _Carry, row: Row, copy: int) -> _Carry:
        dcopy = list(carry.outcome.dcopies[copy])
        for layer, weights in enumerate(self.copies[copy]):
            residuals = self.residuals(carry, layer, row.w_residual, row.w_microbatch)
            read = [residuals[i] for i in self.functions.weight_residuals]
            kept = [_get(pool, row.w_deferred) for pool in carry.deferred[layer]]
            dweights = self.functions.backward_weight(weights, read, kept)
            dcopy[layer] = jax.tree.map(jnp.add, dcopy[layer], dweights)
        dcopies = _replaced(carry.outcome.dcopies, copy, dcopy)
        return dataclasses.replace(carry, outcome=dataclasses.replace(carry.outcome, dcopies=dcopies))

    def leave(self, carry: _Carry, row: Row) -> _Carry:
        """In the last stage: the losses of its output, whose entry takes their gradient."""

        def leave(state: tuple[Array, Any, Any], z: Array) -> tuple[Array, Any, Any]:
            hidden, dextras, sums = state
            place, microbatch = row.b_g + z, row.b_microbatch + z
            gradient = jax.grad(self.work.leave, argnums=(0, 1), has_aux=True)
            (more, dy), found = gradient(self.extras, _get(hidden, place), microbatch)
            return _put(hidden, place, dy), jax.tree.map(jnp.add, dextras, more), jax.tree.map(jnp.add, sums, found)

        outcome = carry.outcome
        state = carry.hidden, outcome.dextras, outcome.sums
        hidden, dextras, sums = _when(row.b_stage == self.last_stage, leave, state)
        return dataclasses.replace(
            carry, hidden=hidden, outcome=dataclasses.replace(outcome, dextras=dextras, sums=sums)
        )

    def enter(self, outcome: Outcome, row: Row, dx: Array) -> Outcome:
        """In the first stage: the gradient of what enters; its forward is computed again."""

        def enter(dextras: Any, z: Array) -> Any:
            _, pull = jax.vjp(lambda extras: self.work.enter(extras, row.b_microbatch + z), self.extras)
            return jax.tree.map(jnp.add, dextras, pull(dx)[0])

        return dataclasses.replace(outcome, dextras=_when(row.b_stage == 0, enter, outcome.dextras))

    def residuals(self, carry: _Carry, layer: int, place: Array, microbatch: Array) -> list[Array]:
        """What the forward pass of a layer left, and its integers, looked up."""
        integers = jax.tree.leaves(self.work.integers(microbatch))
        stored = iter(carry.residual[layer])
        return [integers[leaf - 1] if leaf else _get(next(stored), place) for leaf in self.functions.residual_inputs]


# --------------------------------------------------------------------------------------------------------- small parts


def _when(condition: Array, function: Callable[[Tree, Array], Tree], state: Tree) -> Tree:
    """`function(state, 0)` if the condition holds, else `state`, in place.

    The 0 is not known before the program runs. Added to every index that the function uses it keeps XLA from moving
    work out of the loop, which does not depend on what the loop changes.
    """
    trips = condition.astype(jnp.int32)

    def body(carry: tuple[Array, Tree]) -> tuple[Array, Tree]:
        return carry[0] + 1, function(carry[1], carry[0])

    return lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.zeros_like(trips), state))[1]


def _transferred(table: Table, transfer: Array, hidden: Array, row: Row) -> Array:
    """The pool after a slot's transfers: every rank reads what it sends before it writes what it gets."""

    def move(value: Array, edges: Edges) -> Array:
        return lax.ppermute(value, "pipe", list(edges)) if edges else jnp.zeros_like(value)

    def branch(x_edges: Edges, g_edges: Edges) -> Callable[[Array, Array], tuple[Array, Array]]:
        return lambda x, g: (move(x, x_edges), move(g, g_edges))

    branches = [branch(*edges) for edges in table.transfers]
    x, g = lax.switch(transfer, branches, _get(hidden, row.send_x), _get(hidden, row.send_g))
    return _put(_put(hidden, row.receive_x, x), row.receive_g, g)


def _get(pool: Array, place: Array) -> Array:
    return lax.dynamic_index_in_dim(pool, place, 0, keepdims=False)


def _put(pool: Array, place: Array, value: Array) -> Array:
    return lax.dynamic_update_index_in_dim(pool, value.astype(pool.dtype), place, 0)


def _replaced(items: list[Any], index: int, item: Any) -> list[Any]:
    return [item if i == index else old for i, old in enumerate(items)]


def _zeros(tree: Any) -> Any:
    """Float32 for floating-point numbers."""
    inexact = jnp.issubdtype
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32 if inexact(x.dtype, jnp.inexact) else x.dtype), tree)


def _zero_results(function: Callable[..., tuple[Array, Any]], *arguments: Any) -> Any:
    """Zeros like the second result of a function."""
    structure = None

    def leaves(*arguments: Any) -> list[Array]:
        nonlocal structure
        found, structure = jax.tree.flatten(function(*arguments)[1])
        return found

    shapes = jax.eval_shape(leaves, *arguments)
    return jax.tree.unflatten(structure, _zeros(shapes))


def _varying(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: vary_over(x, AXES), tree)
