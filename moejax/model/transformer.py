"""The whole model: embedding, leading dense blocks, MoE blocks, norm and head, MTP modules.

B batch, S positions, N = S + 1 tokens, D model dim, V vocabulary, L MoE layers (main, then MTP), E experts.
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax.config import MeshConfig, ModelConfig
from moejax.model.block import Block, run_stack, stack
from moejax.model.layers import Norm, matrix
from moejax.model.moe import BlockStats
from moejax.model.mtp import module_at, stack_modules
from moejax.model.shards import SHARDS, gather_for_use
from moejax.ops.embedding import embed
from moejax.ops.loss import cross_entropy


@jax.tree_util.register_dataclass
@dataclass
class Losses:
    """What one forward pass adds up to; sums over tokens, so that micro-batches can be added."""

    main: Array  # float32 []: sum of next-token cross entropies, nats
    mtp: Array  # float32 []: the same of the MTP modules, averaged over the depths
    balance: Array  # float32 []: weighted balance losses: sum over layers, mean over sequences
    counts: Array  # int32 [L, E]: tokens per expert
    rounds: Array  # int32 []: rounds of the expert exchange, summed over the layers

    def with_stats(self, stats: list[BlockStats]) -> "Losses":
        """These losses and what more MoE layers, which come before, report; the stats have a leading dim of layers."""
        return Losses(
            main=self.main,
            mtp=self.mtp,
            balance=sum((s.balance_loss.sum() for s in stats), self.balance),
            counts=jnp.concatenate([*(s.counts for s in stats), self.counts]),
            rounds=sum((s.rounds.sum() for s in stats), self.rounds),
        )


class Transformer(nnx.Module):
    """DeepSeek-V3's model; V2 and V2-Lite are other values of its config.

    Its methods are called inside `jax.shard_map`, on the weights of `shards.gather_for_step`.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        cfg: ModelConfig,
        mesh: MeshConfig,
        layer_of_slot: tuple[int, ...] | None = None,
        fp8: bool = False,
    ):
        """`layer_of_slot`: the MoE block in each place of their stack, -1 where it is empty; None: their own order.

        `fp8`: whether the linear layers of the blocks compute in FP8.
        """
        dim, std, num_dense, num_moe = cfg.hidden_size, cfg.init_std, cfg.num_dense_layers, cfg.num_moe_layers
        self.embed_VD = matrix(rngs, (cfg.vocab_size, dim), std, P(None, SHARDS), gather="never")
        self.dense_blocks = stack(rngs, cfg, mesh, "dense", num_dense, fp8=fp8) if num_dense else None
        self.moe_blocks = stack(rngs, cfg, mesh, "moe", num_moe, layer_of_slot, fp8) if num_moe else None
        self.norm = Norm(dim, cfg.norm_eps)
        self.head_DV = matrix(rngs, (dim, cfg.vocab_size), std, P(None, SHARDS), gather="never")
        self.mtp = stack_modules(rngs, cfg, mesh, fp8) if cfg.mtp.depth else None
        self.cfg, self.mesh = cfg, mesh

    def embed(self, tokens_BS: Int[Array, "B S"], dtype: DTypeLike) -> Float[Array, "B S D"]:
        """The tokens' embeddings, in the dtype of the compute."""
        x_TD = embed(tokens_BS.reshape(-1), self.embed_VD[...], dtype, self.mesh.gather_axes)
        return x_TD.reshape(*tokens_BS.shape, -1)

    def hidden(
        self, x_BSD: Float[Array, "B S D"], segment_ids_BS: Int[Array, "B S"] | None
    ) -> tuple[Float[Array, "B S D"], list[BlockStats]]:
        """All main blocks, before the final norm, and the stats of each stack with MoE layers."""
        x_BSD = self.enter(x_BSD, segment_ids_BS)
        if self.moe_blocks is None:
            return x_BSD, []
        positions_BS = jnp.arange(x_BSD.shape[1])[None]
        x_BSD, stats = run_stack(self.moe_blocks, x_BSD, positions_BS, segment_ids_BS, self.cfg, self.mesh)
        assert stats is not None
        return x_BSD, [stats]

    def logits(self, tokens_BS: Int[Array, "B S"], dtype: DTypeLike) -> Float[Array, "B S V"]:
        """Float32 scores of every next token, for reading; training uses `losses`."""
        return self._scores(self.hidden(self.embed(tokens_BS, dtype), None)[0])

    def _scores(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        normed = self._final_norm(hidden)
        head_DV, axes = self.head_DV[...].astype(normed.dtype), self.mesh.gather_axes
        if axes:
            head_DV = jax.lax.all_gather(head_DV, axes, axis=1, tiled=True)
        return jnp.dot(normed, head_DV, preferred_element_type=jnp.float32)

    def _final_norm(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return gather_for_use(self.norm, self.mesh, x.dtype)(x)

    def losses(
        self,
        tokens_BN: Int[Array, "B N"],
        loss_mask_BN: Bool[Array, "B N"],
        segment_ids_BN: Int[Array, "B N"] | None,
        dtype: DTypeLike,
    ) -> Losses:
        """Cross entropies of the tokens that `loss_mask` says, under the main model and the MTP modules."""
        embedded_BSD = self.embed(tokens_BN[:, :-1], dtype)
        hidden_BSD, stats = self.hidden(embedded_BSD, _read(segment_ids_BN))
        return self.leave(hidden_BSD, embedded_BSD, tokens_BN, loss_mask_BN, segment_ids_BN).with_stats(stats)

    def enter(
        self, embedded_BSD: Float[Array, "B S D"], segment_ids_BS: Int[Array, "B S"] | None
    ) -> Float[Array, "B S D"]:
        """What the first MoE block reads: the leading dense blocks' output."""
        if self.dense_blocks is None:
            return embedded_BSD
        positions_BS = jnp.arange(embedded_BSD.shape[1])[None]
        return run_stack(self.dense_blocks, embedded_BSD, positions_BS, segment_ids_BS, self.cfg, self.mesh)[0]

    def leave(
        self,
        hidden_BSD: Float[Array, "B S D"],
        embedded_BSD: Float[Array, "B S D"],
        tokens_BN: Int[Array, "B N"],
        loss_mask_BN: Bool[Array, "B N"],
        segment_ids_BN: Int[Array, "B N"] | None,
        mtp_blocks: Block | None = None,
    ) -> Losses:
        """The losses of what the last block gave; balance, counts and rounds are those of the MTP modules alone.

        Depth k reads the hidden states of tokens 0..S-1-k and the embeddings of tokens k..S-1 and predicts tokens
        k+1..S, so that every depth keeps the causal chain (section 2.2). `mtp_blocks`: those of all depths, stacked and
        whole, where `mtp` is without.
        """
        segments, dtype = _read(segment_ids_BN), hidden_BSD.dtype
        normed_BSD = self._final_norm(hidden_BSD)
        predictions, stats = [(normed_BSD, tokens_BN[:, 1:], loss_mask_BN[:, 1:])], []
        hidden_BSD = normed_BSD if self.cfg.mtp.after_final_norm else hidden_BSD
        for depth in range(1, self.cfg.mtp.depth + 1):
            module = gather_for_use(module_at(self.mtp, depth - 1), self.mesh, dtype)
            length = embedded_BSD.shape[1] - depth
            own_segments = None if segments is None else segments[:, :length]
            block = None if mtp_blocks is None else jax.tree.map(lambda w, i=depth - 1: w[i], mtp_blocks)
            given = hidden_BSD[:, :length], embedded_BSD[:, depth:], jnp.arange(length)[None], own_segments
            hidden_BSD, block_stats = module(*given, block)
            mask = loss_mask_BN[:, depth + 1 :]
            if segment_ids_BN is not None:  # a prediction across documents is not asked for
                mask = mask & (segment_ids_BN[:, depth + 1 :] == own_segments)
            predictions.append((module.norm(hidden_BSD), tokens_BN[:, depth + 1 :], mask))
            stats += [] if block_stats is None else [jax.tree.map(lambda s: s[None], block_stats)]
        main, *mtp = self._summed_losses(predictions)
        nothing = Losses(
            main=main,
            mtp=sum(mtp, jnp.zeros_like(main)) / max(self.cfg.mtp.depth, 1),
            balance=jnp.zeros_like(main),
            counts=jnp.zeros((0, self.cfg.moe.num_experts), jnp.int32),
            rounds=jnp.zeros((), jnp.int32),
        )
        return nothing.with_stats(stats)

    def _summed_losses(self, predictions: list[tuple[Array, Array, Array]]) -> list[Float[Array, ""]]:
        """The loss of each (hidden, targets, mask); the head is gone through once for all of them."""
        hidden, targets, masks = zip(*predictions, strict=True)
        x_TD = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in hidden])
        targets_T = jnp.concatenate([ids.reshape(-1) for ids in targets])
        axes, cfg = self.mesh.gather_axes, self.cfg
        loss_T = cross_entropy(x_TD, self.head_DV[...], targets_T, cfg.loss_chunk, axes, cfg.keep_logits)
        ends = itertools.accumulate(ids.size for ids in targets[:-1])
        parts = zip(jnp.split(loss_T, list(ends)), masks, strict=True)
        return [jnp.where(mask.reshape(-1), loss, 0).sum() for loss, mask in parts]


def _read(segment_ids_BN: Array | None) -> Array | None:
    """The segments of the tokens that the model reads: all but the last."""
    return None if segment_ids_BN is None else segment_ids_BN[:, :-1]
