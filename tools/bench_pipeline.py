"""The pipeline schedules beside one device: overhead, time per slot, compile time, memory.

    python tools/bench_pipeline.py                                           4 devices; 8, 16 and 32 micro-batches
    python tools/bench_pipeline.py --pipe 2 --microbatches 4 --repeats 2     a short trial

For each number of micro-batches the training step is compiled for every schedule, on simulated devices, and for one
device without a pipeline, which does the work of all stages and nothing else. The compiled steps take turns, so that
what else the machine does meets all of them. Numbers are medians; the overhead is the median over the turns of a step's
CPU seconds relative to those of one device in the same turn.

Simulated devices share the cores, so nothing is faster here; what shows is what the executor adds to the work. That is
counted in CPU seconds of the process, as a wall clock also counts other processes. A device that waits takes none: in a
collective XLA for CPU sleeps (8 devices of which 7 wait for one take as many CPU seconds as that one alone). But its
thread pools wait actively, and the more so the fewer devices there are to use them: so the process is kept on one core.

The overhead is of the whole step. Beside the executor it contains what a pipeline does in addition: a second copy of
the layers and their gradients (DualPipe); what lies outside of the stages is updated on every rank, and what comes
before the MoE layers is computed again in the backward pass (`--dense`). It can be below 0: one device stacks up the
gradients of a micro-batch before it adds them, the executor adds them in place.

    slots     of the table; busy: the share of slots x devices that have a cell
    ms/cell   of all devices' cells, idle slots not counted
    empty     microseconds that a slot of all devices takes where layers have next to nothing to do: the executor alone
    pools     entries for activations between stages, for what F leaves to B, and for what I leaves to W
    memory    temporary, of a device, by XLA's count
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_step import machine
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.console import Console
from rich.table import Table as Printed

from moejax.config import (
    ONE_DEVICE,
    AttentionConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    PipelineConfig,
    RunConfig,
)
from moejax.data.batches import Batch
from moejax.mesh import AXES, make_mesh, resolve, simulate
from moejax.pipeline.carry import Work
from moejax.pipeline.cells import Cells
from moejax.pipeline.executor import run
from moejax.pipeline.stages import program_of, require_pipeline, table_of
from moejax.pipeline.table import Table
from moejax.train.state import new_state
from moejax.train.step import StepSettings, make_train_step, place
from moejax.varying import vary_over

SCHEDULES = ("gpipe", "one_f_one_b", "zb1p", "dualpipe", "dualpipe_v")
EMPTY_STEPS = 5  # of a turn


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipe", type=int, default=4, help="simulated devices")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16, 32], help="numbers of them per step")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each")
    parser.add_argument("--layers", type=int, default=2, help="MoE layers for each device")
    parser.add_argument("--dense", type=int, default=0, help="dense layers before them")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--length", type=int, default=512, help="tokens of a micro-batch, which is one sequence")
    parser.add_argument("--remat", choices=("none", "cheap", "full"), default="none")
    parser.add_argument("--cores", type=int, default=1, help="on which the process is kept, where that is possible")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.cores :])
    model = model_config(args.hidden, args.layers * args.pipe, args.dense, args.remat)
    try:
        simulate(args.pipe)
        runs = [run_configs(model, args.length, args.pipe, args.schedules, count) for count in args.microbatches]
    except ConfigError as error:
        parser.error(str(error))
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    measured = [contestant for those in runs for contestant in compared(those, args.repeats)]
    layers = f"{args.layers} MoE layers each" + f" after {args.dense} dense" * bool(args.dense)
    shape = f"{args.pipe} devices, {layers}, width {args.hidden}, {args.length} tokens a micro-batch"
    console = Console(width=200, highlight=False)
    console.print(f"{machine()}, jax {jax.__version__}; {shape}, remat {args.remat}; medians of {args.repeats} steps")
    console.print(as_table(measured))


# ------------------------------------------------------------------------------------------------------------ the runs


def model_config(hidden: int, layers: int, dense: int, remat: Any) -> ModelConfig:
    """Layers that take tens of milliseconds on a core, and little else."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=hidden,
        num_layers=layers + dense,
        num_dense_layers=dense,
        dense_width=3 * hidden,
        attention=AttentionConfig(
            num_heads=8, q_lora_rank=96, kv_lora_rank=64, qk_nope_dim=32, qk_rope_dim=16, v_dim=32, block=64
        ),
        moe=MoEConfig(num_experts=8, top_k=2, num_groups=4, top_groups=2, expert_width=hidden),
        mtp=MTPConfig(depth=0),
        init_std=0.02,
        remat=remat,
    )


def run_configs(
    model: ModelConfig, length: int, pipe: int, schedules: Sequence[Any], count: int
) -> dict[str, RunConfig]:
    """The run on one device, and by each schedule; a micro-batch is one sequence.

    Raises:
        ConfigError: a schedule does not exist for so many devices or micro-batches.
    """
    plain = RunConfig(
        steps=1,
        precision="fp32",
        model=model,
        data=DataConfig(sequence_length=length, batch_size=count, virtual_shards=1),
        optimizer=OptimizerConfig(moments="fp32"),
        mesh=ONE_DEVICE,
        pipeline=PipelineConfig(microbatches=count),
    )
    runs, mesh = {"one device": plain}, MeshConfig(pipe=pipe, data=1)
    for name in schedules:
        pipeline = PipelineConfig(schedule=name, microbatches=count)
        runs[name] = resolve(replace(plain, mesh=mesh, pipeline=pipeline), pipe)
        require_pipeline(runs[name], [count])
    return runs


@dataclass
class Contestant:
    """What was measured of a run's step."""

    name: str
    microbatches: int
    table: Table | None  # None: one device, no pipeline
    trace_seconds: float
    compile_seconds: float
    temporary: int  # bytes of each device
    steps: list[tuple[float, float]] = field(default_factory=list)  # wall and CPU seconds
    empty_steps: list[float] = field(default_factory=list)  # wall seconds


def compared(runs: dict[str, RunConfig], repeats: int) -> list[Contestant]:
    """All runs' steps, measured `repeats` times in turns after a turn that warms up."""
    prepared = [prepare(name, config) for name, config in runs.items()]
    for turn in range(repeats + 1):
        for contestant, step, empty in prepared:
            taken = timed(step)
            contestant.steps += [taken] if turn else []
            if empty:
                contestant.empty_steps += [timed(empty)[0] for _ in range(EMPTY_STEPS)][1:]  # the first: cold caches
    return [contestant for contestant, _, _ in prepared]


def prepare(name: str, config: RunConfig) -> tuple[Contestant, Callable[[], None], Callable[[], None] | None]:
    """The training step of a run, compiled, on random tokens; and of a pipeline the same table with empty layers."""
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.pipe])
    shape = config.data.batch_size, config.data.sequence_length + 1
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    batch = place(Batch(tokens, np.zeros_like(tokens), np.ones(shape, bool)), mesh)
    settings, state = StepSettings(*(np.float32(x) for x in (1e-3, 1e-3, 0.0))), new_state(config, mesh)
    start = time.perf_counter()
    train_step: Any = make_train_step(config, mesh)
    lowered = train_step.lower(state, batch, settings)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch, settings)
        jax.block_until_ready((state, metrics))

    table = table_of(program_of(config)) if config.mesh.pipe > 1 else None
    temporary = compiled.memory_analysis().temp_size_in_bytes
    count = config.pipeline.num_microbatches
    contestant = Contestant(name, count, table, traced - start, ended - traced, temporary)
    return contestant, step, empty_step(table) if table else None


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds of a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def empty_step(table: Table) -> Callable[[], None]:
    """The executor on stages of one layer each, which multiplies 2 x 8 numbers with 8 x 8."""
    program, rows, dim = table.program, 2, 8

    def layer(weights: jax.Array, given: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
        return given[0] + jnp.tanh(given[0] @ weights), given[0].sum()

    def leave(extras: jax.Array, y: jax.Array, microbatch: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = (y * extras).sum()
        return loss, loss

    def local(stack: jax.Array, x: jax.Array) -> jax.Array:
        stack, x = vary_over(stack, AXES), vary_over(x, AXES)
        rank, layers = jax.lax.axis_index("pipe"), (1,) * program.num_stages
        work = Work(layer, lambda m: None, lambda extras, m: extras, leave, vary_over(jnp.ones(()), AXES), layers)
        columns = jax.tree.map(lambda column: jnp.asarray(column)[:, rank], table.rows)
        cells = Cells(table, work, stack, x, jnp.zeros_like(x))
        return jax.lax.psum(run(table, columns, cells).dstack, AXES)

    mesh = make_mesh(MeshConfig(pipe=program.num_ranks, data=1), jax.devices()[: program.num_ranks])
    arrays = jnp.ones((program.num_chunks, dim, dim)), jnp.ones((rows, dim))
    given = jax.device_put(arrays, NamedSharding(mesh, P()))
    compiled = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P())).lower(*given).compile()
    return lambda: jax.block_until_ready(compiled(*given))


# -------------------------------------------------------------------------------------------------------------- output

COLUMNS = (
    *("schedule", "micro-batches", "s/step", "CPU-s", "overhead", "slots", "busy", "ms/slot", "ms/cell", "empty, us"),
    *("trace, s", "compile, s", "memory, MB", "pools"),
)


def as_table(contestants: Sequence[Contestant]) -> Printed:
    """A row for each contestant, in Markdown."""
    printed = Printed(box=box.MARKDOWN)
    for heading in COLUMNS:
        printed.add_column(heading, justify="left" if heading == "schedule" else "right", no_wrap=True)
    bare = {one.microbatches: one for one in contestants if one.table is None}
    for one in contestants:
        printed.add_row(*cells(one, bare[one.microbatches]))
    return printed


def cells(one: Contestant, bare: Contestant) -> list[str]:
    """The texts of a row."""
    walls, cpus = zip(*one.steps, strict=True)
    step, table = statistics.median(walls), one.table
    left = [one.name, str(one.microbatches), f"{step:.2f}", f"{statistics.median(cpus):.2f}"]
    right = [f"{one.trace_seconds:.1f}", f"{one.compile_seconds:.1f}", f"{one.temporary / 1e6:.0f}"]
    if table is None:
        return [*left, *[""] * 6, *right, ""]
    overhead = statistics.median(own / other for (_, own), (_, other) in zip(one.steps, bare.steps, strict=True)) - 1
    slots, ran = table.num_slots, sum(map(len, table.program.cells))
    shares = [f"{overhead:+.1%}", str(slots), f"{ran / slots / table.program.num_ranks:.0%}"]
    times = [f"{step / slots * 1e3:.0f}", f"{step / ran * 1e3:.0f}"]
    empty = f"{statistics.median(one.empty_steps) / slots * 1e6:.0f}"
    pools = f"{table.num_hidden}, {table.num_residual}, {table.num_deferred}"
    return [*left, *shares, *times, empty, *right, pools]


if __name__ == "__main__":
    main()
