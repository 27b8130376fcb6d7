"""From scores to a token: temperature, top-k and top-p, and the acceptance of drafts.

A draft that was drawn from the probabilities q is accepted with the probability min(1, p / q), p being the model's own;
after the first that is not, a token is drawn from max(p - q, 0), and after the last draft from p. So every token has
the probabilities p, whatever q is (speculative sampling, arXiv:2211.17192). At temperature 0 both are 1 for one token.

B rows, S positions, K drafts, V vocabulary, W words of a key.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from moejax.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0  # scores are divided by it; 0: always the likeliest token
    top_k: int = 0  # tokens are drawn from so many likeliest ones; 0: from all
    top_p: float = 1.0  # tokens are drawn from the likeliest that together have at least this probability

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError("temperature", self.temperature, "0 or more")
        if self.top_k < 0:
            raise ConfigError("top_k", self.top_k, "0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "above 0, at most 1")

    @property
    def kind(self) -> Literal["greedy", "plain", "filtered"]:
        """What is compiled; sorting a vocabulary takes longer than a small model."""
        return "greedy" if self.temperature == 0 else "plain" if not self.top_k and self.top_p == 1 else "filtered"


def probabilities(scores: Float[Array, "*B V"], kind: str, numbers: tuple) -> Float[Array, "*B V"]:
    """Those with which a token is drawn, float32; exactly 0 for tokens that are left out.

    `kind` is of a `Sampling`, and `numbers` are its fields.
    """
    temperature, top_k, top_p = numbers
    if kind == "greedy":
        return jax.nn.one_hot(scores.argmax(-1), scores.shape[-1], dtype=jnp.float32)
    scaled = scores / temperature
    return jax.nn.softmax(_filtered(scaled, top_k, top_p) if kind == "filtered" else scaled, axis=-1)


def _filtered(scaled: Array, top_k: Array, top_p: Array) -> Float[Array, "*B V"]:
    """The scores, -inf for tokens that are left out; top-p is of the probabilities that top-k leaves."""
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    size = scaled.shape[-1]
    rank = jnp.arange(size)
    ranked = jnp.where(rank < jnp.where(top_k > 0, top_k, size), ranked, -jnp.inf)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # probability of all that are likelier
    ranked = jnp.where((before < top_p) | (rank == 0), ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def draw(probs_BV: Float[Array, "B V"], keys_B: UInt32[Array, "B W"], kind: str) -> Int[Array, "B"]:
    """A token of each row, never one of probability 0."""
    if kind == "greedy":
        return probs_BV.argmax(-1).astype(jnp.int32)
    return jax.vmap(lambda key, probs: jax.random.categorical(_key(key), jnp.log(probs)))(keys_B, probs_BV).astype(
        jnp.int32
    )


def keys_for(
    keys_B: UInt32[Array, "B W"], number_B: Int[Array, "B"], purpose: Int[Array, ""] | int
) -> UInt32[Array, "B W"]:
    """A key of each row for the token number `number` of its answer: the same in whatever batch it is."""

    def one(key: Array, number: Array) -> Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(_key(key), number), purpose))

    return jax.vmap(one)(keys_B, number_B)


def _key(data: Array) -> Array:
    return jax.random.wrap_key_data(data)


def accepted(
    drafts_BK: Int[Array, "B K"],
    drafted_BKV: Float[Array, "B K V"],
    probs_BSV: Float[Array, "B S V"],
    chance_BK: Float[Array, "B K"],
) -> tuple[Int[Array, "B"], Float[Array, "B V"]]:
    """How many drafts each row keeps, and the probabilities of the token after them; S = K + 1.

    Args:
        drafts_BK: tokens, drawn one after the other.
        drafted_BKV: the probabilities that each was drawn from.
        probs_BSV: the model's, before each draft and after the last.
        chance_BK: uniform in [0, 1).
    """
    count = drafts_BK.shape[1]
    q_BK = jnp.take_along_axis(drafted_BKV, drafts_BK[..., None], axis=-1)[..., 0]
    p_BK = jnp.take_along_axis(probs_BSV[:, :count], drafts_BK[..., None], axis=-1)[..., 0]
    kept_BK: Bool[Array, "B K"] = chance_BK * q_BK < p_BK
    kept_B = jnp.cumprod(kept_BK.astype(jnp.int32), axis=1).sum(1)

    def at_end(values_BSV: Array) -> Array:
        return jnp.take_along_axis(values_BSV, kept_B[:, None, None], axis=1)[:, 0]

    p_BV, q_BV = at_end(probs_BSV), at_end(jnp.pad(drafted_BKV, ((0, 0), (0, 1), (0, 0))))
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    total_B1 = rest_BV.sum(-1, keepdims=True)
    return kept_B, jnp.where(total_B1 > 0, rest_BV / total_B1, p_BV)  # a total of 0 is rounding
