"""Tokens move to the devices of their experts, and results back: one hop of the exchange, one round of it.

Every pair of devices has a fixed number of slots. A token has one slot at each destination that holds experts of it,
however many; those that find none left go in a later round (`rounds`). The backward pass of `dispatch` is a combine,
and the reverse. With a row travel the token's choices there and their weights, so that the receiver goes on as with
tokens of its own.

T tokens, K choices per token, D model dim, n destinations, C slots per pair, S = n * C.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.ops.fp8 import ScaledRows, dequantise_rows, quantise_rows
from moejax.ops.hops import Hop
from moejax.varying import vary_like


class Rows(NamedTuple):
    """Tokens, or what a hop has brought of them. Gradients are those of `x`."""

    x: Array  # [*, D]
    scaled: ScaledRows | None  # with FP8 the same numbers, as they travel: scales are powers of two

    @classmethod
    def of(cls, x: Array, fp8: bool) -> "Rows":
        """Tokens before the first hop."""
        return cls(x, quantise_rows(lax.stop_gradient(x), power_of_two=True) if fp8 else None)


class Visits(NamedTuple):
    """Where tokens have to go, in whatever round: a token's first choice at a destination stands for the visit."""

    target: Array  # int32: destination of the visit; n where the choice is absent or not its token's first there
    rank: Array  # int32: number of the visit among those from here to that destination


class Slots(NamedTuple):
    """The visits of one round. Both maps say the same."""

    slot: Array  # int32: in [0, S); S where there is no visit
    token: Array  # int32: in [0, T); T where the slot is empty


# ------------------------------------------------------------------------------------------------------- who and where


def find_visits(ids_TK: Int[Array, "T K"], experts_each: int, destinations: int) -> tuple[Visits, Int[Array, ""]]:
    """The visits of tokens whose destination n holds the experts from `n * experts_each` on, and the most to one.

    A choice of -1 is absent.
    """
    target_TK = jnp.where(ids_TK < 0, destinations, ids_TK // experts_each)
    visits_Tn = (target_TK[:, :, None] == jnp.arange(destinations)).any(1).astype(jnp.int32)
    rank_Tn = jnp.cumsum(visits_Tn, axis=0) - visits_Tn
    rank_TK = jnp.take_along_axis(rank_Tn, jnp.minimum(target_TK, destinations - 1), axis=1)
    target_TK = jnp.where(_seen_before(target_TK), destinations, target_TK)
    return Visits(target_TK, rank_TK), visits_Tn.sum(0).max()


def _seen_before(target_TK: Array) -> Bool[Array, "T K"]:
    equal_TKK = target_TK[:, :, None] == target_TK[:, None, :]
    return (equal_TKK & jnp.tri(target_TK.shape[1], k=-1, dtype=bool)).any(-1)


def assign_slots(visits: Visits, number: Int[Array, ""] | int, hop: Hop) -> Slots:
    """The slots of round `number`: of each pair's visits those from `number * hop.slots` on."""
    target_TK, rank_TK = visits
    tokens, choices = target_TK.shape
    here_TK = (target_TK < hop.destinations) & (rank_TK // hop.slots == number)
    slot_TK = jnp.where(here_TK, target_TK * hop.slots + rank_TK % hop.slots, hop.rows)
    token_TK = lax.broadcasted_iota(jnp.int32, (tokens, choices), 0)
    token_S = vary_like(jnp.full((hop.rows,), tokens, jnp.int32), slot_TK)
    return Slots(slot_TK, token_S.at[slot_TK].set(vary_like(token_TK, slot_TK), mode="drop"))


# ------------------------------------------------------------------------------------------------------ there and back


def _all_to_all(rows_S: Array, hop: Hop) -> Array:
    return lax.all_to_all(rows_S, hop.axis, 0, 0, axis_index_groups=hop.groups, tiled=True)


def _filled(values_T: Array, slots: Slots, empty: int = 0) -> Array:
    """Each slot's token's values; `empty` in a slot without one."""
    return values_T.at[slots.token].get(mode="fill", fill_value=empty)


def _summed(rows_S: Array, slots: Slots) -> Array:
    """The sum over each token's slots, in float32; the gradient of `_filled`."""
    terms = (rows_S.at[slot_T].get(mode="fill", fill_value=0).astype(jnp.float32) for slot_T in slots.slot.T)
    return sum(terms, jnp.zeros((), jnp.float32))


def _to_experts(rows: Rows, slots: Slots, hop: Hop) -> Rows:
    """In FP8 rows arrive as what their E4M3 numbers stand for, which BF16 holds exactly: scales are powers of two.

    Quantising them again would change nothing.
    """
    if rows.scaled is None:
        return Rows(_all_to_all(_filled(rows.x, slots), hop), None)
    received = ScaledRows(*(_all_to_all(_filled(a, slots), hop) for a in rows.scaled))
    return Rows(dequantise_rows(received).astype(rows.x.dtype), received)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(rows: Rows, slots: Slots, hop: Hop) -> Rows:
    """The rows that this device receives: slot c of those from source i is row `i * hop.slots + c`; 0 if empty."""
    return _to_experts(rows, slots, hop)


def _dispatch_backward(hop: Hop, slots: Slots, drows: Rows) -> tuple[Rows, None]:
    return Rows(_summed(_all_to_all(drows.x, hop), slots).astype(drows.x.dtype), None), None


dispatch.defvjp(lambda rows, slots, hop: (_to_experts(rows, slots, hop), slots), _dispatch_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(rows_SD: Float[Array, "S D"], slots: Slots, hop: Hop) -> Float[Array, "T D"]:
    """The sum of what comes back for each token, float32. The rows are in the order in which `dispatch` gave them."""
    return _summed(_all_to_all(rows_SD, hop), slots)


def _combine_backward(hop: Hop, saved: tuple[Array, Slots], dy_TD: Array) -> tuple[Array, None]:
    like, slots = saved
    return _to_experts(Rows.of(dy_TD.astype(like.dtype), hop.fp8), slots, hop).x, None


combine.defvjp(
    lambda rows, slots, hop: (combine(rows, slots, hop), (jnp.zeros((0,), rows.dtype), slots)), _combine_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dispatch_choices(
    ids_TK: Int[Array, "T K"], weights_TK: Float[Array, "T K"], slots: Slots, experts_each: int, hop: Hop
) -> tuple[Int[Array, "S K"], Float[Array, "S K"]]:
    """The choices of the rows that `dispatch` gives, and their weights (float32), in one all-to-all.

    An expert's number counts from the first one of this device (or node); -1: a choice that is not here.
    """
    first_S = jnp.arange(hop.rows, dtype=jnp.int32) // hop.slots * experts_each
    ids_SK = _filled(ids_TK, slots, empty=-1) - first_S[:, None]
    ids_SK = jnp.where((ids_SK >= 0) & (ids_SK < experts_each), ids_SK, -1)
    bits_SK = lax.bitcast_convert_type(_filled(weights_TK, slots), jnp.int32)
    received = _all_to_all(jnp.concatenate([ids_SK, bits_SK], axis=1), hop)
    ids_SK, bits_SK = jnp.split(received, 2, axis=1)
    return ids_SK, lax.bitcast_convert_type(bits_SK, jnp.float32)


def _dispatch_choices_backward(experts_each: int, hop: Hop, slots: Slots, cotangents: tuple) -> tuple:
    """The gradient of an absent choice's weight is 0, so that each choice has its own from the one place it went to."""
    return None, _summed(_all_to_all(cotangents[1], hop), slots), None


dispatch_choices.defvjp(
    lambda ids, weights, slots, each, hop: (dispatch_choices(ids, weights, slots, each, hop), slots),
    _dispatch_choices_backward,
)
