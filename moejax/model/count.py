"""Parameters and floating-point operations of a model."""

from typing import NamedTuple

import jax
from flax import nnx

from moejax.config import ONE_DEVICE, ModelConfig
from moejax.model.transformer import Transformer


def abstract_model(cfg: ModelConfig) -> Transformer:
    """The model with shapes in place of numbers; costs no memory at any size."""
    return jax.eval_shape(lambda: Transformer(nnx.Rngs(params=jax.random.key(0)), cfg, ONE_DEVICE))


def num_parameters(module: nnx.Module | nnx.State) -> int:
    """Numbers in all parameters and router biases of a model or of a part of one."""
    return sum(leaf.size for leaf in jax.tree.leaves(module) if hasattr(leaf, "size"))


class PerPart(NamedTuple):
    """A number for each kind of part that a model has, per token."""

    dense_layer: int
    moe_layer: int
    head: int
    mtp: int  # one module: its projection, its block and the head once more

    def all(self, cfg: ModelConfig, *, mtp: bool) -> int:
        """The sum over the parts of a model, with its MTP modules or without."""
        layers = cfg.num_dense_layers * self.dense_layer + cfg.num_moe_layers * self.moe_layer
        return layers + self.head + (cfg.mtp.depth * self.mtp if mtp else 0)


def active_per_token(cfg: ModelConfig, *, mtp: bool) -> int:
    """Entries of the matrices that multiply a token: of the experts those it is sent to, not the embedding.

    With `mtp` the MTP modules count too, and the head once more for each.
    """
    return _entries(cfg).all(cfg, mtp=mtp)


def _entries(cfg: ModelConfig) -> PerPart:
    moe, dim = cfg.moe, cfg.hidden_size
    dense_layer = _attention_entries(cfg) + 3 * dim * cfg.dense_width
    experts = 3 * dim * moe.expert_width * (moe.top_k + moe.num_shared)
    moe_layer = _attention_entries(cfg) + dim * moe.num_experts + experts
    head = dim * cfg.vocab_size
    mtp = (moe_layer if cfg.num_moe_layers else dense_layer) + 2 * dim * dim + head
    return PerPart(dense_layer, moe_layer, head, mtp)


def _attention_entries(cfg: ModelConfig) -> int:
    a, dim = cfg.attention, cfg.hidden_size
    query = a.num_heads * (a.qk_nope_dim + a.qk_rope_dim)
    queries = dim * query if a.q_lora_rank is None else (dim + query) * a.q_lora_rank
    keys_and_values = dim * (a.kv_lora_rank + a.qk_rope_dim)
    keys_and_values += a.kv_lora_rank * a.num_heads * (a.qk_nope_dim + a.v_dim)
    return queries + keys_and_values + a.num_heads * a.v_dim * dim


def forward_flops_per_token(cfg: ModelConfig, length: int) -> PerPart:
    """FLOPs of the forward pass of each part, per token of a sequence of `length` tokens.

    Products of matrices only, 2 FLOPs an entry; attention counts the causal half.
    """
    a, entries = cfg.attention, _entries(cfg)
    pairs = a.num_heads * (a.qk_nope_dim + a.qk_rope_dim + a.v_dim) * length  # 2 FLOPs for each of length / 2 tokens
    dense_layer, moe_layer, mtp = (2 * n + pairs for n in (entries.dense_layer, entries.moe_layer, entries.mtp))
    return PerPart(dense_layer, moe_layer, 2 * entries.head, mtp)


def train_flops_per_token(cfg: ModelConfig, length: int, *, mtp: bool = True) -> float:
    """FLOPs of the forward and the backward pass per token of a sequence of `length` tokens.

    The backward pass counts twice the forward; what is computed again is not counted. V3 at 4096: 250 GFLOP without
    MTP, 260 with (arXiv:2505.09343, table 2).
    """
    return 3.0 * forward_flops_per_token(cfg, length).all(cfg, mtp=mtp)
