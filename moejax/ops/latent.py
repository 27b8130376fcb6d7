"""Attention over cached latents: the decode form of MLA, with the up-projections absorbed (arXiv:2405.04434, 2.1.2).

A head's key is its matrix times the token's latent, so its product with a query is the query, through the transpose of
that matrix, times the latent itself: `q (W c) = (q W) c`. Values come the same way out of the sum of the latents. So
what is kept of a token is its latent and one rotated key, for all heads together.

Slot n of a row holds its token at the position n. What lies beyond a query's position is not seen, whatever it is.

B rows, S new positions, N slots, H heads, K dims of a head's key without position, R of the rotated one, V of a value,
C width of the latent, E = C + R.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.varying import zeros_varying

BLOCK = 512  # slots that are read at a time
_NEVER = -1e30  # as in attention.py


def absorb_queries(
    q_BSHK: Float[Array, "B S H K"], rotary_BSHR: Float[Array, "B S H R"], key_CHK: Float[Array, "C H K"]
) -> Float[Array, "B S H E"]:
    """Queries as `attend` takes them, from both parts of a head's query and its keys' up-projection."""
    latent_BSHC = jnp.einsum("bshk,chk->bshc", q_BSHK, key_CHK)
    return jnp.concatenate([latent_BSHC, rotary_BSHR], axis=-1)


def store(
    cache_BNE: Float[Array, "B N E"], new_BSE: Float[Array, "B S E"], positions_BS: Int[Array, "B S"]
) -> Float[Array, "B N E"]:
    """The cache with new tokens in the slots of their positions; those below 0 or beyond the last slot are left out."""
    rows_B1 = jnp.arange(len(cache_BNE))[:, None]
    slots_BS = jnp.where(positions_BS < 0, cache_BNE.shape[1], positions_BS)
    return cache_BNE.at[rows_B1, slots_BS].set(new_BSE, mode="drop")


def attend(
    q_BSHE: Float[Array, "B S H E"],
    cache_BNE: Float[Array, "B N E"],
    positions_BS: Int[Array, "B S"],
    width: int,
    scale: float,
    block: int = BLOCK,
) -> Float[Array, "B S H C"]:
    """Each head's mean latent under softmax(scale * q c) over the slots up to the query's own position.

    The softmax is float32; products take their operands in `q`'s dtype and sum in float32. The work follows the
    farthest position, not the number of slots, which is a multiple of `block` if it is above it.

    Args:
        q_BSHE: from `absorb_queries`.
        cache_BNE: of each slot the latent, then the rotated key.
        positions_BS: of the queries.
        width: C.
        scale: of products before the softmax.
        block: slots that are read at a time.
    """
    batch, length, heads, _ = q_BSHE.shape
    slots = cache_BNE.shape[1]
    size = min(block, slots)
    assert slots % size == 0, f"{slots} slots are not a multiple of {size}"

    def add(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        cached_BnE = jax.lax.dynamic_slice_in_dim(cache_BNE, j * size, size, axis=1)
        scores = jnp.einsum("bshe,bne->bshn", q_BSHE, cached_BnE, preferred_element_type=jnp.float32) * scale
        seen_BSn = j * size + jnp.arange(size) <= positions_BS[..., None]
        scores = jnp.where(seen_BSn[:, :, None], scores, _NEVER)
        new_top = jnp.maximum(top, scores.max(-1))
        weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        latent_BnC = cached_BnE[..., :width]
        part = jnp.einsum(
            "bshn,bnc->bshc", weights.astype(q_BSHE.dtype), latent_BnC, preferred_element_type=jnp.float32
        )
        return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + part

    rows = zeros_varying((batch, length, heads), jnp.float32, q_BSHE)
    carry = (rows + _NEVER, rows, zeros_varying((batch, length, heads, width), jnp.float32, q_BSHE))
    blocks = 1 if size == slots else jnp.minimum(positions_BS.max(), slots - 1) // size + 1
    _, total, out = add(0, carry) if size == slots else jax.lax.fori_loop(0, blocks, add, carry)
    return (out / total[..., None]).astype(q_BSHE.dtype)


def values_of(latent_BSHC: Float[Array, "B S H C"], value_CHV: Float[Array, "C H V"]) -> Float[Array, "B S H V"]:
    """Each head's value, from its mean latent."""
    return jnp.einsum("bshc,chv->bshv", latent_BSHC, value_CHV)
