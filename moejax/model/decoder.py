"""The model as it answers: a module a layer, weights in the dtype of the compute, and a cache for attention.

The modules are those of training. Their stacks are taken apart once, because a step of decoding that took a layer out
of a stack would copy it, and reads little else than weights. With ZeRO-1 the weights are gathered once, too; with FSDP
and HSDP they stay in shards, and each layer's are gathered in each step. Embedding and head stay in shards always.

B rows of this device, S new positions, M slots, D model dim, E numbers in a slot, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.config import MeshConfig, ModelConfig
from moejax.model.block import Block
from moejax.model.layers import Norm
from moejax.model.mtp import MTPModule
from moejax.model.shards import gather_for_use, on_mesh
from moejax.model.transformer import Transformer
from moejax.ops.embedding import embed, unembed


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["embed_VD", "blocks", "norm", "head_DV", "mtp"],
    meta_fields=["cfg", "mesh"],
)
@dataclasses.dataclass(frozen=True)
class Decoder:
    """The parts of a `Transformer`, taken apart."""

    embed_VD: nnx.Param
    blocks: tuple[Block, ...]
    norm: Norm
    head_DV: nnx.Param
    mtp: tuple[MTPModule, ...]
    cfg: ModelConfig
    mesh: MeshConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Of each attention an array [B, M, E]: what it has to keep of every token, in the dtype of the compute."""

    blocks: tuple
    mtp: tuple


def new_cache(cfg: ModelConfig, rows: int, slots: int, depth: int, dtype: DTypeLike) -> Cache:
    """An empty cache; `depth`: MTP modules that are used."""
    shape = rows, slots, cfg.attention.kv_lora_rank + cfg.attention.qk_rope_dim
    return Cache(
        tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers)),
        tuple(jnp.zeros(shape, dtype) for _ in range(depth)),
    )


def taken_apart(model: Transformer, mesh: Mesh, dtype: DTypeLike) -> Decoder:
    """The decoder of a model whose arrays lie on `mesh`."""

    def take(model: Transformer) -> Decoder:
        stacks = [stack for stack in (model.dense_blocks, model.moe_blocks) if stack is not None]
        blocks = tuple(layer for stack in stacks for layer in _layers(stack))
        mtp = () if model.mtp is None else tuple(_layers(model.mtp))
        parts = Decoder(model.embed_VD, blocks, model.norm, model.head_DV, mtp, model.cfg, model.mesh)
        return jax.tree.map(
            lambda v: _placed(v, model.mesh, dtype), parts, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )

    with jax.set_mesh(mesh):
        return jax.jit(take)(model)


def _layers(stack: Any) -> list[Any]:
    def layer(index: int) -> Any:
        return jax.tree.map(lambda w: w[index], stack)

    return [layer(index) for index in range(jax.tree.leaves(stack)[0].shape[0])]


def _placed(variable: Any, cfg: MeshConfig, dtype: DTypeLike) -> Any:
    """A weight in the dtype and the shards in which a step finds it."""
    value = variable.get_value()
    if not isinstance(variable, nnx.Param):
        return variable.replace(jax.reshard(value, P()))
    spec = on_mesh(variable.spec, cfg)
    if cfg.sharding == "zero1" and variable.gather != "never":
        spec = P(*(entry if isinstance(entry, str) else None for entry in spec))
    value = value if variable.gather == "fp32" else value.astype(dtype)
    return variable.replace(jax.reshard(value, spec))


# ------------------------------------------------------------------------------------------ inside of `jax.shard_map`


def embedded(model: Decoder, tokens_BS: Int[Array, "B S"], dtype: DTypeLike) -> Float[Array, "B S D"]:
    """The tokens' embeddings."""
    x_TD = embed(tokens_BS.reshape(-1), model.embed_VD[...], dtype, model.mesh.gather_axes)
    return x_TD.reshape(*tokens_BS.shape, -1)


def run_blocks(
    model: Decoder, x_BSD: Float[Array, "B S D"], positions_BS: Int[Array, "B S"], cache: Cache
) -> tuple[Float[Array, "B S D"], Cache]:
    """All main blocks at new positions, before the final norm, and the cache with those positions in it."""
    caches = []
    for block, kept_BME in zip(model.blocks, cache.blocks, strict=True):
        if model.mesh.sharding != "zero1":  # not all layers are gathered at once
            block, x_BSD = lax.optimization_barrier((block, x_BSD))
        x_BSD, kept_BME = gather_for_use(block, model.mesh, x_BSD.dtype).decode(x_BSD, positions_BS, kept_BME)
        caches.append(kept_BME)
    return x_BSD, dataclasses.replace(cache, blocks=tuple(caches))


def run_mtp(
    model: Decoder,
    depth: int,
    hidden_BSD: Float[Array, "B S D"],
    embedded_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    cache: Cache,
) -> tuple[Float[Array, "B S D"], Cache]:
    """The MTP module number `depth`, from 0, at new positions; `MTPModule` says what it reads."""
    module = gather_for_use(model.mtp[depth], model.mesh, hidden_BSD.dtype)
    hidden_BSD, kept = module.decode(hidden_BSD, embedded_BSD, positions_BS, cache.mtp[depth])
    mtp = (*cache.mtp[:depth], kept, *cache.mtp[depth + 1 :])
    return hidden_BSD, dataclasses.replace(cache, mtp=mtp)


def final_norm(model: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """What the head reads of the last block's output."""
    return gather_for_use(model.norm, model.mesh, hidden.dtype)(hidden)


def mtp_norm(model: Decoder, depth: int, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """What the head reads of an MTP module's output."""
    return gather_for_use(model.mtp[depth].norm, model.mesh, hidden.dtype)(hidden)


def scores(model: Decoder, normed_BSD: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Float32 scores of the next token."""
    flat_TD = normed_BSD.reshape(-1, normed_BSD.shape[-1])
    return unembed(flat_TD, model.head_DV[...], model.mesh.gather_axes).reshape(*normed_BSD.shape[:2], -1)
