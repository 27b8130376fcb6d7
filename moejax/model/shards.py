"""Weights in shards: how the training state lies on the mesh, and how a weight is made whole where it is used.

The specification of a weight stands on the line that makes it (`layers.matrix`). An entry that is a tuple of axes says
where the weight is stored: over SHARDS, or what is left of them beside the experts. It is gathered over these axes for
use, and its gradient is reduce-scattered over them. An entry that is the name of one axis is a placement: the weight
is used where it lies (routed experts over `expert`). ZeRO-1 gathers once, at the start of the step; FSDP and HSDP
gather layer by layer (arXiv:1910.02054, arXiv:2304.11277).
"""

import functools
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from moejax.config import MeshConfig
from moejax.ops.linear import FLOATS

SHARDS = ("replica", "data", "expert")
BESIDE_EXPERTS = ("replica", "data")
# how a weight is gathered: in the dtype of the compute, in float32, or not at all: what uses it reads the shards
Gather = Literal["compute", "fp32", "never"]

Tree = TypeVar("Tree")


def parameter(array: Array, spec: P, gather: Gather = "compute") -> nnx.Param:
    """A parameter that knows where it lies; the dims of `spec` are its last ones, once layers are stacked."""
    return nnx.Param(array, spec=spec, gather=gather)


def placed(spec: P) -> P | None:
    """`spec` for the `out_sharding` of a new array; None where no mesh is set, as for a model on one device."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def on_mesh(spec: P, cfg: MeshConfig) -> P:
    """`spec` as the arrays of a run have it: the axes over which `cfg.sharding` keeps copies are left out."""

    def kept(entry: Any) -> Any:
        return tuple(axis for axis in entry if axis in cfg.shard_axes) if isinstance(entry, tuple) else entry

    return P(*map(kept, spec))


def gather_for_step(tree: Tree, cfg: MeshConfig, dtype: DTypeLike) -> Tree:
    """The weights of a step: whole with ZeRO-1, to be `widened` where they are used; else still in shards.

    Their gradients, float32, go through `reduce`.
    """
    return gathered(tree, cfg, dtype) if cfg.sharding == "zero1" else tree


def gather_for_use(tree: Tree, cfg: MeshConfig, dtype: DTypeLike) -> Tree:
    """Whole weights, float32, out of those of `gather_for_step`, widened; their gradients arrive in shards."""
    return tree if cfg.sharding == "zero1" else _whole(cfg, dtype, tree)


def reduce(grads: Tree, cfg: MeshConfig) -> Tree:
    """The sum over all devices of the gradients of the weights of `gather_for_step`, in shards."""
    if cfg.sharding == "zero1":
        return scattered(grads, cfg)
    dtype = FLOATS[cfg.gradient_dtype]
    left = tuple(axis for axis in SHARDS if axis not in cfg.shard_axes)
    return jax.tree.map(lambda g: jax.lax.psum(g.astype(dtype), left).astype(g.dtype), grads) if left else grads


def gathered(tree: Tree, cfg: MeshConfig, dtype: DTypeLike) -> Tree:
    """Whole weights, those with gather="compute" in `dtype`."""

    def gather(array: Array, how: Gather, dim: int, axes: tuple[str, ...]) -> Array:
        array = array if how == "fp32" else array.astype(dtype)
        return jax.lax.all_gather(array, axes, axis=dim, tiled=True)

    return _map_stored(gather, tree, cfg)


def scattered(grads: Tree, cfg: MeshConfig) -> Tree:
    """The sum over the devices of gradients of whole weights, in shards, float32."""

    def scatter(array: Array, how: Gather, dim: int, axes: tuple[str, ...]) -> Array:
        array = array.astype(FLOATS[cfg.gradient_dtype])
        return jax.lax.psum_scatter(array, axes, scatter_dimension=dim, tiled=True).astype(jnp.float32)

    return _map_stored(scatter, grads, cfg)


def narrowed(tree: Tree, cfg: MeshConfig, dtype: DTypeLike) -> Tree:
    """The weights with ZeRO-1 before they are sent or gathered: those with gather="compute" in `dtype`."""

    def one(variable: Any) -> Any:
        narrow = isinstance(variable, nnx.Param) and variable.gather == "compute"
        return variable.replace(variable.get_value().astype(dtype)) if narrow else variable

    if cfg.sharding != "zero1":
        return tree
    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def widened(tree: Tree) -> Tree:
    """Float32, which every product takes its weights in; XLA drops the way to it and back."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(cfg: MeshConfig, dtype: DTypeLike, tree: Tree) -> Tree:
    return widened(gathered(tree, cfg, dtype))


_whole.defvjp(
    lambda cfg, dtype, tree: (_whole(cfg, dtype, tree), None),
    lambda cfg, dtype, saved, grads: (scattered(grads, cfg),),
)


def _map_stored(function: Any, tree: Tree, cfg: MeshConfig) -> Tree:
    """`function(array, how, dim, axes)` of every parameter that is stored over axes longer than 1."""

    def one(variable: Any) -> Any:
        if not isinstance(variable, nnx.Param) or variable.gather == "never":
            return variable
        array = variable.get_value()
        for index, entry in enumerate(variable.spec):
            axes = () if not isinstance(entry, tuple) else tuple(a for a in entry if a in cfg.gather_axes)
            if axes:
                dim = index + array.ndim - len(variable.spec)
                return variable.replace(function(array, variable.gather, dim, axes))
        return variable

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
