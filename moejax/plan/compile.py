"""The training step of a run, compiled for devices that need not exist, and what XLA says of it."""

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import ConfigError, MeshConfig, RunConfig
from moejax.data.batches import Batch
from moejax.mesh import AXES, BATCH_AXES, make_mesh, resolve, simulate
from moejax.plan.collectives import Collective, collectives
from moejax.plan.hopper import h200_devices
from moejax.plan.overlap import Flight, flights
from moejax.train.state import abstract_state
from moejax.train.step import StepSettings, make_train_step

Target = Literal["cpu", "h200"]


@dataclass(frozen=True)
class Sites:
    """The collectives of one kind over the same mesh axes, each counted once, however often it is executed."""

    axis: str  # "pipe", "data x expert", in the order of the mesh
    kind: str  # of collectives.KINDS
    count: int
    bytes: int  # of the arrays that a device has after them


@dataclass(frozen=True)
class CompiledStep:
    """What is read from a compiled training step; bytes and operations are one device's."""

    target: str
    devices: int
    mesh: str
    trace_seconds: float
    lower_seconds: float
    compile_seconds: float
    argument_bytes: int  # the state and the batch
    temporary_bytes: int  # everything else while the step runs; the new state takes the place of the old
    flops: float  # as XLA counts them: the body of a loop once, kernels not at all
    sites: tuple[Sites, ...]
    flights: tuple[Flight, ...]  # of the collectives, and what is computed meanwhile; none on a CPU

    @property
    def bytes(self) -> int:
        """The most that a device holds at one time."""
        return self.argument_bytes + self.temporary_bytes

    @property
    def states(self) -> dict[str, int]:
        """How many collectives are hidden behind products of the other micro-batch, exposed, or wait."""
        return dict(Counter(flight.state for flight in self.flights))


def compile_step(config: RunConfig, target: Target = "cpu", options: dict[str, Any] | None = None) -> CompiledStep:
    """Compiles the step of `config` for its mesh, and runs nothing.

    Args:
        config: the run; a -1 in its mesh counts as 1 unless `mesh.resolve` has filled it in.
        target: CPU devices, simulated as many as there have to be, or H200s on nodes of 8.
        options: more compiler options, such as {"xla_backend_optimization_level": 0} where only sizes are read.

    Raises:
        ConfigError: the model does not divide over the mesh, or the target's devices cannot be had.
    """
    config = resolve(config, math.prod(max(getattr(config.mesh, axis), 1) for axis in AXES))
    start = time.perf_counter()
    traced = traced_step(config, _devices(config.mesh, target))
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lowering = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    end = time.perf_counter()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return CompiledStep(
        target=target,
        devices=config.mesh.pipe * config.mesh.batch_shards,
        mesh=" x ".join(f"{axis} {n}" for axis in AXES if (n := getattr(config.mesh, axis)) > 1) or "1",
        trace_seconds=after_trace - start,
        lower_seconds=after_lowering - after_trace,
        compile_seconds=end - after_lowering,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=cost.get("flops", 0.0),
        sites=tuple(sites(collectives(text), config.mesh)),
        flights=tuple(flights(text)) if target == "h200" else (),
    )


def traced_step(config: RunConfig, devices: list[Any]) -> Any:
    """The step of a resolved run, traced for devices that may not exist."""
    mesh: Any = make_mesh(config.mesh, devices)
    step: Any = make_train_step(config, mesh)
    shape = config.data.batch_size, config.data.sequence_length + 1

    def abstract(dims: tuple[int, ...], dtype: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    batch = Batch(*(abstract(shape, dtype, P(BATCH_AXES)) for dtype in (jnp.int32, jnp.int32, jnp.bool_)))
    settings = StepSettings(*(abstract((), jnp.float32, P()) for _ in range(3)))
    return step.trace(abstract_state(config, mesh), batch, settings)


def sites(found: list[Collective], mesh: MeshConfig) -> list[Sites]:
    """The collectives of a program by the mesh axes over which they run; those of one device with itself left out."""
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for collective in found:
        key = axes_of(collective, mesh), collective.kind
        if key[0]:
            counts[key] += 1
            sizes[key] += collective.bytes
    return [Sites(*key, counts[key], sizes[key]) for key in sorted(counts)]


def axes_of(collective: Collective, mesh: MeshConfig) -> str:
    """The mesh axes along which the devices of a collective's groups differ: "data x expert"; "" for none."""
    lengths = [getattr(mesh, axis) for axis in AXES]
    differ = np.zeros(len(AXES), bool)
    for group in collective.groups:
        places = np.asarray(np.unravel_index(group, lengths))
        differ |= (places != places[:, :1]).any(1)
    return " x ".join(axis for axis, differs in zip(AXES, differ, strict=True) if differs)


def _devices(mesh: MeshConfig, target: Target) -> list[Any]:
    count = mesh.pipe * mesh.batch_shards
    if target == "h200":
        try:
            return list(h200_devices(count))
        except (RuntimeError, ValueError) as error:
            raise ConfigError("target", target, f"cpu, or what is missing: {error}") from None
    settings: Any = jax.config
    if settings.jax_num_cpu_devices < count:
        simulate(count)
    return jax.devices("cpu")[:count]
