"""Runs a table inside `jax.shard_map`: one scan over its slots, whatever the schedule.

In a slot a rank runs the cell that the table names for it. Each kind of cell stands behind a loop of no or one trip,
which works in place where a branch would copy all that the ranks keep; so in a cell only collectives over axes on which
the table is the same may stand. The transfers between ranks stand outside of the cells: which ranks meet depends on the
slot alone.

A stage is a number of like layers, and a cell loops over them. A layer is traced once (`backward.trace_stage`): neither
the layers nor the micro-batches nor the copies of the parameters make the program longer. What its forward leaves for
its backward, and that for the weight gradients that are put off, lies in pools whose entries the table gives out. In a
joined cell layer j of the forward runs woven with the j-th last layer of the backward (`interleave`).
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moejax.mesh import AXES
from moejax.ops.varying import vary_over
from moejax.pipeline.backward import StageFunctions, trace_stage
from moejax.pipeline.interleave import interleave_stages
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
    layers: tuple[int, ...]  # how many each stage has


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
class _Carry:
    hidden: Array  # [entries, rows, positions, dim]
    residual: list[Array]  # [layers of a stage, entries, ...]
    deferred: list[Array]
    taken: list[Array]  # what one layer's forward left: out of `residual`, for a joined cell
    outcome: Outcome


KINDS = "FBIW"
JOINED = ("F", "B")


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
    cells = _Cells(table, work, stack, extras, x)
    rows, transfer = _varying(rows), jnp.asarray(table.transfer)
    slots = jnp.arange(table.num_slots)
    present = [index for index, kind in enumerate(table.kinds) if kind]

    def slot(carry: _Carry, this: tuple[Row, Array, Array]) -> tuple[_Carry, None]:
        row, transfer, number = this
        for index in present:

            def cell(carry: _Carry, z: Array, kind: tuple[str, ...] = table.kinds[index]) -> _Carry:
                own = jax.tree.map(lambda column: column + z, row)
                carry = _recorded(carry, kind, own, number + z) if keep_record else carry
                return cells.run(kind, carry, own)

            carry = _when(row.cell == index, cell, carry)
        return dataclasses.replace(carry, hidden=_transferred(table, transfer, carry.hidden, row)), None

    return lax.scan(slot, cells.start(x, keep_record), (rows, transfer, slots))[0].outcome


class _Cells:
    """The cells of one rank."""

    def __init__(self, table: Table, work: Work, stack: Any, extras: Any, x: Array):
        self.table, self.work, self.stack, self.extras = table, work, stack, extras
        self.layer_input = x, work.integers(jnp.zeros((), jnp.int32))
        self.functions: StageFunctions = trace_stage(work.layer, _layer_of(stack, 0), self.layer_input)
        self.num_stages, self.depth = table.program.num_stages, max(work.layers)
        self.keeps = not table.program.is_forward_only
        # leaf 0 of a layer's input is x; the others are integers that can be looked up again
        self.stored = [i for i, leaf in enumerate(self.functions.residual_inputs) if not leaf]

    def start(self, x: Array, keep_record: bool) -> _Carry:
        """Empty pools and sums."""
        table, functions = self.table, self.functions

        def pool(entries: int, like: Any) -> Array:
            return jnp.zeros((self.depth, entries, *like.shape), like.dtype)

        number_of_layers = jax.tree.leaves(self.stack)[0].shape[0]
        stats = _zero_results(self.work.layer, _layer_of(self.stack, 0), self.layer_input)
        outcome = Outcome(
            dstack=_zeros(self.stack),
            dextras=_zeros(self.extras),
            stats=jax.tree.map(lambda s: jnp.zeros((number_of_layers, *s.shape), s.dtype), stats),
            sums=_zero_results(self.work.leave, self.extras, x, jnp.zeros((), jnp.int32)),
            ran=jnp.zeros((table.num_slots if keep_record else 0, 2, 3), jnp.int32),
        )
        residual = [pool(table.num_residual, functions.residuals[i]) for i in self.stored] if self.keeps else []
        deferred = [pool(table.num_deferred, like) for like in functions.kept] if table.num_deferred else []
        taken = [jnp.zeros(pool.shape[2:], pool.dtype) for pool in residual] if JOINED in table.kinds else []
        hidden = jnp.zeros((table.num_hidden + 1, *x.shape), x.dtype)
        return _varying(_Carry(hidden, residual, deferred, taken, outcome))

    def run(self, kind: tuple[str, ...], carry: _Carry, row: Row) -> _Carry:
        """One cell."""
        if kind == JOINED:
            return self.joined(carry, row)
        for op in kind:
            with jax.named_scope(op):
                if op == "F":
                    carry = self.forward(carry, row)
                elif op == "W":
                    carry = self.weight_gradients(carry, row)
                else:
                    carry = self.backward(carry, row, put_off=op == "I")
        return carry

    # ------------------------------------------------------------------------------------------------------- the cells

    def forward(self, carry: _Carry, row: Row) -> _Carry:
        carry = self.enter(carry, row)
        x = _get(carry.hidden, row.f_x)
        layer = functools.partial(self.forward_layer, row)
        carry, x = _loop(0, self.num_layers(row.f_stage), layer, (carry, x))
        return self.end_forward(carry, row, x)

    def backward(self, carry: _Carry, row: Row, put_off: bool) -> _Carry:
        carry = self.leave(carry, row)
        layer = functools.partial(self.backward_layer, row, put_off)
        carry, dx = _loop(0, self.num_layers(row.b_stage), layer, (carry, _get(carry.hidden, row.b_g)))
        return self.end_backward(carry, row, dx)

    def joined(self, carry: _Carry, row: Row) -> _Carry:
        """A forward and the backward of another micro-batch, woven; what one has more layers runs alone."""
        carry = self.enter(self.leave(carry, row), row)
        x, dx = _get(carry.hidden, row.f_x), _get(carry.hidden, row.b_g)
        ahead, behind = self.num_layers(row.f_stage), self.num_layers(row.b_stage)
        both = jnp.minimum(ahead, behind) if isinstance(ahead, Array) else ahead
        carry, x, dx = _loop(0, both, functools.partial(self.woven_layers, row), (carry, x, dx))
        if both is not ahead:
            carry, x = _loop(both, ahead, functools.partial(self.forward_layer, row), (carry, x))
            carry, dx = _loop(both, behind, functools.partial(self.backward_layer, row, False), (carry, dx))
        return self.end_backward(self.end_forward(carry, row, x), row, dx)

    def weight_gradients(self, carry: _Carry, row: Row) -> _Carry:
        def layer(index: Array, carry: _Carry) -> _Carry:
            residuals = self.residuals(carry, index, row.w_residual, row.w_microbatch)
            read = [residuals[i] for i in self.functions.weight_residuals]
            kept = [_get(pool, index, row.w_deferred) for pool in carry.deferred]
            dweights = self.functions.backward_weight(self.weights(row.w_copy, index), read, kept)
            return self.with_gradient(carry, row.w_copy, index, dweights)

        return _loop(0, self.num_layers(row.w_stage), layer, carry)

    # ------------------------------------------------------------------------------------------------------ the layers

    def forward_layer(self, row: Row, index: Array, state: tuple[_Carry, Array]) -> tuple[_Carry, Array]:
        carry, x = state
        weights, given = self.weights(row.f_copy, index), (x, self.work.integers(row.f_microbatch))
        x, stats, saved = self.functions.forward(weights, given)
        return self.with_forward(carry, row, index, stats, saved), x

    def backward_layer(
        self, row: Row, put_off: bool, count: Array, state: tuple[_Carry, Array]
    ) -> tuple[_Carry, Array]:
        """The layer that has `count` layers after it in its stage."""
        carry, dx = state
        index = self.num_layers(row.b_stage) - 1 - count
        weights = self.weights(row.b_copy, index)
        residuals = self.residuals(carry, index, row.b_residual, row.b_microbatch)
        if not put_off:
            (dx, _), dweights = self.functions.backward(weights, residuals, dx, self.work.dstats)
            return self.with_gradient(carry, row.b_copy, index, dweights), dx
        (dx, _), kept = self.functions.backward_input(weights, residuals, dx, self.work.dstats)
        pools = zip(carry.deferred, kept, strict=True)
        return dataclasses.replace(carry, deferred=[_put(pool, v, index, row.b_deferred) for pool, v in pools]), dx

    def woven_layers(self, row: Row, count: Array, state: tuple[_Carry, Array, Array]) -> tuple[_Carry, Array, Array]:
        """Layer `count` of the forward, and the backward's layer that has `count` layers after it."""
        carry, x, dx = state
        index = self.num_layers(row.b_stage) - 1 - count
        carry = self.take(carry, row, index)
        (x, stats, saved), ((dx, _), dweights) = interleave_stages(
            self.functions,
            self.weights(row.f_copy, count),
            (x, self.work.integers(row.f_microbatch)),
            self.functions,
            self.weights(row.b_copy, index),
            self.with_integers(carry.taken, row.b_microbatch),
            dx,
            self.work.dstats,
        )
        carry = self.with_forward(carry, row, count, stats, saved)
        return self.with_gradient(carry, row.b_copy, index, dweights), x, dx

    # ----------------------------------------------------------------------------------------- before and after layers

    def enter(self, carry: _Carry, row: Row) -> _Carry:
        """In the first stage: what its first layer reads."""

        def enter(hidden: Array, z: Array) -> Array:
            return _put(hidden, self.work.enter(self.extras, row.f_microbatch + z), row.f_x + z)

        return dataclasses.replace(carry, hidden=_when(row.f_stage == 0, enter, carry.hidden))

    def end_forward(self, carry: _Carry, row: Row, y: Array) -> _Carry:
        """Gives the output on; where there is no backward pass to do it, the last stage sums up what `leave` says."""
        carry = dataclasses.replace(carry, hidden=_put(carry.hidden, y, row.f_y))
        if self.keeps:
            return carry

        def leave(sums: Any, z: Array) -> Any:
            return jax.tree.map(jnp.add, sums, self.work.leave(self.extras, y, row.f_microbatch + z)[1])

        sums = _when(row.f_stage == self.num_stages - 1, leave, carry.outcome.sums)
        return _with_outcome(carry, sums=sums)

    def leave(self, carry: _Carry, row: Row) -> _Carry:
        """In the last stage: the losses of its output, whose entry takes their gradient."""

        def leave(state: tuple[Array, Any, Any], z: Array) -> tuple[Array, Any, Any]:
            hidden, dextras, sums = state
            place, microbatch = row.b_g + z, row.b_microbatch + z
            gradient = jax.grad(self.work.leave, argnums=(0, 1), has_aux=True)
            (more, dy), found = gradient(self.extras, _get(hidden, place), microbatch)
            return _put(hidden, dy, place), jax.tree.map(jnp.add, dextras, more), jax.tree.map(jnp.add, sums, found)

        state = carry.hidden, carry.outcome.dextras, carry.outcome.sums
        hidden, dextras, sums = _when(row.b_stage == self.num_stages - 1, leave, state)
        return _with_outcome(dataclasses.replace(carry, hidden=hidden), dextras=dextras, sums=sums)

    def end_backward(self, carry: _Carry, row: Row, dx: Array) -> _Carry:
        """Gives the gradient on; in the first stage to what enters, whose forward is computed again."""

        def enter(dextras: Any, z: Array) -> Any:
            _, pull = jax.vjp(lambda extras: self.work.enter(extras, row.b_microbatch + z), self.extras)
            return jax.tree.map(jnp.add, dextras, pull(dx)[0])

        carry = _with_outcome(carry, dextras=_when(row.b_stage == 0, enter, carry.outcome.dextras))
        return dataclasses.replace(carry, hidden=_put(carry.hidden, dx, row.b_x))

    # ----------------------------------------------------------------------------------------- what the ranks keep

    def num_layers(self, stage: Array) -> Any:
        """Layers of a stage: a number where all stages have as many, else one that is known when the program runs."""
        if len(set(self.work.layers)) == 1:
            return self.depth
        return _varying(jnp.asarray(self.work.layers))[stage]

    def weights(self, copy: Array, index: Array) -> Any:
        return _layer_of(self.stack, copy * self.depth + index)

    def residuals(self, carry: _Carry, index: Array, place: Array, microbatch: Array) -> list[Array]:
        """What the forward pass of a layer left, and its integers, looked up."""
        return self.with_integers([_get(pool, index, place) for pool in carry.residual], microbatch)

    def with_integers(self, stored: list[Array], microbatch: Array) -> list[Array]:
        integers, rest = jax.tree.leaves(self.work.integers(microbatch)), iter(stored)
        return [integers[leaf - 1] if leaf else next(rest) for leaf in self.functions.residual_inputs]

    def take(self, carry: _Carry, row: Row, index: Array) -> _Carry:
        """Moves what the backward of a layer reads out of the pools, before the forward puts anything into them.

        XLA would copy a whole pool where it cannot know that it is read before it is written. So the reading is a
        loop of one trip, of which the pools come out anew: a number is put where it is.
        """

        def take(state: tuple[list[Array], list[Array]], z: Array) -> tuple[list[Array], list[Array]]:
            first = [(index + z, row.b_residual, *(0,) * (pool.ndim - 2)) for pool in state[0]]
            pools = [
                _put(pool, _get(pool, *at) + z.astype(pool.dtype), *at)
                for pool, at in zip(state[0], first, strict=True)
            ]
            return pools, [_get(pool, index + z, row.b_residual) for pool in pools]

        residual, taken = _when(row.cell > 0, take, (carry.residual, carry.taken))
        return dataclasses.replace(carry, residual=residual, taken=taken)

    def with_forward(self, carry: _Carry, row: Row, index: Array, stats: Any, saved: list[Array]) -> _Carry:
        residual = carry.residual
        if self.keeps:
            pools = zip(residual, self.stored, strict=True)
            residual = [_put(pool, saved[i], index, row.f_residual) for pool, i in pools]
        stats = _added(carry.outcome.stats, row.f_copy * self.depth + index, stats)
        return _with_outcome(dataclasses.replace(carry, residual=residual), stats=stats)

    def with_gradient(self, carry: _Carry, copy: Array, index: Array, dweights: Any) -> _Carry:
        return _with_outcome(carry, dstack=_added(carry.outcome.dstack, copy * self.depth + index, dweights))


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


def _loop(start: Any, end: Any, function: Callable[[Any, Tree], Tree], state: Tree) -> Tree:
    """`lax.fori_loop`, whose counter may vary over the mesh."""
    if isinstance(end, Array):
        start = jnp.zeros_like(end) + start

    return lax.fori_loop(start, end, function, state)


def _transferred(table: Table, transfer: Array, hidden: Array, row: Row) -> Array:
    """The pool after a slot's transfers: every rank reads what it sends before it writes what it gets."""

    def move(value: Array, edges: Edges) -> Array:
        return lax.ppermute(value, "pipe", list(edges)) if edges else jnp.zeros_like(value)

    def branch(x_edges: Edges, g_edges: Edges) -> Callable[[Array, Array], tuple[Array, Array]]:
        return lambda x, g: (move(x, x_edges), move(g, g_edges))

    branches = [branch(*edges) for edges in table.transfers]
    x, g = lax.switch(transfer, branches, _get(hidden, row.send_x), _get(hidden, row.send_g))
    return _put(_put(hidden, x, row.receive_x), g, row.receive_g)


def _recorded(carry: _Carry, kind: tuple[str, ...], row: Row, slot: Array) -> _Carry:
    """Notes what a cell runs."""
    ran = carry.outcome.ran
    for place, op in enumerate(kind):
        name = {"F": "f", "W": "w"}.get(op, "b")
        entry = [jnp.full_like(row.cell, 1 + KINDS.index(op)), getattr(row, f"{name}_stage")]
        ran = _put(ran, jnp.stack([*entry, getattr(row, f"{name}_microbatch")]), slot, jnp.full_like(slot, place))
    return _with_outcome(carry, ran=ran)


def _with_outcome(carry: _Carry, **changes: Any) -> _Carry:
    return dataclasses.replace(carry, outcome=dataclasses.replace(carry.outcome, **changes))


def _get(pool: Array, *place: Array) -> Array:
    """The entry of a pool whose first dims `place` names."""
    shape = pool.shape[len(place) :]
    return lax.dynamic_slice(pool, _start(pool, place), (*(1,) * len(place), *shape)).reshape(shape)


def _put(pool: Array, value: Array, *place: Array) -> Array:
    entry = value.astype(pool.dtype).reshape((1,) * len(place) + value.shape)
    return lax.dynamic_update_slice(pool, entry, _start(pool, place))


def _start(pool: Array, place: tuple[Array, ...]) -> list[Array | int]:
    return [*place, *(0,) * (pool.ndim - len(place))]


def _layer_of(stack: Tree, index: Any) -> Tree:
    return jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False), stack)


def _added(stack: Tree, index: Array, more: Tree) -> Tree:
    """The stack with something added to one of its layers; in one go, as the layer keeps its leading dim."""

    def one(whole: Array, part: Array) -> Array:
        start = _start(whole, (index,))
        entry = lax.dynamic_slice(whole, start, (1, *part.shape)) + part.reshape(1, *part.shape)
        return lax.dynamic_update_slice(whole, entry.astype(whole.dtype), start)

    return jax.tree.map(one, stack, more)


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
