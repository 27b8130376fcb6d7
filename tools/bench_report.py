"""How long `moejax report` takes for a run of DeepSeek-V3's size, how large its page is, and what recording costs.

    python tools/bench_report.py [--steps 100000] [--folder DIR]

It makes a run folder with that many steps of 59 MoE layers with 256 experts, and their loads every 100 steps; the
numbers are drawn, so that the heat maps do not compress.
"""

import argparse
import json
import math
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from moejax.config_source import read_config
from moejax.train.balance import load_entropy, relative_load

LAYERS, EXPERTS, EVERY = 59, 256, 100
CONFIG = Path(__file__).parents[1] / "configs" / "deepseek_v3.py"


def make_run(folder: Path, steps: int) -> None:
    """Writes the folder of a run that was cut off."""
    random = np.random.default_rng(0)
    (folder / "config.json").write_text(read_config(CONFIG).to_json())
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            violation = (0.3 + 3 * math.exp(-step / 2000)) * random.random(LAYERS)
            line = {"step": step, "tokens": step * 15360 * 4096, "loss": 1.7 + 9 * math.exp(-step / 1500)}
            line |= {"grad_norm": random.random(), "learning_rate": 2.2e-4, "tokens_per_second": 3e6, "mfu": 0.35}
            line |= {"max_violation": violation.tolist(), "load_entropy": np.round(5.5 - violation, 5).tolist()}
            file.write(json.dumps(line | {"dead_experts": 0, "data_wait": 0.001, "step_time": 20.0}) + "\n")
    with open(folder / "expert_load.jsonl", "w", encoding="utf-8") as file:
        for step in range(EVERY, steps + 1, EVERY):
            load, bias = np.exp(0.3 * random.normal(size=(LAYERS, EXPERTS))), random.normal(size=(LAYERS, EXPERTS))
            rows = {"load": load.round(3).tolist(), "bias": bias.round(6).tolist()}
            file.write(json.dumps({"step": step} | rows) + "\n")


def recording_seconds() -> float:
    """Seconds a step for the entropy of its loads, the median of 200."""
    counts, spent = np.random.default_rng(0).integers(1, 1000, (LAYERS, EXPERTS)), []
    for _ in range(200):
        began = time.perf_counter()
        np.round(load_entropy(relative_load(counts)), 5).tolist()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def main() -> None:
    """Makes the run, reports on it, and prints what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="that is made and kept; None: one that is removed again")
    options = parser.parse_args()
    from moejax.report.page import write_report

    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        make_run(folder, options.steps)
        size = sum(path.stat().st_size for path in folder.iterdir())
        before, wall = time.process_time(), time.perf_counter()
        path = write_report([folder])
        spent, wall = time.process_time() - before, time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{options.steps:,} steps, {size / 1e6:.0f} MB: {spent:.1f} s of CPU, {wall:.1f} s; peak {peak:.2f} GB")
        print(f"page: {path.stat().st_size / 1e6:.2f} MB")
    print(f"recording: {recording_seconds() * 1e3:.2f} ms a step")


if __name__ == "__main__":
    main()
