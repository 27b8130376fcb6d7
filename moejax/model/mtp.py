"""Multi-token prediction: modules that each predict one token further (arXiv:2412.19437, section 2.2)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moejax.config import MeshConfig, ModelConfig
from moejax.model.block import Block, run_block
from moejax.model.layers import Norm, matrix
from moejax.model.moe import BlockStats
from moejax.model.shards import SHARDS
from moejax.ops.linear import linear


class MTPModule(nnx.Module):
    """Joins the previous depth's hidden state with the embedding of a later token, and runs one block on it.

    The embedding and the output head are the main model's. The joined vector is [embedding; hidden], the order of the
    released `eh_proj`, where the report's equation 21 writes the hidden state first.
    """

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig, mesh: MeshConfig, fp8: bool = False):
        self.embed_norm = Norm(cfg.hidden_size, cfg.norm_eps)
        self.hidden_norm = Norm(cfg.hidden_size, cfg.norm_eps)
        self.join_2DD = matrix(rngs, (2 * cfg.hidden_size, cfg.hidden_size), cfg.init_std, P(SHARDS, None))
        self.block = Block(rngs, cfg, mesh, "moe" if cfg.num_layers > cfg.num_dense_layers else "dense", fp8)
        self.norm = Norm(cfg.hidden_size, cfg.norm_eps)  # before the shared head
        self.remat = cfg.remat

    def __call__(
        self,
        hidden_BSD: Float[Array, "B S D"],
        embedded_BSD: Float[Array, "B S D"],
        positions_BS: Int[Array, "#B S"],
        segment_ids_BS: Int[Array, "B S"] | None,
        block: Block | None = None,
    ) -> tuple[Float[Array, "B S D"], BlockStats | None]:
        """Position i holds the hidden state of token i and the embedding of token i + depth.

        `block`: whole, in place of the module's own.
        """
        x_BSD = self._joined(hidden_BSD, embedded_BSD)
        return run_block(block or self.block, x_BSD, positions_BS, segment_ids_BS, self.remat)

    def decode(
        self,
        hidden_BSD: Float[Array, "B S D"],
        embedded_BSD: Float[Array, "B S D"],
        positions_BS: Int[Array, "B S"],
        cache_BME: Float[Array, "B M E"],
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B M E"]]:
        """The same at new positions, and the cache of its attention with them in it."""
        return self.block.decode(self._joined(hidden_BSD, embedded_BSD), positions_BS, cache_BME)

    def _joined(self, hidden_BSD: Array, embedded_BSD: Array) -> Float[Array, "B S D"]:
        joined_BSE = jnp.concatenate([self.embed_norm(embedded_BSD), self.hidden_norm(hidden_BSD)], axis=-1)
        return linear(joined_BSE, self.join_2DD[...])  # never in FP8: the released checkpoint has it in BF16


def stack_modules(rngs: nnx.Rngs, cfg: ModelConfig, mesh: MeshConfig, fp8: bool = False) -> MTPModule:
    """The modules of all depths, with a leading dim of `cfg.mtp.depth`."""
    keys = jax.random.split(rngs.params(), cfg.mtp.depth)
    return jax.vmap(lambda key: MTPModule(nnx.Rngs(params=key), cfg, mesh, fp8))(keys)


def module_at(modules: MTPModule | None, depth: int) -> MTPModule:
    """The module of one depth, counted from 0."""
    assert modules is not None
    return jax.tree.map(lambda w: w[depth], modules)
