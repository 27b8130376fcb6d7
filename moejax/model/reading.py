"""What a model makes of text, token by token: how well it predicts each, and where its experts send it.

B sequences of N = S + 1 tokens, S of which are read and S predicted; L MoE layers of the main model, K experts a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.model.block import Block
from moejax.model.moe import MoE
from moejax.model.shards import gather_for_use
from moejax.model.transformer import Transformer


class Reading(NamedTuple):
    """Of each token."""

    nats: Array  # float32 [B, S]: cross entropy of the next token
    best: Array  # bool [B, S]: no other token was likelier than the next
    experts: Array  # int32 [L, B, S, K]: those that it was sent to, best first


def read(
    model: Transformer, tokens_BN: Int[Array, "B N"], segment_ids_BN: Int[Array, "B N"] | None, dtype: DTypeLike
) -> Reading:
    """Reads tokens; stands in `jax.shard_map`, on the weights of `gather_for_step`, as the methods of `Transformer`.

    The scores of one sequence exist at a time.
    """
    segments_BS = None if segment_ids_BN is None else segment_ids_BN[:, :-1]
    x_BSD = model.enter(model.embed(tokens_BN[:, :-1], dtype), segments_BS)
    positions_BS = jnp.arange(x_BSD.shape[1])[None]

    def layer(x: Array, block: Block) -> tuple[Array, Array]:
        block = gather_for_use(block, model.mesh, dtype)
        x = x + block.attention(block.attention_norm(x), positions_BS, segments_BS)
        ffn, normed = block.ffn, block.ffn_norm(x)
        assert isinstance(ffn, MoE)
        ids_TK = ffn.route(normed.reshape(-1, normed.shape[-1]))[0]  # once more: XLA computes it once
        return x + ffn(normed)[0], ids_TK.reshape(*x.shape[:2], -1)

    experts = jnp.zeros((0, *x_BSD.shape[:2], model.cfg.moe.top_k), jnp.int32)
    if model.moe_blocks is not None:
        x_BSD, experts = jax.lax.scan(layer, x_BSD, model.moe_blocks)

    def judge(sequence: tuple[Array, Array]) -> tuple[Float[Array, "S"], Array]:
        x_SD, next_S = sequence
        scores_SV = model._scores(x_SD)
        own_S = jnp.take_along_axis(scores_SV, next_S[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(scores_SV, axis=-1) - own_S, own_S >= scores_SV.max(-1)

    nats_BS, best_BS = jax.lax.map(judge, (x_BSD, tokens_BN[:, 1:]))
    return Reading(nats_BS, best_BS, experts)
