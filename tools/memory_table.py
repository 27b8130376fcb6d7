"""Memory of each device as a model is spread over more of them, read from the compiled training step.

    python tools/memory_table.py                                    configs/small_moe.py on 1 to 64 simulated devices
    python tools/memory_table.py --config configs/tiny.py --most 8

Nothing is trained: the step is compiled for each mesh, and XLA's own count of the bytes is printed as a Markdown table.
`state`: parameters, moments and what else a step is given; `temporary`: everything else while it runs (activations,
gradients, gathered weights, exchange buffers). `ideal` is the one-device total over the number of devices.
"""

import argparse
import dataclasses

from moejax.config import MeshConfig
from moejax.config_source import load_config
from moejax.mesh import BATCH_AXES, simulate
from moejax.plan.compile import compile_step


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
            run = dataclasses.replace(config, mesh=mesh)
            compiled = compile_step(run, options={"xla_backend_optimization_level": 0})
            state, temporary = compiled.argument_bytes, compiled.temporary_bytes
            whole = whole or compiled.bytes
            lengths = " x ".join(f"{axis} {n}" for axis in BATCH_AXES if (n := getattr(mesh, axis)) > 1) or "1"
            sizes = [f"{size / 1e6:.1f}" for size in (state, temporary, compiled.bytes, whole / devices)]
            print(f"| {devices} | {lengths} | {mesh.sharding} | {' | '.join(sizes)} |", flush=True)
        devices *= 2


if __name__ == "__main__":
    main()
