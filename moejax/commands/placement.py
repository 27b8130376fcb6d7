"""`moejax placement RUN --gpus N`: where experts should lie to serve a model, by the loads that its run recorded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moejax.commands.parser import Parser
from moejax.config import ConfigError, RunConfig
from moejax.config_source import read_config
from moejax.ops.placement import Placement, gpu_load, plain_placement, rebalance_experts

RECORDED = "expert_load.jsonl"


def placement_command(words: Sequence[str]) -> int:
    """Prints a placement of the experts, and what it does for the GPU with most load. Returns the exit code."""
    parser = Parser("placement", "Places experts on GPUs, heavy ones several times (DeepSeek's EPLB).")
    parser.add_argument("run", metavar="RUN", help="run folder, whose expert_load.jsonl says the loads")
    parser.add_argument("--gpus", type=int, required=True, help="that serve the model")
    parser.add_argument(
        "--redundant", type=int, default=0, help="replicas beyond one of each expert, all GPUs together"
    )
    parser.add_argument(
        "--nodes", type=int, default=1, help="machines; groups of experts stay on one where they divide"
    )
    parser.add_argument("--last", type=int, default=10, help="records of which the mean is the load; the newest")
    parser.add_argument("--json", action="store_true", help="all of it as JSON, with the expert in every place")
    options = parser.parse_args(list(words))
    config = read_config(options.run)
    load = _recorded(Path(options.run), options.last)
    experts = config.model.moe.num_experts
    if load.shape[1] != experts:
        raise ConfigError(RECORDED, load.shape[1], f"a load of each of the {experts} experts")
    if options.redundant < 0:
        raise ConfigError("--redundant", options.redundant, "0 or more")
    placement = _placed(load, config, options.redundant, options.nodes, options.gpus)
    facts = _facts(load, placement, options.gpus, config)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    return 0


def _placed(load: np.ndarray, config: RunConfig, redundant: int, nodes: int, gpus: int) -> Placement:
    moe, words = config.model.moe, {"num_gpus": "--gpus", "num_nodes": "--nodes", "num_physical": "--redundant"}
    try:
        return rebalance_experts(load, moe.num_experts + redundant, moe.num_groups, nodes, gpus)
    except ConfigError as error:
        if error.place == "num_physical":
            wanted = f"so many that they and the {moe.num_experts} experts are a multiple of the {gpus} GPUs"
            raise ConfigError("--redundant", redundant, wanted) from None
        raise ConfigError(words.get(error.place, error.place), error.value, error.wanted) from None


def _recorded(run: Path, last: int) -> np.ndarray:
    """The mean of the newest recorded loads, [MoE layers, experts]."""
    if last <= 0:
        raise ConfigError("--last", last, "a number above 0")
    try:
        lines = (run / RECORDED).read_text(encoding="utf-8").splitlines()
        loads = [json.loads(line)["load"] for line in lines[-last:]]
    except (OSError, ValueError, KeyError):
        raise ConfigError("RUN", str(run), f"a run folder with an {RECORDED} that can be read") from None
    if not loads:
        raise ConfigError("RUN", str(run), f"a run that has recorded loads (log.pictures_every) in {RECORDED}")
    return np.mean(np.array(loads, float), axis=0)


def _facts(load: np.ndarray, placement: Placement, gpus: int, config: RunConfig) -> dict[str, Any]:
    """Of each layer the load of the GPU with most, relative to the mean, plain and placed."""
    experts, first = load.shape[1], config.model.num_dense_layers
    plain: list[float] | None = None
    if experts % gpus == 0:
        plain = _most(gpu_load(load, plain_placement(len(load), experts), gpus))
    placed = _most(gpu_load(load, placement, gpus))
    return {
        "gpus": gpus,
        "places_per_gpu": placement.logical.shape[1] // gpus,
        "layers": [first + layer for layer in range(len(load))],  # those of MTP modules last
        "plain": plain,
        "placed": placed,
        "placement": placement.logical.tolist(),
    }


def _most(loads: np.ndarray) -> list[float]:
    return (loads.max(1) / loads.mean(1)).tolist()


def _show(facts: dict[str, Any]) -> None:
    console = Console(width=150, highlight=False)
    table = Table("layer")
    for heading in ("most loaded GPU, plain", "placed"):
        table.add_column(heading, justify="right")
    plain = facts["plain"] or [None] * len(facts["placed"])
    for layer, before, after in zip(facts["layers"], plain, facts["placed"], strict=True):
        table.add_row(str(layer), "" if before is None else f"{before:.3f}", f"{after:.3f}")
    console.print(table)
    console.print("load of the most loaded GPU, relative to the mean of all", soft_wrap=True)
    after = float(np.mean(facts["placed"]))
    if facts["plain"] is None:
        console.print(f"mean of the layers {after:.3f}; a plain placement needs GPUs that divide the experts")
        return
    before = float(np.mean(facts["plain"]))
    console.print(f"mean of the layers {before:.3f} plain, {after:.3f} placed: {1 - after / before:.1%} less load")
