"""Loss curves of one config on one device and on a pipeline, and how far rounding alone takes two runs apart.

    python tools/curves.py [--steps 100] [--out FOLDER] [CONFIG]

Three runs with the same data, seed and float32 arithmetic: one device; one device that adds up four micro-batches;
DualPipe on pipe 4 x expert 2 simulated devices. The first two differ in the order of sums alone. A router's choice
between two experts that are nearly equal turns a last bit into another path, so all curves part in time; the question
is whether the third parts from the first sooner or further than the second does. A run that is there is not repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

RUNS = {
    "one device": (),
    "one device, 4 micro-batches": ("--pipeline.microbatches", "4"),
    "DualPipe, pipe 4 x expert 2": ("--simulate", "8", "--mesh.pipe", "4", "--mesh.expert", "2"),
}
QUIET = (
    "--log.pictures-every",
    "100000",
    "--log.sample-tokens",
    "0",
    "--log.tensorboard",
    "False",
    "--precision",
    "fp32",
)


def main() -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    options = parser.parse_args()
    losses = {name: trained(options.config, options.steps, options.out, name) for name in RUNS}
    print(table(losses))


def trained(config: str, steps: int, out: Path, name: str) -> np.ndarray:
    """The loss of every step of a run, float64 [steps]."""
    folder = out / name.replace(",", "").replace(" ", "_")
    words = ["--steps", str(steps), "--out", str(folder), *QUIET, *RUNS[name]]
    subprocess.run([sys.executable, "-m", "moejax", "train", config, *words], check=True)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def table(losses: dict[str, np.ndarray]) -> str:
    """In Markdown: the largest relative difference to the first run, in spans of steps that double."""
    names, (first, *others) = list(losses), losses.values()
    ends = [5 * 2**i for i in range(20) if 5 * 2**i < len(first)] + [len(first)]
    rows = [["steps", "loss", *names[1:]], ["---", *["---:"] * len(names)]]
    for start, end in zip([0, *ends], ends, strict=False):
        span = slice(start, end)
        apart = (np.abs(other - first)[span].max() / first[span].min() for other in others)
        rows.append([f"{start + 1} to {end}", f"{first[end - 1]:.4f}", *(f"{value:.1e}" for value in apart)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
