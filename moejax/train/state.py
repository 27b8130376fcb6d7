"""Everything on the devices that defines a run between two steps."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from moejax.checkpoint.reading import BITS
from moejax.config import RunConfig
from moejax.model.moe import RouterBias
from moejax.model.shards import on_mesh
from moejax.model.transformer import Transformer
from moejax.pipeline.layout import lay_out
from moejax.pipeline.stages import mesh_of_extras
from moejax.train.optimizer import make_optimizer

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """The state of a run. The tokens seen and the position in the data, plain numbers, are kept beside it."""

    step: Int[Array, ""]  # optimizer steps applied
    params: nnx.State  # FP32 master weights
    router_bias: nnx.State  # load-balancing biases, FP32
    opt_state: Any  # moments, in the dtype of optimizer.moments
    ema: nnx.State | None  # averaged weights, FP32


def new_transformer(config: RunConfig) -> Transformer:
    """The model with the parameters that `config.seed` draws, the same on any mesh; for use under `jax.jit`."""
    rngs, mesh = nnx.Rngs(params=jax.random.key(config.seed)), mesh_of_extras(config.mesh)
    slots = layer_of_slot(config) if mesh.pipe > 1 else None
    return Transformer(rngs, config.model, mesh, slots, config.precision == "fp8")


def layer_of_slot(config: RunConfig) -> tuple[int, ...]:
    """The layer in each place of the stacked MoE blocks, -1 for none; without a pipeline their own order."""
    return lay_out(config).layer_of_slot if config.mesh.pipe > 1 else tuple(range(config.model.num_moe_layers))


def model_structure(config: RunConfig) -> nnx.GraphDef:
    """What `nnx.merge` makes a model of, together with `params` and `router_bias` of a state."""
    return _split(jax.eval_shape(lambda: new_transformer(config)))[0]


def _split(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    return nnx.split(model, nnx.Param, RouterBias)  # type: ignore[return-value]


def _first_state(config: RunConfig) -> TrainState:
    params, router_bias = _split(new_transformer(config))[1:]
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay is not None else None
    opt_state = make_optimizer(config.optimizer).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, router_bias, opt_state, ema)


def new_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """The state before the first step, made in shards on the devices of the mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    # it runs once: optimizing the many random draws takes longer than it saves
    options = {"xla_backend_optimization_level": 0}
    with jax.set_mesh(mesh):
        return jax.jit(lambda: _first_state(config), out_shardings=shardings, compiler_options=options)()


def state_from(config: RunConfig, mesh: Mesh, params: Tree, router_bias: Tree, opt_state: Any = None) -> TrainState:
    """The state before the first step of a run that starts with these weights; `opt_state` None: without moments."""
    like, optimizer = abstract_state(config, mesh), make_optimizer(config.optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, (like.step, like.opt_state))
    with jax.set_mesh(mesh):
        step, fresh = jax.jit(lambda p: (jnp.zeros((), jnp.int32), optimizer.init(p)), out_shardings=shardings)(params)
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay is not None else None
    return TrainState(step, params, router_bias, fresh if opt_state is None else opt_state, ema)  # type: ignore[arg-type]


def abstract_state(config: RunConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shapes, dtypes and shardings of `new_state`, without making it; the devices need not exist."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes = jax.eval_shape(lambda: _first_state(config))

    def placed(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if x.sharding is None else on_mesh(x.sharding.spec, config.mesh)
        if config.mesh.pipe > 1 and _is_stack(path):
            spec = P("pipe", *spec[1:])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(placed, shapes)


def _is_stack(path: tuple) -> bool:
    return any(getattr(key, "key", None) == "moe_blocks" for key in path)


def stacked_as(slots: Sequence[int], shapes: Tree, cut: bool = True) -> Tree:
    """Shapes and shardings of (parts of) a state whose MoE blocks are stacked in the order of `slots`.

    `shapes`: those of the state on a mesh. With `cut` stacks stay cut over `pipe`, if the number of slots divides.
    """

    def one(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not _is_stack(path):
            return x
        mesh, spec = x.sharding.mesh, x.sharding.spec  # type: ignore[union-attr]
        first = spec[0] if cut and len(slots) % mesh.shape["pipe"] == 0 else None
        sharding = NamedSharding(mesh, P(first, *spec[1:]))
        return jax.ShapeDtypeStruct((len(slots), *x.shape[1:]), x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, shapes)


def to_slots(before: Sequence[int], after: Sequence[int], shapes: Any) -> Callable[[tuple, Array], Array]:
    """`one(path, array)`: brings the MoE blocks of a state from the order of the slots `before` to that of `after`.

    Beside what goes in and what comes out a device holds one stack that is not cut over `pipe`.

    `shapes`: of (parts of) the state as the devices are to hold it; an empty place is all zeros.
    """
    wanted = dict(jax.tree_util.tree_leaves_with_path(shapes))
    places = tuple(before.index(layer) if layer >= 0 else -1 for layer in after)

    def one(path: tuple, x: Array) -> Array:
        if not _is_stack(path):
            return x
        sharding = wanted[path].sharding
        with jax.set_mesh(sharding.mesh):
            return _taken(x, places, sharding.spec)

    return one


@functools.partial(jax.jit, static_argnums=(1, 2))
def _taken(stack: Array, places: tuple[int, ...], spec: P) -> Array:
    """The layers of a stack at `places`, -1: zeros."""
    place = np.asarray(places)
    keep = (place >= 0).reshape(-1, *(1,) * (stack.ndim - 1))
    bits = jax.lax.bitcast_convert_type(stack, BITS[stack.dtype.itemsize])
    layers = jax.reshard(bits, P(None, *spec[1:])).at[np.maximum(place, 0)].get(out_sharding=spec)
    return jax.lax.bitcast_convert_type(jnp.where(keep, layers, 0), stack.dtype)


def restacked(state: Tree, before: Sequence[int], after: Sequence[int], shapes: Tree) -> Tree:
    """(Parts of) a state whose MoE blocks go from the order of the slots `before` to `after`; see `to_slots`."""
    return jax.tree_util.tree_map_with_path(to_slots(before, after, shapes), state)


def state_specs(config: RunConfig, mesh: Mesh) -> TrainState:
    """The partition specification of every array of the state."""
    return jax.tree.map(lambda x: x.sharding.spec, abstract_state(config, mesh))


def bytes_per_device(state: TrainState) -> int:
    """Bytes that each device holds of a state, or of its shapes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
