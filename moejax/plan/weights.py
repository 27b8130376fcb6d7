"""The weights of a model as the devices of a mesh store and use them: numbers of a shard, and of what is gathered."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import ONE_DEVICE, ModelConfig, RunConfig
from moejax.model.moe import RouterBias
from moejax.model.transformer import Transformer
from moejax.ops.linear import FLOATS
from moejax.pipeline.guests import num_guests
from moejax.pipeline.stages import mesh_of_extras
from moejax.train.state import layer_of_slot


@dataclass(frozen=True)
class Weight:
    """A parameter or router bias, of all layers of a stack together."""

    # field of `Transformer`: embed_VD, dense_blocks, moe_blocks, norm, head_DV, mtp; or guests: those of `mtp` that lie
    # with a stage's layers
    part: str
    name: str  # the last of its path, e.g. down_FD
    layers: int  # places of the stack, on all ranks of the pipeline; 1 where there is none
    shard: int  # numbers of one layer that a device stores
    axes: tuple[str, ...]  # longer than 1, over which its shards lie
    whole: int  # numbers of one layer that a device has once it is gathered; those of the shard if it never is
    use_bytes: int  # of a number, once it is gathered
    trained: bool  # no router bias

    def stacked(self, layers: int | None = None) -> "Weight":
        """So many layers of it, or all, as one."""
        count = self.layers if layers is None else layers
        return replace(self, layers=1, shard=self.shard * count, whole=self.whole * count)


def by_axes(sizes: Iterable[tuple[Weight, int]]) -> dict[tuple[str, ...], int]:
    """The sizes of weights that are gathered, added up by the axes over which they are."""
    found: dict[tuple[str, ...], int] = {}
    for weight, size in sizes:
        if weight.whole > weight.shard:
            found[weight.axes] = found.get(weight.axes, 0) + size
    return found


def weights_of(config: RunConfig) -> list[Weight]:
    """The weights of a run; its mesh is resolved."""
    slots = layer_of_slot(config) if config.mesh.pipe > 1 else None
    has_guests = num_guests(config) > 0
    return [
        _weight(config, "guests" if has_guests and path[:2] == ("mtp", "block") else path[0], path[-1], shape, about)
        for path, shape, about in _variables(config.model, slots)
    ]


@functools.lru_cache(maxsize=64)
def _variables(
    model: ModelConfig, slots: tuple[int, ...] | None
) -> list[tuple[tuple[str, ...], tuple[int, ...], dict[str, Any]]]:
    """Of each variable its path in the model, the shape, and what it says of itself."""
    made = jax.eval_shape(lambda: Transformer(nnx.Rngs(params=jax.random.key(0)), model, ONE_DEVICE, slots))
    found = jax.tree_util.tree_leaves_with_path(made, is_leaf=lambda x: isinstance(x, nnx.Variable))
    named = ((tuple(key.name for key in path), variable) for path, variable in found)
    return [(names, v.get_value().shape, v.get_metadata() | {"type": type(v)}) for names, v in named]


def _weight(config: RunConfig, part: str, name: str, shape: tuple[int, ...], about: dict[str, Any]) -> Weight:
    mesh = config.mesh if part in ("moe_blocks", "guests") else mesh_of_extras(config.mesh)
    layers = shape[0] if part in ("dense_blocks", "moe_blocks", "mtp", "guests") else 1
    spec, gather = about.get("spec", ()), about.get("gather", "never")
    parts = math.prod(getattr(mesh, entry) for entry in spec if isinstance(entry, str))
    axes = tuple(axis for entry in spec if isinstance(entry, tuple) for axis in entry if axis in mesh.gather_axes)
    used = math.prod(shape) // layers // parts
    shard = used // math.prod(getattr(mesh, axis) for axis in axes)
    dtype = FLOATS[config.precision] if gather == "compute" else jnp.float32
    whole = shard if gather == "never" else used
    trained = about["type"] is not RouterBias
    return Weight(part, name, layers, shard, axes, whole, jnp.dtype(dtype).itemsize, trained)
