"""Everything on the devices that defines a run between two steps."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from moejax.config import RunConfig
from moejax.model.moe import RouterBias
from moejax.model.shards import on_mesh
from moejax.model.transformer import Transformer
from moejax.pipeline.stages import layout_of, mesh_of_extras
from moejax.train.optimizer import make_optimizer


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
    slots = layout_of(config).layer_of_slot if mesh.pipe > 1 else None
    return Transformer(rngs, config.model, mesh, slots)


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


def abstract_state(config: RunConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shapes, dtypes and shardings of `new_state`, without making it; the devices need not exist."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes = jax.eval_shape(lambda: _first_state(config))

    def placed(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if x.sharding is None else on_mesh(x.sharding.spec, config.mesh)
        if config.mesh.pipe > 1 and any(getattr(key, "key", None) == "moe_blocks" for key in path):
            spec = P("pipe", *spec[1:])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(placed, shapes)


def state_specs(config: RunConfig, mesh: Mesh) -> TrainState:
    """The partition specification of every array of the state."""
    return jax.tree.map(lambda x: x.sharding.spec, abstract_state(config, mesh))


def bytes_per_device(state: TrainState) -> int:
    """Bytes that each device holds of a state, or of its shapes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
