"""Parameters and floating-point operations of a model."""

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


def active_per_token(cfg: ModelConfig, *, mtp: bool) -> int:
    """Entries of the matrices that multiply a token: of the experts those it is sent to, not the embedding.

    With `mtp` the MTP modules count too, and the head once more for each.
    """
    moe, dim = cfg.moe, cfg.hidden_size
    dense_layer = _attention_entries(cfg) + 3 * dim * cfg.dense_width
    experts = 3 * dim * moe.expert_width * (moe.top_k + moe.num_shared)
    moe_layer = _attention_entries(cfg) + dim * moe.num_experts + experts
    num_moe = cfg.num_moe_layers
    head = dim * cfg.vocab_size
    total = cfg.num_dense_layers * dense_layer + num_moe * moe_layer + head
    if mtp:
        total += cfg.mtp.depth * ((moe_layer if num_moe else dense_layer) + 2 * dim * dim + head)
    return total


def _attention_entries(cfg: ModelConfig) -> int:
    a, dim = cfg.attention, cfg.hidden_size
    query = a.num_heads * (a.qk_nope_dim + a.qk_rope_dim)
    queries = dim * query if a.q_lora_rank is None else (dim + query) * a.q_lora_rank
    keys_and_values = dim * (a.kv_lora_rank + a.qk_rope_dim)
    keys_and_values += a.kv_lora_rank * a.num_heads * (a.qk_nope_dim + a.v_dim)
    return queries + keys_and_values + a.num_heads * a.v_dim * dim


def train_flops_per_token(cfg: ModelConfig, length: int, *, mtp: bool = True) -> float:
    """FLOPs of the forward and the backward pass per token of a sequence of `length` tokens.

    Products of matrices only, 2 FLOPs an entry, the backward pass twice the forward; attention counts the causal half;
    what is computed again is not counted. V3 at 4096: 250 GFLOP without MTP, 260 with (arXiv:2505.09343, table 2).
    """
    a = cfg.attention
    layers = cfg.num_layers + (cfg.mtp.depth if mtp else 0)
    per_pair = 2 * a.num_heads * (a.qk_nope_dim + a.qk_rope_dim + a.v_dim)
    forward = 2 * active_per_token(cfg, mtp=mtp) + layers * per_pair * length / 2
    return 3.0 * forward
