"""What the devices hold of a batch that is being answered, and what one step does to it.

A row's token at the position n lies in slot n of every cache. A step computes the newest token, p, and the K drafts
after it; what is in slots beyond the tokens that are kept is overwritten before anything sees it, so that nothing is
ever taken back. Plain decoding is the same step with K = 0.

The MTP modules are the draft: module k reads the hidden state of position n and the token n + k, and its output there
predicts the token n + k + 1 (arXiv:2412.19437, section 2.2). Its newest K - 1 entries were made with drafts in place of
tokens; so in every step the modules compute the last 2 K positions again, which are all that may have changed.

Functions here are called inside `jax.shard_map`; B rows of this device, T slots for tokens, D model dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.model.decoder import (
    Cache,
    Decoder,
    embedded,
    final_norm,
    mtp_norm,
    run_blocks,
    run_mtp,
    scores,
)
from moejax.serve.sampling import accepted, draw, keys_for, probabilities

_DRAFT, _CHANCE, _TOKEN = 1, 0x10000, 0x20000  # what a key is for; a draft's number is added


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch of token sequences."""

    tokens: Any  # int32 [B, T]: those that are known; what follows is anything
    length: Any  # int32 [B]: how many are known, at least 1; the newest is in no cache yet
    number: Any  # int32 [B]: of the next token of the answer, from 0
    keys: Any  # uint32 [B, W]
    cache: Cache
    # [B, 2 K, D]: what the first MTP module reads of the last positions that are in the cache. [B, 1, D] and not read
    # without modules: jax 0.11 dies of an empty array that is an input of a program on several devices
    recent: Any


def prefill(model: Decoder, rows: Rows, start: Int[Array, ""], size: int) -> Rows:
    """The rows with `size` positions from `start` on in their caches.

    A row that ends before leaves entries in slots beyond its end, which nothing sees.
    """
    dtype = rows.recent.dtype
    positions_BS = start + jnp.broadcast_to(jnp.arange(size), (len(rows.tokens), size))
    x_BSD = embedded(model, _tokens_at(rows, positions_BS), dtype)
    x_BSD, cache = run_blocks(model, x_BSD, positions_BS, rows.cache)
    if not cache.mtp:
        return dataclasses.replace(rows, cache=cache)
    hidden_BSD = _read_by_mtp(model, x_BSD)
    done_B = rows.length - 1  # positions that are to be in the cache, in the end
    moved_B = jnp.minimum(start + size, done_B) - jnp.minimum(start, done_B)
    recent = _slid(rows.recent, hidden_BSD, moved_B)
    for depth in range(len(cache.mtp)):
        following = embedded(model, _tokens_at(rows, positions_BS + depth + 1), dtype)
        hidden_BSD, cache = run_mtp(model, depth, hidden_BSD, following, positions_BS, cache)
    return dataclasses.replace(rows, cache=cache, recent=recent)


def step(
    model: Decoder, rows: Rows, kind: str, numbers: tuple
) -> tuple[Rows, tuple[Int[Array, "B S"], Int[Array, "B"]]]:
    """The rows with 1 to S = K + 1 more tokens each; those tokens, and how many of them count.

    `kind` and `numbers` are those of `Sampling`.
    """
    depth = len(rows.cache.mtp)
    newest_B = rows.length - 1
    rows, drafted_BKV = _drafted(model, rows, kind, numbers)
    positions_BS = newest_B[:, None] + jnp.arange(depth + 1)
    inputs_BS = _tokens_at(rows, positions_BS)
    x_BSD, cache = run_blocks(model, embedded(model, inputs_BS, rows.recent.dtype), positions_BS, rows.cache)
    normed_BSD = final_norm(model, x_BSD)
    probs_BSV = probabilities(scores(model, normed_BSD), kind, numbers)
    chance_BK = _uniform(keys_for(rows.keys, rows.number, _CHANCE), depth)
    kept_B, probs_BV = accepted(inputs_BS[:, 1:], drafted_BKV, probs_BSV, chance_BK)
    token_B = draw(probs_BV, keys_for(rows.keys, rows.number + kept_B, _TOKEN), kind)
    moved_B = kept_B + 1
    rows = _put(rows, rows.length + kept_B, token_B)
    recent = rows.recent
    if depth:
        recent = _slid(recent, normed_BSD if model.cfg.mtp.after_final_norm else x_BSD, moved_B)
    new_BS = _tokens_at(rows, positions_BS + 1)
    rows = dataclasses.replace(
        rows, length=rows.length + moved_B, number=rows.number + moved_B, cache=cache, recent=recent
    )
    return rows, (new_BS, moved_B)


def _drafted(model: Decoder, rows: Rows, kind: str, numbers: tuple) -> tuple[Rows, Float[Array, "B K V"]]:
    """The rows with drafts after their newest token, and the probabilities that each draft was drawn from."""
    count, dtype = len(rows.cache.mtp), rows.recent.dtype
    hidden_BSD, cache, drafted = rows.recent, rows.cache, []
    positions_BS = rows.length[:, None] - 1 + jnp.arange(-2 * count, 0)
    for depth in range(count):
        following = embedded(model, _tokens_at(rows, positions_BS + depth + 1), dtype)
        hidden_BSD, cache = run_mtp(model, depth, hidden_BSD, following, positions_BS, cache)
        normed_B1D = mtp_norm(model, depth, hidden_BSD[:, -1:])
        probs_BV = probabilities(scores(model, normed_B1D)[:, 0], kind, numbers)
        token_B = draw(probs_BV, keys_for(rows.keys, rows.number + depth, _DRAFT + depth), kind)
        rows = _put(rows, rows.length + depth, token_B)
        drafted.append(probs_BV)
    shape = len(rows.tokens), 0, model.cfg.vocab_size
    stacked = jnp.stack(drafted, axis=1) if drafted else jnp.zeros(shape, jnp.float32)
    return dataclasses.replace(rows, cache=cache), stacked


def _read_by_mtp(model: Decoder, x_BSD: Array) -> Float[Array, "B S D"]:
    return final_norm(model, x_BSD) if model.cfg.mtp.after_final_norm else x_BSD


def _tokens_at(rows: Rows, positions_BS: Array) -> Int[Array, "B S"]:
    return jnp.take_along_axis(rows.tokens, jnp.clip(positions_BS, 0, rows.tokens.shape[1] - 1), axis=1)


def _put(rows: Rows, positions_B: Array, token_B: Array) -> Rows:
    """The rows with a token at a position each; left out where there is no slot for it."""
    tokens = rows.tokens.at[jnp.arange(len(rows.tokens)), positions_B].set(token_B, mode="drop")
    return dataclasses.replace(rows, tokens=tokens)


def _slid(recent_BWD: Array, new_BSD: Array, moved_B: Array) -> Array:
    """The last W of each row's states after `moved` of the new ones."""
    joined = jnp.concatenate([recent_BWD, new_BSD], axis=1)
    places_BW = moved_B[:, None] + jnp.arange(recent_BWD.shape[1])
    return jnp.take_along_axis(joined, places_BW[..., None], axis=1)


def _uniform(keys_B: Array, count: int) -> Float[Array, "B K"]:
    def one(key: Any) -> Array:
        return jax.random.uniform(jax.random.wrap_key_data(key), (count,))

    return jax.vmap(one)(keys_B)
