"""One transformer block, and a stack of them that is scanned."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.config import MeshConfig, ModelConfig
from moejax.model.layers import MLP, Norm
from moejax.model.mla import MLA
from moejax.model.moe import BlockStats, MoE
from moejax.model.prefetch import is_scanned, scan_gathered

# With remat="cheap" the backward pass keeps these and computes the rest again: norms, MLA up-projections, SwiGLU
# (arXiv:2412.19437, section 3.2.3).
KEPT = (
    *("q_latent", "kv_latent", "attention_out", "after_attention", "router_logits", "mlp_hidden", "expert_hidden"),
    *("dispatched", "dispatched_choices", "exchange_rounds"),  # came from other devices
)


class Block(nnx.Module):
    """x + MLA(norm(x)), then x + FFN(norm(x)), where the FFN is dense or a mixture of experts."""

    def __init__(
        self, rngs: nnx.Rngs, cfg: ModelConfig, mesh: MeshConfig, kind: Literal["dense", "moe"], fp8: bool = False
    ):
        self.attention_norm = Norm(cfg.hidden_size, cfg.norm_eps)
        self.attention = MLA(rngs, cfg, fp8)
        self.ffn_norm = Norm(cfg.hidden_size, cfg.norm_eps)
        self.ffn: MLP | MoE = (
            MoE(rngs, cfg, mesh, fp8)
            if kind == "moe"
            else MLP(rngs, cfg.hidden_size, cfg.dense_width, cfg.init_std, fp8)
        )

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        positions_BS: Int[Array, "#B S"],
        segment_ids_BS: Int[Array, "B S"] | None,
    ) -> tuple[Float[Array, "B S D"], BlockStats | None]:
        """Returns the block's output and, of a mixture of experts, its load."""
        return self._fed_forward(x_BSD, self.attention(self.attention_norm(x_BSD), positions_BS, segment_ids_BS))

    def decode(
        self, x_BSD: Float[Array, "B S D"], positions_BS: Int[Array, "B S"], cache_BME: Float[Array, "B M E"]
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B M E"]]:
        """The block's output at new positions, and the cache of its attention with them in it."""
        mixed_BSD, cache_BME = self.attention.decode(self.attention_norm(x_BSD), positions_BS, cache_BME)
        return self._fed_forward(x_BSD, mixed_BSD)[0], cache_BME

    def _fed_forward(self, x_BSD: Array, mixed_BSD: Array) -> tuple[Float[Array, "B S D"], BlockStats | None]:
        x_BSD = checkpoint_name(x_BSD + mixed_BSD, "after_attention")
        if isinstance(self.ffn, MoE):
            y_BSD, stats = self.ffn(self.ffn_norm(x_BSD))
            return x_BSD + y_BSD, stats
        return x_BSD + self.ffn(self.ffn_norm(x_BSD)), None


def stack(
    rngs: nnx.Rngs,
    cfg: ModelConfig,
    mesh: MeshConfig,
    kind: Literal["dense", "moe"],
    num_layers: int,
    layer_of_slot: tuple[int, ...] | None = None,
    fp8: bool = False,
) -> Block:
    """A block whose parameters have a leading dim of `num_layers`.

    With `layer_of_slot` the dim has a place for each of its entries: a layer, or -1 for a place that is all zeros.
    """
    keys = jax.random.split(rngs.params(), num_layers)
    keys = keys if layer_of_slot is None else keys[jnp.asarray(layer_of_slot)]
    blocks = jax.vmap(lambda key: Block(nnx.Rngs(params=key), cfg, mesh, kind, fp8))(keys)
    if layer_of_slot is None or min(layer_of_slot) >= 0:
        return blocks
    is_layer = jnp.asarray(layer_of_slot) >= 0
    return jax.vmap(lambda block, keep: jax.tree.map(lambda w: jnp.where(keep, w, 0), block))(blocks, is_layer)


def run_block(
    block: Block,
    x_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "#B S"],
    segment_ids_BS: Int[Array, "B S"] | None,
    remat: Literal["none", "cheap", "full"],
    in_loop: bool = False,
) -> tuple[Float[Array, "B S D"], BlockStats | None]:
    """`block(x, positions, segment_ids)`, of which the backward pass keeps what `remat` says.

    `in_loop`: forward and backward are in loops of their own, so that XLA cannot take what is computed again from the
    forward. Nothing has to hold it back, and a weight that is widened here is never held in float32.
    """

    def call(block: Block, x: Array) -> tuple[Array, BlockStats | None]:
        return block(x, positions_BS, segment_ids_BS)

    if remat == "cheap":
        kept = jax.checkpoint_policies.save_only_these_names(*KEPT)
        call = jax.checkpoint(call, prevent_cse=not in_loop, policy=kept)
    elif remat == "full":
        call = jax.checkpoint(call, prevent_cse=not in_loop)
    return call(block, x_BSD)


def run_stack(
    blocks: Block,
    x_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "#B S"],
    segment_ids_BS: Int[Array, "B S"] | None,
    cfg: ModelConfig,
    mesh: MeshConfig,
) -> tuple[Float[Array, "B S D"], BlockStats | None]:
    """The blocks of `stack` one after the other, `cfg.unroll` in a round; the stats have a leading dim of layers.

    With FSDP and HSDP `blocks` lie in shards, and are gathered one layer ahead, one in a round.
    """
    is_gathered, layers = mesh.sharding != "zero1", len(jax.tree.leaves(blocks)[0])
    in_loop = is_scanned(blocks) if is_gathered else cfg.unroll < layers

    def layer(block: Block, x: Array, positions: Array, segment_ids: Array | None) -> tuple[Array, BlockStats | None]:
        return run_block(block, x, positions, segment_ids, cfg.remat, in_loop)

    if is_gathered:
        return scan_gathered(layer, mesh, x_BSD.dtype, blocks, x_BSD, (positions_BS, segment_ids_BS))
    body = lambda x, block: layer(block, x, positions_BS, segment_ids_BS)  # noqa: E731
    return jax.lax.scan(body, x_BSD, blocks, unroll=min(cfg.unroll, layers))
