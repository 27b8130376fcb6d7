"""moejax on a Ray cluster, with Ray Train's JaxTrainer: one worker a host, which takes all of its GPUs.

    pip install "ray[train]"
    python tools/launch/ray_job.py --workers 4 --gpus 8 configs/deepseek_v3.py --out runs/v3

What this script does not know is handed to `moejax train`. The folder it is started in must be one that all nodes
share. If a worker fails, Ray starts all of them again, and the run goes on from its newest checkpoint. It is the way
where a Ray cluster is there already; tools/launch/slurm.sh and jobset.yaml have fewer parts that can fail.

Tried with Ray 2.60 on processors (--gpus 0); not yet on GPUs.
"""

import argparse
import os
import socket
import sys
from typing import Any

import ray.train
import ray.train.collective
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxConfig, JaxTrainer

import moejax
from moejax.launch.join import join


def main() -> int:
    """Runs the job, and returns its exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--gpus", type=int, default=8, help="of each worker; 0: processors only")
    parser.add_argument("--cpus", type=int, default=1, help="that Ray sets aside for each worker")
    parser.add_argument("--max-failures", type=int, default=20, help="restarts")
    parser.add_argument("config", metavar="CONFIG", help="as for moejax train")
    options, flags = parser.parse_known_args()
    try:
        config = moejax.load_config(options.config, flags)
    except moejax.ConfigError as error:
        print("moejax:", error, file=sys.stderr)
        return 2
    folder = os.getcwd()
    JaxTrainer(
        train_worker,
        train_loop_config={"folder": folder, "config": options.config, "flags": flags},
        jax_config=JaxConfig(),  # moejax joins the workers itself: on processors too, and listening at one address only
        scaling_config=ScalingConfig(
            num_workers=options.workers,
            use_gpu=options.gpus > 0,
            resources_per_worker={"CPU": options.cpus, **({"GPU": options.gpus} if options.gpus else {})},
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=os.path.join(folder, "runs", "ray"),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    ).fit()
    return 0


def train_worker(job: dict[str, Any]) -> None:
    """One process of the run."""
    os.chdir(job["folder"])
    context = ray.train.get_context()
    address = ray.train.collective.broadcast_from_rank_zero(own_address() if context.get_world_rank() == 0 else None)
    place = {"processes": context.get_world_size(), "process": context.get_world_rank(), "coordinator": address}
    launch = [word for name, value in place.items() for word in (f"--launch.{name}", str(value))]
    moejax.train(join(moejax.load_config(job["config"], [*job["flags"], *launch])))


def own_address() -> str:
    """This node's address, with a port that is free."""
    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0)) as free:
        return f"{host}:{free.getsockname()[1]}"


if __name__ == "__main__":
    sys.exit(main())
