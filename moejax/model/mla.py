"""Multi-head latent attention (arXiv:2412.19437, section 2.1.1).

B batch, S positions, D model dim, Q and C widths of the compressed query and key-value, H heads, N and R dims of a
head's key without position and with, V dims of a head's value.
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
        q_BSHK = self._queries(x_BSD, turn)
        k_BSHK, v_BSHV = self._keys_and_values(x_BSD, turn)
        mixed_BSHV = attention(q_BSHK, k_BSHK, v_BSHV, softmax_scale(a), segment_ids_BS, a.block, self.fp8)
        return linear(mixed_BSHV.reshape(*x_BSD.shape[:2], -1), self.out_HD[...], self.fp8, power_of_two=True)

    def _queries(self, x_BSD: Array, turn: tuple[Array, Array]) -> Float[Array, "B S H K"]:
        a = self.cfg
        if a.q_lora_rank is None:
            q = linear(x_BSD, self.q_DH[...], self.fp8)
        else:
            latent = checkpoint_name(linear(x_BSD, self.q_down_DQ[...], self.fp8), "q_latent")
            q = linear(self.q_norm(latent), self.q_up_QH[...], self.fp8)
        q_BSHK = q.reshape(*x_BSD.shape[:2], a.num_heads, -1)
        plain_BSHN, rotary_BSHR = jnp.split(q_BSHK, [a.qk_nope_dim], axis=-1)
        return jnp.concatenate([plain_BSHN, rotate(rotary_BSHR, turn)], axis=-1)

    def _keys_and_values(
        self, x_BSD: Array, turn: tuple[Array, Array]
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H V"]]:
        a = self.cfg
        compressed = checkpoint_name(linear(x_BSD, self.kv_down_DC[...], self.fp8), "kv_latent")
        latent_BSC, rotary_BSR = jnp.split(compressed, [a.kv_lora_rank], axis=-1)
        kv = linear(self.kv_norm(latent_BSC), self.kv_up_CH[...], self.fp8).reshape(*x_BSD.shape[:2], a.num_heads, -1)
        plain_BSHN, v_BSHV = jnp.split(kv, [a.qk_nope_dim], axis=-1)
        shared_BS1R = rotate(rotary_BSR[:, :, None], turn)
        shared_BSHR = jnp.broadcast_to(shared_BS1R, (*shared_BS1R.shape[:2], a.num_heads, a.qk_rope_dim))
        return jnp.concatenate([plain_BSHN, shared_BSHR], axis=-1), v_BSHV
