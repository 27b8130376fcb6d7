"""Multi-head latent attention (arXiv:2412.19437, section 2.1.1).

B batch, S positions, D model dim, Q and C widths of the compressed query and key-value, H heads, N and R dims of a
head's key without position and with, V dims of a head's value. Of a cache: M slots, E = C + R numbers in each.
"""

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moejax.config import ModelConfig
from moejax.model.layers import Norm, matrix
from moejax.model.shards import SHARDS
from moejax.ops.attention import attention
from moejax.ops.latent import absorb_queries, attend, store, values_of
from moejax.ops.linear import linear
from moejax.ops.rope import rotate, rotation, softmax_scale


class MLA(nnx.Module):
    """Attention whose keys and values come from one compressed vector per token, plus one rotated key for all heads."""

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig, fp8: bool = False):
        a, dim, std, eps = cfg.attention, cfg.hidden_size, cfg.init_std, cfg.norm_eps
        query = a.num_heads * (a.qk_nope_dim + a.qk_rope_dim)
        if a.q_lora_rank is None:
            self.q_DH = matrix(rngs, (dim, query), std, P(SHARDS, None))
        else:
            self.q_down_DQ = matrix(rngs, (dim, a.q_lora_rank), std, P(SHARDS, None))
            self.q_norm = Norm(a.q_lora_rank, eps)
            self.q_up_QH = matrix(rngs, (a.q_lora_rank, query), std, P(SHARDS, None))
        self.kv_down_DC = matrix(rngs, (dim, a.kv_lora_rank + a.qk_rope_dim), std, P(SHARDS, None))
        self.kv_norm = Norm(a.kv_lora_rank, eps)
        key_value = a.num_heads * (a.qk_nope_dim + a.v_dim)
        self.kv_up_CH = matrix(rngs, (a.kv_lora_rank, key_value), std, P(SHARDS, None))
        self.out_HD = matrix(rngs, (a.num_heads * a.v_dim, dim), std, P(None, SHARDS))
        self.cfg, self.fp8 = a, fp8

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        positions_BS: Int[Array, "#B S"],
        segment_ids_BS: Int[Array, "B S"] | None,
    ) -> Float[Array, "B S D"]:
        """Causal self-attention; with `segment_ids`, within each segment."""
        a = self.cfg
        turn = rotation(positions_BS, a)
        q_BSHK = jnp.concatenate(self._queries(x_BSD, turn), axis=-1)
        k_BSHK, v_BSHV = self._keys_and_values(x_BSD, turn)
        mixed_BSHV = attention(q_BSHK, k_BSHK, v_BSHV, softmax_scale(a), segment_ids_BS, a.block, self.fp8)
        return self._out(mixed_BSHV)

    def decode(
        self, x_BSD: Float[Array, "B S D"], positions_BS: Int[Array, "B S"], cache_BME: Float[Array, "B M E"]
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B M E"]]:
        """Self-attention of new positions to those in the cache and to themselves; returns the cache with them in it.

        The same numbers as `__call__`, but for rounding: with FP8 the up-projection of keys and values, which is
        absorbed, is not in it.
        """
        a = self.cfg
        turn = rotation(positions_BS, a)
        latent_BSC, rotary_BS1R = self._latent(x_BSD, turn)
        cache_BME = store(cache_BME, jnp.concatenate([latent_BSC, rotary_BS1R[:, :, 0]], axis=-1), positions_BS)
        up_CHO = self.kv_up_CH[...].astype(x_BSD.dtype).reshape(a.kv_lora_rank, a.num_heads, -1)
        key_CHN, value_CHV = jnp.split(up_CHO, [a.qk_nope_dim], axis=-1)
        q_BSHE = absorb_queries(*self._queries(x_BSD, turn), key_CHN)
        mixed_BSHC = attend(q_BSHE, cache_BME, positions_BS, a.kv_lora_rank, softmax_scale(a))
        return self._out(values_of(mixed_BSHC, value_CHV)), cache_BME

    def _queries(
        self, x_BSD: Array, turn: tuple[Array, Array]
    ) -> tuple[Float[Array, "B S H N"], Float[Array, "B S H R"]]:
        a = self.cfg
        if a.q_lora_rank is None:
            q = linear(x_BSD, self.q_DH[...], self.fp8)
        else:
            latent = checkpoint_name(linear(x_BSD, self.q_down_DQ[...], self.fp8), "q_latent")
            q = linear(self.q_norm(latent), self.q_up_QH[...], self.fp8)
        q_BSHK = q.reshape(*x_BSD.shape[:2], a.num_heads, -1)
        plain_BSHN, rotary_BSHR = jnp.split(q_BSHK, [a.qk_nope_dim], axis=-1)
        return plain_BSHN, rotate(rotary_BSHR, turn)

    def _latent(self, x_BSD: Array, turn: tuple[Array, Array]) -> tuple[Float[Array, "B S C"], Float[Array, "B S 1 R"]]:
        """What keys and values come from, and the key that all heads share."""
        compressed = checkpoint_name(linear(x_BSD, self.kv_down_DC[...], self.fp8), "kv_latent")
        latent_BSC, rotary_BSR = jnp.split(compressed, [self.cfg.kv_lora_rank], axis=-1)
        return self.kv_norm(latent_BSC), rotate(rotary_BSR[:, :, None], turn)

    def _keys_and_values(
        self, x_BSD: Array, turn: tuple[Array, Array]
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H V"]]:
        a = self.cfg
        latent_BSC, shared_BS1R = self._latent(x_BSD, turn)
        kv = linear(latent_BSC, self.kv_up_CH[...], self.fp8).reshape(*x_BSD.shape[:2], a.num_heads, -1)
        plain_BSHN, v_BSHV = jnp.split(kv, [a.qk_nope_dim], axis=-1)
        shared_BSHR = jnp.broadcast_to(shared_BS1R, (*shared_BS1R.shape[:2], a.num_heads, a.qk_rope_dim))
        return jnp.concatenate([plain_BSHN, shared_BSHR], axis=-1), v_BSHV

    def _out(self, mixed_BSHV: Array) -> Float[Array, "B S D"]:
        flat = mixed_BSHV.reshape(*mixed_BSHV.shape[:2], -1)
        return linear(flat, self.out_HD[...], self.fp8, power_of_two=True)
