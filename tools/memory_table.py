"""Memory of each device as a model is spread over more of them, read from the compiled training step.

    python tools/memory_table.py                                    configs/small_moe.py on 1 to 64 simulated devices
    python tools/memory_table.py --config configs/tiny.py --most 8

Nothing is trained: the step is compiled for each mesh, and XLA's own count of the bytes is printed as a Markdown table.
`state`: parameters, moments and what else a step is given; `temporary`: everything else while it runs (activations,
gradients, gathered weights, exchange buffers). `ideal` is the one-device total over the number of devices.
"""

import argparse
import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig, RunConfig
from moejax.config_source import load_config
from moejax.data.batches import Batch
from moejax.mesh import BATCH_AXES, make_mesh, resolve, simulate
from moejax.train.state import abstract_state
from moejax.train.step import StepSettings, make_train_step


def step_bytes(config: RunConfig) -> tuple[int, int]:
    """Bytes per device of the compiled step: of the state it is given, and of everything else."""
    devices = config.mesh.pipe * config.mesh.batch_shards
    config = resolve(config, devices)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    rows, length = config.data.batch_size, config.data.sequence_length + 1

    def abstract(shape: tuple[int, ...], dtype: type, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    batch = Batch(*(abstract((rows, length), kind, P(BATCH_AXES)) for kind in (np.int32, np.int32, np.bool_)))
    settings = StepSettings(*(abstract((), np.float32, P()) for _ in range(3)))
    step = make_train_step(config, mesh).lower(abstract_state(config, mesh), batch, settings)
    memory = step.compile(compiler_options={"xla_backend_optimization_level": 0}).memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def meshes(devices: int) -> list[MeshConfig]:
    """What is compared at a number of devices."""
    expert = min(devices, 8)
    rest = devices // expert
    found = [MeshConfig(data=rest, expert=expert, sharding=kind) for kind in ("zero1", "fsdp")]
    if rest > 1:
        found.append(MeshConfig(replica=rest, data=1, expert=expert, sharding="hsdp"))
    return found if devices > 1 else found[:1]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/small_moe.py")
    parser.add_argument("--most", type=int, default=64, help="devices, a power of 2")
    options = parser.parse_args()
    simulate(options.most)
    config = load_config(options.config)
    print("| devices | mesh | sharding | state, MB | temporary, MB | together | ideal |")
    print("|---:|---|---|---:|---:|---:|---:|")
    whole, devices = None, 1
    while devices <= options.most:
        for mesh in meshes(devices):
            state, temporary = step_bytes(dataclasses.replace(config, mesh=mesh))
            whole = whole or state + temporary
            lengths = " x ".join(f"{axis} {n}" for axis in BATCH_AXES if (n := getattr(mesh, axis)) > 1) or "1"
            sizes = [f"{size / 1e6:.1f}" for size in (state, temporary, state + temporary, whole / devices)]
            print(f"| {devices} | {lengths} | {mesh.sharding} | {' | '.join(sizes)} |", flush=True)
        devices *= 2


if __name__ == "__main__":
    main()
