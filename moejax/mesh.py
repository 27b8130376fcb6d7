"""The device mesh: axis names and construction. Every mesh has every axis; one that is not used has length 1.

pipe     stages of the pipeline
replica  groups of devices; whether each has a whole copy of the training state is `mesh.sharding`
data     shards of the training state, and of the batch
expert   shards of the routed experts, of the rest of the training state, and of the batch
"""

import dataclasses
import math
import os
from collections.abc import Sequence

import jax

from moejax.config import ONE_DEVICE, ConfigError, MeshConfig, ModelConfig, RunConfig

AXES = ("pipe", "replica", "data", "expert")
BATCH_AXES = ("replica", "data", "expert")  # rows of a batch are sharded over these
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"
_OPTIMIZATION = "--xla_backend_optimization_level"


def simulate(devices: int, *, quick: bool = False) -> None:
    """Gives this process `devices` simulated CPU devices. It must come before anything that starts JAX.

    They share the machine's cores. XLA ends a program in which one waits 40 s for another; here they wait longer. With
    `quick` programs are compiled in a fraction of the time and run slower, which is what a few steps want.

    Raises:
        ConfigError: JAX has started with other devices.
    """
    try:
        for flag, value in ((_PATIENCE, 1200), *([(_OPTIMIZATION, 0)] if quick else [])):
            if flag not in os.environ.get("XLA_FLAGS", ""):
                os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        there = jax.local_devices()
        if len(there) != devices or there[0].platform != "cpu":
            has = f"{len(there)} {there[0].platform} device{'s' if len(there) > 1 else ''}"
            wanted = f"to be set before JAX starts; it has {has}: start Python, or the notebook's kernel, again"
            raise ConfigError("simulate", devices, wanted) from None


def resolve(config: RunConfig, num_devices: int) -> RunConfig:
    """`config` with the -1 of its mesh and its number of micro-batches filled in, and all that must divide checked.

    Raises:
        ConfigError: the mesh is not one of `num_devices` devices, or the model or batch does not divide over it.
    """
    mesh, pipeline = fit(config.mesh, config.model, num_devices), config.pipeline
    micro = pipeline.microbatches or _microbatches(config, mesh)
    pipeline = dataclasses.replace(pipeline, microbatches=micro)
    config = dataclasses.replace(config, mesh=mesh, pipeline=pipeline)
    batch, shards = config.data.batch_size, mesh.batch_shards
    if batch // micro % shards:
        axes = f"mesh.replica={mesh.replica} x mesh.data={mesh.data} x mesh.expert={mesh.expert}"
        wanted = f"a multiple of {micro * shards}, {axes} for each of pipeline.microbatches={micro}"
        raise ConfigError("data.batch_size", batch, wanted)
    return config


def fit(cfg: MeshConfig, model: ModelConfig, num_devices: int) -> MeshConfig:
    """`cfg` with its -1 filled in.

    Raises:
        ConfigError: it is not a mesh of `num_devices` devices, or the model does not divide over it.
    """
    cfg = _filled(cfg, num_devices)
    _require_division(model, cfg)
    return cfg


def _microbatches(config: RunConfig, mesh: MeshConfig) -> int:
    """As few as the schedule can do with and the batch divides into; if it does not, as few as the schedule can."""
    batch, least = config.data.batch_size, config.pipeline.least_microbatches(mesh.pipe)
    step = 2 if config.pipeline.schedule == "dualpipe" and mesh.pipe > 1 else 1
    fit = (n for n in range(least, batch + 1, step) if batch % (n * mesh.batch_shards) == 0)
    return next(fit, least)


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of all devices, or of `devices`; `cfg` is one that `resolve` returned."""
    shape = tuple(getattr(cfg, axis) for axis in AXES)
    return jax.make_mesh(shape, AXES, devices=devices)


def one_device_mesh() -> jax.sharding.Mesh:
    """The mesh of this process's first device."""
    return make_mesh(ONE_DEVICE, jax.local_devices()[:1])


def batch_part(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Which part of a batch's rows the devices of this process hold, and into how many such parts it is cut.

    Raises:
        ConfigError: they hold rows that are not neighbours, or not of one part.
    """
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH_AXES))
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    places = sharding.addressable_devices_indices_map((shards,)).values()
    own = sorted({place[0].indices(shards)[0] for place in places if place is not None})
    first, count = own[0], len(own)
    if own[-1] != first + count - 1 or first % count or shards % count:
        wanted = f"one in which each process holds neighbouring rows, not rows {own} of {shards}"
        raise ConfigError("mesh", dict(mesh.shape), wanted)
    return first // count, shards // count


def _filled(cfg: MeshConfig, num_devices: int) -> MeshConfig:
    lengths = {axis: getattr(cfg, axis) for axis in AXES}
    given = math.prod(length for length in lengths.values() if length != -1)
    product = " x ".join(f"mesh.{axis}={length}" for axis, length in lengths.items())
    rest = next((axis for axis, length in lengths.items() if length == -1), None)
    if rest is not None:
        if num_devices % given:
            raise ConfigError(f"mesh.{rest}", -1, f"the other lengths to divide the {num_devices} devices: {product}")
        return dataclasses.replace(cfg, **{rest: num_devices // given})
    if given != num_devices:
        raise ConfigError("mesh", given, f"{product} to be the {num_devices} devices there are (-1: all that are left)")
    return cfg


def _require_division(model: ModelConfig, mesh: MeshConfig) -> None:
    """Raises ConfigError where a dim that is sharded does not divide."""
    has_moe = model.num_layers > model.num_dense_layers
    if has_moe and model.moe.num_experts % mesh.expert:
        raise ConfigError("model.moe.num_experts", model.moe.num_experts, f"a multiple of mesh.expert={mesh.expert}")
    attention = model.attention
    sharded = {
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.q_lora_rank": attention.q_lora_rank or 0,
    }
    shards = mesh.state_shards
    axes = " x ".join(f"mesh.{axis}={getattr(mesh, axis)}" for axis in mesh.shard_axes)
    for name, value in sharded.items():
        if value % shards:
            advice = "" if mesh.sharding == "hsdp" else "; mesh.sharding=hsdp leaves mesh.replica out"
            raise ConfigError(f"model.{name}", value, f"a multiple of the {shards} shards of {axes}{advice}")
