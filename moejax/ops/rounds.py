"""Routed experts over several devices, dropping no token with a fixed memory.

The first round of the exchange carries what fits into the slots; that is usually all. It stands by itself, so that a
pipeline can overlap it with other work. Further rounds run in a loop only while some device of the axis has tokens
left, and the devices agree on their number. Of later rounds nothing is kept: the backward pass computes each again.
With two hops the same holds for what each of them receives. What the first hop brings is not kept either: where the
second has later rounds, which is seldom, the backward pass sends it again.

T tokens, K choices per token, E experts, e of them on this device, D model dim, F expert width, G = 2 * F, H hops.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.ops.exchange import Rows, Slots, Visits, assign_slots, combine, dispatch, dispatch_choices, find_visits
from moejax.ops.experts import plus, routed_swiglu, sort_by_expert
from moejax.ops.fp8 import keep_rows, kept_rows
from moejax.ops.hops import Exchange, Hop
from moejax.ops.routing import expert_counts
from moejax.varying import vary_over, zeros_varying


class _Sent(NamedTuple):
    """Where rows that a hop brought come from."""

    x: Array  # the tokens before it
    slots: Slots


class _Choices(NamedTuple):
    """What a hop's rounds share: integers only."""

    ids: Array
    visits: Visits
    rounds: Array  # how many there are


def exchanged_swiglu(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    ids_TK: Int[Array, "T K"],
    gate_up_eDG: Float[Array, "e D G"],
    down_eFD: Float[Array, "e F D"],
    exchange: Exchange,
) -> tuple[Float[Array, "T D"], Int[Array, "H"]]:
    """The sum over each token's choices of the choice's weight times the SwiGLU of its expert, wherever that is.

    All arrays are this device's own; it stands in `jax.shard_map`, and every device of the exchange's axis calls it.
    Experts are numbered through over the axis; a choice of -1 is absent. The gradients of the experts' matrices are
    float32. An exchange without hops is one device's `routed_swiglu`, with every choice present.

    Returns:
        y: in `x`'s dtype; summed in float32 at each hop and in each round.
        rounds: of each hop; of the second the most in any round of the first. Equal on all devices of the axis.
    """
    if not exchange.hops:
        sizes_E = expert_counts(ids_TK, gate_up_eDG.shape[0])
        rows = *sort_by_expert(ids_TK), sizes_E
        y_TD = routed_swiglu(x_TD, weights_TK, gate_up_eDG, down_eFD, *rows, fp8=exchange.fp8)
        return y_TD, jnp.ones((0,), jnp.int32)
    arrays = (x_TD, weights_TK, ids_TK, gate_up_eDG, down_eFD)
    axes = {exchange.hops[0].axis}.union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    x, weights, ids, gate_up, down = (vary_over(a, axes) for a in arrays)
    y_TD, rounds = _exchanged(Rows.of(x, exchange.fp8), weights, (gate_up, down), ids, exchange, True)
    return y_TD, jnp.stack(rounds)


def _exchanged(
    rows: Rows,
    weights: Array,
    experts: tuple[Array, Array],
    ids: Array,
    exchange: Exchange,
    keep: bool,
    sent: _Sent | None = None,
    by: Hop | None = None,
) -> tuple[Array, tuple[Array, ...]]:
    """The tokens' results, and the rounds of each hop left. `keep=False`: the backward pass keeps nothing.

    `rows` are what the hop `by` brought of `sent`, if there was one.
    """
    if not exchange.hops:
        return _local(rows, weights, experts, ids, exchange, keep), ()
    hop = exchange.hops[0]
    visits, most = find_visits(ids, _experts_each(experts, exchange), hop.destinations)
    if hop.slots >= rows.x.shape[0]:
        choices = _Choices(ids, visits, jnp.ones_like(most))
        y, inner = _round(0, rows, weights, experts, choices, exchange, keep)
    else:
        most = lax.all_gather(jnp.maximum(most, 1), hop.axis).max()
        choices = _Choices(ids, visits, checkpoint_name(-(-most // hop.slots), "exchange_rounds"))
        y, inner = _rounds(rows, weights, experts, choices, exchange, keep, sent, by)
    return y, (choices.rounds, *inner)


def _experts_each(experts: tuple[Array, Array], exchange: Exchange) -> int:
    """Experts at each destination of the first hop."""
    each = experts[0].shape[0]
    for hop in exchange.hops[1:]:
        each *= hop.destinations
    return each


def _local(
    rows: Rows, weights: Array, experts: tuple[Array, Array], ids: Array, exchange: Exchange, keep: bool
) -> Array:
    num_experts = experts[0].shape[0]
    order_R, row_TK = sort_by_expert(jnp.where(ids < 0, num_experts, ids))
    sorted_rows = order_R, row_TK, expert_counts(ids, num_experts)
    arrays = (rows.x, weights, *experts, *sorted_rows)
    return routed_swiglu(*arrays, exchange.max_rows, keep, exchange.fp8, rows.scaled)


def _round(
    number: Array | int,
    rows: Rows,
    weights: Array,
    experts: tuple[Array, Array],
    choices: _Choices,
    exchange: Exchange,
    keep: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """What round `number` adds to the tokens' results, and the rounds of the hops after this one."""
    hop, each = exchange.hops[0], _experts_each(experts, exchange)
    slots = assign_slots(choices.visits, number, hop)
    brought = _kept(dispatch(rows, slots, hop))
    received = dispatch_choices(choices.ids, weights, slots, each, hop)
    ids_SK, weights_SK = checkpoint_name(received, "dispatched_choices")
    rest = dataclasses.replace(exchange, hops=exchange.hops[1:])
    y, inner = _exchanged(brought, weights_SK, experts, ids_SK, rest, keep, _Sent(rows.x, slots), hop)
    return combine(y, slots, hop).astype(rows.x.dtype), inner


def _kept(rows: Rows) -> Rows:
    """Rows that the backward pass is not to send again, kept as they travelled."""
    if rows.scaled is None:
        return Rows(checkpoint_name(rows.x, "dispatched"), None)
    return Rows(rows.x, kept_rows(keep_rows(rows.scaled, "dispatched")))


# ----------------------------------------------------------------------------------------------------------- all rounds


def _rounds(
    rows: Rows,
    weights: Array,
    experts: tuple[Array, Array],
    choices: _Choices,
    exchange: Exchange,
    keep: bool,
    sent: _Sent | None,
    by: Hop | None,
) -> tuple[Array, tuple[Array, ...]]:
    """The sum of all rounds, and the rounds of the hops after this one.

    The later rounds are a pair of functions around the first: `_add_rounds` adds their results to the first round's,
    and `_open_rounds`, whose backward pass comes last, their gradients to the first round's gradients. So a step that
    has no later round neither fills arrays of the matrices' size with zeros nor adds them. The gradient of the results
    gets there through `port`, which carries nothing forward.
    """
    x, weights, experts, port = _open_rounds(rows.x, weights, experts, choices, sent, by, exchange, int(keep))
    rows = rows._replace(x=x)
    y, inner = zeros_varying(x.shape, x.dtype, x), (jnp.zeros_like(choices.rounds),) * (len(exchange.hops) - 1)
    if keep:
        y, inner = _round(0, rows, weights, experts, choices, exchange, keep)
    return _add_rounds(y, port, inner, rows, weights, _narrow(experts, x.dtype), choices, exchange, int(keep))


def _narrow(experts: tuple[Array, Array], dtype: Any) -> tuple[Array, Array]:
    """As products take them: a loop that reads them keeps them so, not in float32."""
    return jax.tree.map(lambda w: lax.stop_gradient(w).astype(dtype), experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _add_rounds(
    y: Array,
    port: Array,
    inner: tuple[Array, ...],
    rows: Rows,
    weights: Array,
    experts: tuple[Array, Array],
    choices: _Choices,
    exchange: Exchange,
    first: int,
) -> tuple[Array, tuple[Array, ...]]:
    def add(number: Array, sums: tuple) -> tuple:
        y, inner = _round(number, rows, weights, experts, choices, exchange, False)
        return plus(sums[0], y), jax.tree.map(jnp.maximum, sums[1], inner)

    return lax.fori_loop(first, choices.rounds, add, (y, inner))


def _add_rounds_forward(*arguments):
    return _add_rounds(*arguments), None


def _add_rounds_backward(exchange: Exchange, first: int, _: None, cotangents: tuple) -> tuple:
    dy = cotangents[0]
    return dy, dy, None, None, None, None, None


_add_rounds.defvjp(_add_rounds_forward, _add_rounds_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _open_rounds(
    x: Array,
    weights: Array,
    experts: tuple[Array, Array],
    choices: _Choices,
    sent: _Sent | None,
    by: Hop | None,
    exchange: Exchange,
    first: int,
) -> tuple[Array, Array, tuple[Array, Array], Array]:
    """`x`, `weights` and `experts` as they are, and the port."""
    return x, weights, experts, zeros_varying(x.shape, x.dtype, x)


def _open_rounds_forward(x, weights, experts, choices, sent, by, exchange, first):
    saved = x if by is None else sent
    return _open_rounds(x, weights, experts, choices, sent, by, exchange, first), (saved, weights, experts, choices)


def _open_rounds_backward(by: Hop | None, exchange: Exchange, first: int, saved: tuple, cotangents: tuple) -> tuple:
    """Tokens' gradients and experts' come from two loops, so that a pipeline can defer the latter."""
    source, weights, experts, choices = saved
    dx, dweights, dexperts, dy = cotangents
    experts = _narrow(experts, dx.dtype)

    def rows_again() -> Rows:
        if by is None:
            return Rows.of(source, exchange.fp8)
        return dispatch(Rows.of(source.x, exchange.fp8), source.slots, by)

    def y_of(number: Array, rows: Rows, weights: Array, experts: tuple[Array, Array]) -> Array:
        return _round(number, rows, weights, experts, choices, exchange, False)[0]

    def add_tokens(number: Array, sums: tuple) -> tuple:
        rows = rows_again()
        _, pull = jax.vjp(lambda x, weights: y_of(number, rows._replace(x=x), weights, experts), rows.x, weights)
        return jax.tree.map(plus, sums, pull(dy))

    def add_experts(number: Array, sums: tuple) -> tuple:
        rows = rows_again()
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), experts)  # its gradients are
        _, pull = jax.vjp(lambda experts: y_of(number, rows, weights, experts), wide)
        return jax.tree.map(jnp.add, sums, pull(dy)[0])

    dx, dweights = lax.fori_loop(first, choices.rounds, add_tokens, (dx, dweights))
    dexperts = jax.tree.map(lambda d: d.astype(jnp.float32), dexperts)
    return dx, dweights, lax.fori_loop(first, choices.rounds, add_experts, dexperts), None, None


_open_rounds.defvjp(_open_rounds_forward, _open_rounds_backward)
