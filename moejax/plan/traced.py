"""The passes of a model, traced on the shapes that a device of a mesh has, which need not exist.

What does not change between meshes is traced once: the length of the pipeline, its schedule and its micro-batches do
not matter to a layer.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig, ModelConfig, RunConfig
from moejax.mesh import AXES
from moejax.model.block import run_block
from moejax.model.shards import gather_for_use
from moejax.model.transformer import Losses, Transformer
from moejax.ops.linear import FLOATS
from moejax.pipeline.backward import StageFunctions, flatten, trace_stage
from moejax.pipeline.guests import num_guests
from moejax.pipeline.interleave import interleave
from moejax.pipeline.stages import mesh_of_extras


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All that a pass of one micro-batch depends on."""

    model: ModelConfig
    mesh: MeshConfig
    precision: str
    rows: int  # of a micro-batch on a device
    length: int
    segments: bool
    guests: bool  # whether the blocks of the MTP modules lie with the layers of a stage

    @classmethod
    def of(cls, config: RunConfig) -> "Shapes":
        """Those of a run whose mesh is resolved, without what does not matter."""
        mesh = dataclasses.replace(config.mesh, pipe=min(config.mesh.pipe, 2))
        rows, data = config.rows_of_microbatch // config.mesh.batch_shards, config.data
        guests = num_guests(config) > 0
        return cls(config.model, mesh, config.precision, rows, data.sequence_length, data.mask_documents, guests)


@functools.lru_cache(maxsize=32)
def layer_functions(shapes: Shapes) -> StageFunctions:
    """The passes of one MoE layer of a stage."""
    dtype, mesh, remat = FLOATS[shapes.precision], shapes.mesh, shapes.model.remat
    graph, params = nnx.split(jax.tree.map(lambda w: _one(w), _model(shapes).moe_blocks, is_leaf=_is_variable))

    def layer(params: Any, given: tuple) -> tuple:
        x, segment_ids = given
        block, positions = gather_for_use(nnx.merge(graph, params), mesh, dtype), jnp.arange(x.shape[1])[None]
        x, stats = run_block(block, x, positions, segment_ids, remat)
        assert stats is not None
        return x, (stats.balance_loss, stats.counts, stats.rounds)

    x = jax.ShapeDtypeStruct((shapes.rows, shapes.length, shapes.model.hidden_size), dtype)
    segments = jax.ShapeDtypeStruct((shapes.rows, shapes.length), jnp.int32) if shapes.segments else None
    return _on_device(mesh, lambda params, x, segments: trace_stage(layer, params, (x, segments)), params, x, segments)


@functools.lru_cache(maxsize=32)
def joined_layers(shapes: Shapes) -> tuple[Any, int]:
    """The forward of one MoE layer woven with the backward of another, with the number of their weights."""
    layer = layer_functions(shapes)

    def given(program: Any) -> tuple[list, list]:
        arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.in_avals]
        return arrays[: layer.num_params], arrays[layer.num_params :]

    (ahead, x), (behind, kept) = given(layer.forward_jaxpr), given(layer.backward_jaxpr)

    def woven(ahead: list, behind: list, x: list, kept: list) -> Any:
        programs = layer.forward_jaxpr, [*ahead, *x], layer.backward_jaxpr, [*behind, *kept]
        return interleave(*programs, num_weights=(layer.num_params, layer.num_params))

    return _on_device(shapes.mesh, _program(woven), ahead, behind, x, kept), 2 * layer.num_params


@functools.lru_cache(maxsize=32)
def beside(shapes: Shapes) -> dict[str, tuple[Any, int]]:
    """What runs beside the stages, as programs with the number of weights that each has: of a pipeline what enters the
    first stage (F), what its backward runs (B), and the last stage's losses with their gradients; else the whole model.
    """
    dtype, model = FLOATS[shapes.precision], _model(shapes)
    piped = shapes.mesh.pipe > 1
    if piped:
        model.moe_blocks = None
    modules: Any = model.mtp
    guests = modules.block if shapes.guests else None
    if shapes.guests:
        modules.block = None
    graph, params = nnx.split(model)
    hidden = jax.ShapeDtypeStruct((shapes.rows, shapes.length, shapes.model.hidden_size), dtype)
    tokens = jax.ShapeDtypeStruct((shapes.rows, shapes.length + 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((shapes.rows, shapes.length + 1), jnp.bool_)

    def total(losses: Losses) -> jax.Array:
        return losses.main + losses.mtp + losses.balance

    def ids(tokens: jax.Array) -> jax.Array | None:
        return tokens if shapes.segments else None

    def enter(params: Any, tokens: jax.Array) -> jax.Array:
        extras: Transformer = nnx.merge(graph, params)
        segments = ids(tokens)
        return extras.enter(extras.embed(tokens[:, :-1], dtype), None if segments is None else segments[:, :-1])

    def leave(params: Any, guests: Any, hidden: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        extras: Transformer = nnx.merge(graph, params)
        return total(extras.leave(hidden, extras.embed(tokens[:, :-1], dtype), tokens, mask, ids(tokens), guests))

    def whole(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return total(nnx.merge(graph, params).losses(tokens, mask, ids(tokens), dtype))

    def pulled(params: Any, tokens: jax.Array, dx: jax.Array) -> Any:
        return jax.vjp(lambda params: enter(params, tokens), params)[1](dx)

    count = len(jax.tree.leaves(params))
    if not piped:
        grad = jax.grad(whole)
        return {"whole": (_on_device(shapes.mesh, _program(grad), params, tokens, mask), count)}
    losses = _program(jax.grad(leave, argnums=(0, 1, 2)))
    both = count + len(jax.tree.leaves(guests))
    return {
        "enter F": (_on_device(shapes.mesh, _program(enter), params, tokens), count),
        "enter B": (_on_device(shapes.mesh, _program(pulled), params, tokens, hidden), count),
        "leave": (_on_device(shapes.mesh, losses, params, guests, hidden, tokens, mask), both),
    }


# --------------------------------------------------------------------------------------------------------------- pieces


def _program(function: Callable) -> Callable[..., Any]:
    """`function` of pytrees, to be called where its equations are wanted."""

    def program(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        return flatten(lambda *given: jax.tree.leaves(function(*jax.tree.unflatten(structure, given))), *leaves)

    return program


def _model(shapes: Shapes) -> Transformer:
    """The model on a device: float32 weights, whole where they are gathered for the step."""
    extras = mesh_of_extras(shapes.mesh)
    fp8 = shapes.precision == "fp8"
    made = jax.eval_shape(lambda: Transformer(nnx.Rngs(params=jax.random.key(0)), shapes.model, extras, fp8=fp8))
    blocks = made.moe_blocks

    def local(mesh: MeshConfig, variable: Any) -> Any:
        about, dims = variable.get_metadata(), list(variable.get_value().shape)
        spec = about.get("spec", ())
        is_cut = mesh.sharding != "zero1" or about.get("gather") == "never"
        for place, entry in enumerate(spec, start=len(dims) - len(spec)):
            axes = (entry,) if isinstance(entry, str) else entry if entry and is_cut else ()
            for axis in axes:
                dims[place] //= getattr(mesh, axis) if isinstance(entry, str) or axis in mesh.gather_axes else 1
        return variable.replace(jax.ShapeDtypeStruct(tuple(dims), jnp.float32))

    guests = made.mtp.block if shapes.guests else None  # type: ignore[attr-defined]
    made.moe_blocks = None
    made = jax.tree.map(functools.partial(local, extras), made, is_leaf=_is_variable)
    made.moe_blocks = jax.tree.map(functools.partial(local, shapes.mesh), blocks, is_leaf=_is_variable)
    if shapes.guests:
        made.mtp.block = jax.tree.map(functools.partial(local, shapes.mesh), guests, is_leaf=_is_variable)
    return made


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _one(variable: Any) -> Any:
    """A layer of a stack."""
    value = variable.get_value()
    return variable.replace(jax.ShapeDtypeStruct(value.shape[1:], value.dtype))


def _on_device(cfg: MeshConfig, function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` inside of `jax.shard_map`, the arguments varying over every axis of the mesh."""
    lengths = tuple(getattr(cfg, axis) for axis in AXES)
    mesh = AbstractMesh(lengths, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    found = []

    def one(*arguments: Any) -> jax.Array:
        found.append(function(*jax.tree.map(lambda a: a[0], arguments)))
        return jnp.zeros(1)

    def spread(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((mesh.size, *a.shape), a.dtype, sharding=NamedSharding(mesh, P(AXES)))

    body = jax.shard_map(one, mesh=mesh, in_specs=P(AXES), out_specs=P(), axis_names=set(AXES))
    jax.eval_shape(body, *jax.tree.map(spread, arguments))
    return found[0]
