"""The cells of one rank: what it runs in a slot, and what it keeps from one cell to another.

A stage is a number of like layers, and a cell loops over them. A layer is traced once (`backward.trace_stage`): neither
the layers nor the micro-batches nor the copies of the parameters make the program longer. What its forward leaves for
its backward, and that for the weight gradients that are put off, lies in pools whose entries the table gives out. In a
joined cell layer j of the forward runs woven with the j-th last layer of the backward (`interleave`); the weights'
gradients of the layer that is last are left to be computed while what the cell has to send is under way.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moejax.model.shards import widened
from moejax.pipeline.backward import StageFunctions, trace_stage
from moejax.pipeline.carry import JOINED, Carry, Outcome, Row, Work, with_outcome
from moejax.pipeline.interleave import interleave_stages
from moejax.pipeline.pools import added, get, layer_of, loop, put, varying, when, zero_results, zeros
from moejax.pipeline.table import Table


class Cells:
    """The cells of one rank."""

    def __init__(self, table: Table, work: Work, stack: Any, extras: Any, x: Array):
        """Traces a layer.

        Args:
            table: the static part of the schedule.
            work: the functions of the model.
            stack: the weights of all parameter copies' layers that this rank holds, [copies x most layers of a stage,
                ...], of any floating-point dtypes, varying over every mesh axis. A stage that has fewer layers uses the
                first places.
            extras: the weights that `enter` and `leave` read, varying likewise.
            x: an array like those between the stages.
        """
        self.table, self.work, self.stack, self.extras = table, work, stack, extras
        self.x = x
        self.layer_input = x, work.integers(jnp.zeros((), jnp.int32))
        self.functions: StageFunctions = trace_stage(work.layer, widened(layer_of(stack, 0)), self.layer_input)
        self.num_stages, self.depth = table.program.num_stages, max(work.layers)
        self.keeps = not table.program.is_forward_only
        # leaf 0 of a layer's input is x; the others are integers that can be looked up again
        self.stored = [i for i, leaf in enumerate(self.functions.residual_inputs) if not leaf]

    def start(self, record: Array) -> Carry:
        """Empty pools and sums."""
        table, functions, x = self.table, self.functions, self.x

        def pool(entries: int, like: Any) -> Array:
            return jnp.zeros((self.depth, entries, *like.shape), like.dtype)

        number_of_layers = jax.tree.leaves(self.stack)[0].shape[0]
        stats = zero_results(self.work.layer, widened(layer_of(self.stack, 0)), self.layer_input)
        outcome = Outcome(
            dstack=zeros(self.stack),
            dextras=zeros(self.extras),
            stats=jax.tree.map(lambda s: jnp.zeros((number_of_layers, *s.shape), s.dtype), stats),
            sums=zero_results(self.work.leave, self.extras, self.guests(0), x, jnp.zeros((), jnp.int32)),
            ran=record,
        )
        residual = [pool(table.num_residual, functions.residuals[i]) for i in self.stored] if self.keeps else []
        deferred = [pool(table.num_deferred, like) for like in functions.kept] if table.num_deferred else []
        taken = [jnp.zeros(pool.shape[2:], pool.dtype) for pool in residual] if JOINED in table.kinds else []
        hidden = jnp.zeros((table.num_hidden + 1, *x.shape), x.dtype)
        late = [jnp.zeros(like.shape, like.dtype) for like in functions.kept] if JOINED in table.kinds else []
        return varying(Carry(hidden, residual, deferred, taken, late, outcome))

    def run(self, kind: tuple[str, ...], carry: Carry, row: Row) -> Carry:
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

    def forward(self, carry: Carry, row: Row) -> Carry:
        """A stage's layers, first to last."""
        carry = self.enter(carry, row)
        x = get(carry.hidden, row.f_x)
        layer = functools.partial(self.forward_layer, row)
        carry, x = loop(0, self.num_layers(row.f_stage), layer, (carry, x))
        return self.end_forward(carry, row, x)

    def backward(self, carry: Carry, row: Row, put_off: bool) -> Carry:
        """A stage's layers, last to first; with `put_off` the weights' gradients are left for later."""
        carry = self.leave(carry, row)
        layer = functools.partial(self.backward_layer, row, put_off)
        carry, dx = loop(0, self.num_layers(row.b_stage), layer, (carry, get(carry.hidden, row.b_g)))
        return self.end_backward(carry, row, dx)

    def joined(self, carry: Carry, row: Row) -> Carry:
        """A forward and the backward of another micro-batch, woven; what one has more layers runs alone.

        The last layers are woven too, but for the weights' gradients, which `late` computes.
        """
        carry = self.enter(self.leave(carry, row), row)
        x, dx = get(carry.hidden, row.f_x), get(carry.hidden, row.b_g)
        ahead, behind, last = self.num_layers(row.f_stage), self.num_layers(row.b_stage), self.num_late(row)

        def woven(count: Array, state: tuple[Carry, Array, Array]) -> tuple[Carry, Array, Array]:
            return self.woven_layers(row, count, behind - 1 - count, False, state)

        def woven_last(zero: Array, state: tuple[Carry, Array, Array]) -> tuple[Carry, Array, Array]:
            return self.woven_layers(row, ahead - 1 + zero, zero, True, state)

        both = jnp.minimum(ahead, behind) if isinstance(ahead, Array) else ahead
        carry, x, dx = loop(0, both - last, woven, (carry, x, dx))
        if both is not ahead:
            carry, x = loop(both - last, ahead - last, functools.partial(self.forward_layer, row), (carry, x))

            def backward(count: Array, state: tuple[Carry, Array]) -> tuple[Carry, Array]:
                carry = self.take(state[0], row, behind - 1 - count)
                return self.backward_layer(row, False, count, (carry, state[1]), carry.taken)

            carry, dx = loop(both - last, behind - last, backward, (carry, dx))
        carry, x, dx = self.once(row, woven_last, (carry, x, dx))
        return self.end_backward(self.end_forward(carry, row, x), row, dx)

    def num_late(self, row: Row) -> Any:
        """Layers whose weights' gradients a joined cell leaves to `late`: one, unless a stage has no layers."""
        if min(self.work.layers):
            return 1
        return jnp.minimum(jnp.minimum(self.num_layers(row.f_stage), self.num_layers(row.b_stage)), 1)

    def once(self, row: Row, function: Callable[[Any, Any], Any], state: Any) -> Any:
        """`function(0, state)`, as often as there are layers of which something is late."""
        if min(self.work.layers):
            return function(jnp.zeros_like(row.cell), state)
        return loop(0, self.num_late(row), function, state)

    def late(self, carry: Carry, row: Row) -> Carry:
        """The weights' gradients that the last cell, a joined one, has left."""

        def layer(index: Array, carry: Carry) -> Carry:
            residuals = self.with_integers(carry.taken, row.b_microbatch)
            read = [residuals[i] for i in self.functions.weight_residuals]
            dweights = self.functions.backward_weight(self.weights(row.b_copy, index), read, carry.late)
            return self.with_gradient(carry, row.b_copy, index, dweights)

        with jax.named_scope("W"):
            return self.once(row, layer, carry)

    def weight_gradients(self, carry: Carry, row: Row) -> Carry:
        """Those that a backward put off."""

        def layer(index: Array, carry: Carry) -> Carry:
            residuals = self.residuals(carry, index, row.w_residual, row.w_microbatch)
            read = [residuals[i] for i in self.functions.weight_residuals]
            kept = [get(pool, index, row.w_deferred) for pool in carry.deferred]
            dweights = self.functions.backward_weight(self.weights(row.w_copy, index), read, kept)
            return self.with_gradient(carry, row.w_copy, index, dweights)

        return loop(0, self.num_layers(row.w_stage), layer, carry)

    # ------------------------------------------------------------------------------------------------------ the layers

    def forward_layer(self, row: Row, index: Array, state: tuple[Carry, Array]) -> tuple[Carry, Array]:
        """One layer of a forward."""
        carry, x = state
        weights, given = self.weights(row.f_copy, index), (x, self.work.integers(row.f_microbatch))
        x, stats, saved = self.functions.forward(weights, given)
        return self.with_forward(carry, row, index, stats, saved), x

    def backward_layer(
        self, row: Row, put_off: bool, count: Array, state: tuple[Carry, Array], taken: list[Array] | None = None
    ) -> tuple[Carry, Array]:
        """The layer that has `count` layers after it in its stage; `taken`: what its forward left, if not in pools."""
        carry, dx = state
        index = self.num_layers(row.b_stage) - 1 - count
        weights = self.weights(row.b_copy, index)
        if taken is None:
            residuals = self.residuals(carry, index, row.b_residual, row.b_microbatch)
        else:
            residuals = self.with_integers(taken, row.b_microbatch)
        if not put_off:
            (dx, _), dweights = self.functions.backward(weights, residuals, dx, self.work.dstats)
            return self.with_gradient(carry, row.b_copy, index, dweights), dx
        (dx, _), kept = self.functions.backward_input(weights, residuals, dx, self.work.dstats)
        pools = zip(carry.deferred, kept, strict=True)
        return dataclasses.replace(carry, deferred=[put(pool, v, index, row.b_deferred) for pool, v in pools]), dx

    def woven_layers(
        self, row: Row, ahead: Array, behind: Array, put_off: bool, state: tuple[Carry, Array, Array]
    ) -> tuple[Carry, Array, Array]:
        """Layer `ahead` of the forward and layer `behind` of the backward; with `put_off` for `late` to end."""
        carry, x, dx = state
        carry = self.take(carry, row, behind)
        (x, stats, saved), ((dx, _), left) = interleave_stages(
            self.functions,
            self.weights(row.f_copy, ahead),
            (x, self.work.integers(row.f_microbatch)),
            self.functions,
            self.weights(row.b_copy, behind),
            self.with_integers(carry.taken, row.b_microbatch),
            dx,
            self.work.dstats,
            put_off,
        )
        carry = self.with_forward(carry, row, ahead, stats, saved)
        if put_off:
            return dataclasses.replace(carry, late=left), x, dx
        return self.with_gradient(carry, row.b_copy, behind, left), x, dx

    # ----------------------------------------------------------------------------------------- before and after layers

    def enter(self, carry: Carry, row: Row) -> Carry:
        """In the first stage: what its first layer reads."""

        def enter(hidden: Array, z: Array) -> Array:
            return put(hidden, self.work.enter(self.extras, row.f_microbatch + z), row.f_x + z)

        return dataclasses.replace(carry, hidden=when(row.f_stage == 0, enter, carry.hidden))

    def end_forward(self, carry: Carry, row: Row, y: Array) -> Carry:
        """Gives the output on; where there is no backward pass to do it, the last stage sums up what `leave` says."""
        carry = dataclasses.replace(carry, hidden=put(carry.hidden, y, row.f_y))
        if self.keeps:
            return carry

        def leave(sums: Any, z: Array) -> Any:
            found = self.work.leave(self.extras, self.guests(row.f_copy + z), y, row.f_microbatch + z)[1]
            return jax.tree.map(jnp.add, sums, found)

        sums = when(row.f_stage == self.num_stages - 1, leave, carry.outcome.sums)
        return with_outcome(carry, sums=sums)

    def leave(self, carry: Carry, row: Row) -> Carry:
        """In the last stage: the losses of its output, whose entry takes their gradient."""

        def leave(state: tuple[Array, Outcome], z: Array) -> tuple[Array, Outcome]:
            hidden, outcome = state
            entry, microbatch, copy = row.b_g + z, row.b_microbatch + z, row.b_copy + z
            gradient = jax.grad(self.work.leave, argnums=(0, 1, 2), has_aux=True)
            arguments = self.extras, self.guests(copy), get(hidden, entry), microbatch
            (dextras, dguests, dy), sums = gradient(*arguments)
            dstack, first = outcome.dstack, copy * self.depth + self.work.layers[-1]
            for guest in range(self.work.guests):
                dstack = added(dstack, first + guest, layer_of(dguests, guest))
            more = jax.tree.map(jnp.add, (outcome.dextras, outcome.sums), (dextras, sums))
            return put(hidden, dy, entry), dataclasses.replace(outcome, dstack=dstack, dextras=more[0], sums=more[1])

        state = carry.hidden, carry.outcome
        hidden, outcome = when(row.b_stage == self.num_stages - 1, leave, state)
        return dataclasses.replace(carry, hidden=hidden, outcome=outcome)

    def end_backward(self, carry: Carry, row: Row, dx: Array) -> Carry:
        """Gives the gradient on; in the first stage to what enters, whose forward is computed again."""

        def enter(dextras: Any, z: Array) -> Any:
            _, pull = jax.vjp(lambda extras: self.work.enter(extras, row.b_microbatch + z), self.extras)
            return jax.tree.map(jnp.add, dextras, pull(dx + z.astype(dx.dtype))[0])

        carry = with_outcome(carry, dextras=when(row.b_stage == 0, enter, carry.outcome.dextras))
        return dataclasses.replace(carry, hidden=put(carry.hidden, dx, row.b_x))

    # ----------------------------------------------------------------------------------------- what the ranks keep

    def num_layers(self, stage: Array) -> Any:
        """Layers of a stage: a number where all stages have as many, else one that is known when the program runs."""
        if len(set(self.work.layers)) == 1:
            return self.depth
        return varying(jnp.asarray(self.work.layers))[stage]

    def weights(self, copy: Array, index: Array) -> Any:
        """Those of one layer."""
        return widened(layer_of(self.stack, copy * self.depth + index))

    def guests(self, copy: Any) -> Any:
        """The weights of a copy of the last stage that lie after its layers."""
        if not self.work.guests:
            return None
        start, count = copy * self.depth + self.work.layers[-1], self.work.guests
        return widened(jax.tree.map(lambda w: lax.dynamic_slice_in_dim(w, start, count), self.stack))

    def residuals(self, carry: Carry, index: Array, place: Array, microbatch: Array) -> list[Array]:
        """What the forward pass of a layer left, and its integers, looked up."""
        return self.with_integers([get(pool, index, place) for pool in carry.residual], microbatch)

    def with_integers(self, stored: list[Array], microbatch: Array) -> list[Array]:
        """What a layer's backward reads, from what is stored of it."""
        integers, rest = jax.tree.leaves(self.work.integers(microbatch)), iter(stored)
        return [integers[leaf - 1] if leaf else next(rest) for leaf in self.functions.residual_inputs]

    def take(self, carry: Carry, row: Row, index: Array) -> Carry:
        """Moves what a layer's backward reads out of the pools, before a forward puts anything into them.

        XLA would copy a whole pool where it cannot know that it is read before it is written. So the reading is a
        loop of one trip, of which the pools come out anew: a number is put where it is.
        """

        def take(state: tuple[list[Array], list[Array]], z: Array) -> tuple[list[Array], list[Array]]:
            first = [(index + z, row.b_residual, *(0,) * (pool.ndim - 2)) for pool in state[0]]
            pools = [
                put(pool, get(pool, *at) + z.astype(pool.dtype), *at) for pool, at in zip(state[0], first, strict=True)
            ]
            return pools, [get(pool, index + z, row.b_residual) for pool in pools]

        residual, taken = when(row.cell > 0, take, (carry.residual, carry.taken))
        return dataclasses.replace(carry, residual=residual, taken=taken)

    def with_forward(self, carry: Carry, row: Row, index: Array, stats: Any, saved: list[Array]) -> Carry:
        """What a layer's forward leaves, put away."""
        residual = carry.residual
        if self.keeps:
            pools = zip(residual, self.stored, strict=True)
            residual = [put(pool, saved[i], index, row.f_residual) for pool, i in pools]
        stats = added(carry.outcome.stats, row.f_copy * self.depth + index, stats)
        return with_outcome(dataclasses.replace(carry, residual=residual), stats=stats)

    def with_gradient(self, carry: Carry, copy: Array, index: Array, dweights: Any) -> Carry:
        """A layer's gradient, added up."""
        return with_outcome(carry, dstack=added(carry.outcome.dstack, copy * self.depth + index, dweights))
