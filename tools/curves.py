"""How far loss curves of one config part that should be equal: on a pipeline, in FP8.

    python tools/curves.py pipeline [CONFIG] [--steps 100] [--out FOLDER]
    python tools/curves.py fp8 [CONFIG] [--steps 2000] [--out FOLDER] [--seeds 0 1 2 3] [--at-once 2] [--no-control]

Three runs with the same data and seed each. The first two differ in the order of sums alone: one device, and one device
that adds up four micro-batches. A router's choice between two experts that are nearly equal turns a last bit into
another path, so all curves part in time; the question is whether the third parts from the first sooner or further than
the second does. It is DualPipe on pipe 4 x expert 2 simulated devices, all in FP32; or FP8, where the others are BF16.
`--no-control` leaves the second out, for which several seeds can stand.

Prints a table of the losses and of those smoothed as in section 3.3.4 of the V3 report (each step adds a tenth of
itself), and draws the latter. Of several seeds it shows the mean curves, and how far the means over spans of steps are
apart, with the standard errors that the seeds give them. Two models that are equally good differ on one batch, the more
so the smaller it is: how far the smoothed curves part from that alone is said last.

A run that is there is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

MICROBATCHES = ("--pipeline.microbatches", "4")
SIMULATED = ("--simulate", "8", "--mesh.pipe", "4", "--mesh.expert", "2")
COMPARISONS = {
    "pipeline": {
        "one device": ("--precision", "fp32"),
        "one device, 4 micro-batches": ("--precision", "fp32", *MICROBATCHES),
        "DualPipe, pipe 4 x expert 2": ("--precision", "fp32", *SIMULATED),
    },
    "fp8": {
        "BF16": ("--precision", "bf16"),
        "BF16, 4 micro-batches": ("--precision", "bf16", *MICROBATCHES),
        "FP8": ("--precision", "fp8"),
    },
}
QUIET = ("--log.pictures-every", "100000", "--log.sample-tokens", "0", "--log.tensorboard", "False")
COLOURS = ("#6b7280", "#d9730d")  # of all runs but the first
KEPT = 0.9  # of the smoothed loss, in a step
PUBLISHED = 0.0025  # bound of the relative difference between FP8 and BF16


def main() -> None:
    """Trains what is missing, prints the tables, draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("config", nargs="?", default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--no-control", action="store_true", help="without the run that adds in another order alone")
    parser.add_argument("--at-once", type=int, default=1, help="runs at one time, which share the processors")
    options = parser.parse_args()
    runs = dict(COMPARISONS[options.comparison])
    if options.no_control:
        del runs[list(runs)[1]]
    share = {"NPROC": str(max(1, (os.cpu_count() or 1) // options.at_once))} if options.at_once > 1 else {}

    def run(seed: int, name: str) -> np.ndarray:
        words = ("--seed", str(seed), "--steps", str(options.steps), *runs[name])
        return trained(options.config, options.out / f"{name.replace(',', '').replace(' ', '_')}_{seed}", words, share)

    with ThreadPoolExecutor(options.at_once) as pool:
        running = [{name: pool.submit(run, seed, name) for name in runs} for seed in options.seeds]  # whole seeds first
        losses = {name: np.stack([of_seed[name].result() for of_seed in running]) for name in runs}
    smooth = {name: smoothed(loss) for name, loss in losses.items()}
    print(table({name: loss.mean(0) for name, loss in losses.items()}))
    print("\nsmoothed\n")
    print(table({name: loss.mean(0) for name, loss in smooth.items()}))
    print("\nmeans of the smoothed\n")
    print(means_table(smooth))
    print("\nfrom one step to the next alone, a standard deviation of the smoothed mean")
    print("\n".join(f"{name}: {value:.2%}" for name, value in batch_noise(losses).items()))
    picture = options.out / "curves.png"
    draw(smooth, PUBLISHED if options.comparison == "fp8" else None).savefig(picture, dpi=150)
    print(f"\n{picture}")


def trained(config: str, folder: Path, words: tuple[str, ...], env: dict[str, str]) -> np.ndarray:
    """The loss of every step of a run, float64 [steps]; `env`: more of its environment."""
    command = [sys.executable, "-m", "moejax", "train", config, "--out", str(folder), *QUIET, *words]
    subprocess.run(command, check=True, env={**os.environ, **env})
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def smoothed(losses: np.ndarray) -> np.ndarray:
    """The exponential moving average over the steps [seeds, steps], of which the start is taken out."""
    total, found = np.zeros(len(losses)), []
    for step, value in enumerate(losses.T, 1):
        total = KEPT * total + (1 - KEPT) * value
        found.append(total / (1 - KEPT**step))
    return np.stack(found, axis=1)


def table(losses: dict[str, np.ndarray]) -> str:
    """The largest relative difference of curves [steps] to the first, in spans of steps."""
    names, (first, *others) = list(losses), losses.values()
    rows = [["steps", f"loss, {names[0]}", *names[1:]]]
    for start, end in spans(len(first)):
        largest = (np.abs(other / first - 1)[start:end].max() for other in others)
        rows.append([f"{start + 1} to {end}", f"{first[end - 1]:.4f}", *(f"{value:.1e}" for value in largest)])
    return markdown(rows)


def means_table(losses: dict[str, np.ndarray]) -> str:
    """The mean relative difference of curves [seeds, steps] to the first, in spans and over all steps.

    Its standard error is that of the seeds' means; of one seed nan.
    """
    names, (first, *others) = list(losses), losses.values()
    rows = [["steps", *names[1:]]]
    for start, end in [*spans(first.shape[1]), (0, first.shape[1])]:
        means = [(other / first - 1)[:, start:end].mean(1) for other in others]
        errors = [mean.std(ddof=1) / len(mean) ** 0.5 if len(mean) > 1 else float("nan") for mean in means]
        shown = (f"{mean.mean():+.2%} ± {error:.2%}" for mean, error in zip(means, errors, strict=True))
        rows.append([f"{start + 1} to {end}", *shown])
    return markdown(rows)


def batch_noise(losses: dict[str, np.ndarray]) -> dict[str, float]:
    """How far the smoothed mean over seeds parts from the first by what has no memory from step to step.

    Of the relative differences of losses [seeds, steps] in the second half of the run, where models have parted.
    """
    first, *others = (loss.mean(0)[loss.shape[1] // 2 :] for loss in losses.values())
    once = [np.diff(other / first).std() / 2**0.5 for other in others]  # both steps of a difference vary
    kept = ((1 - KEPT) / (1 + KEPT)) ** 0.5  # by the smoothing
    return {name: float(value * kept) for name, value in zip(list(losses)[1:], once, strict=True)}


def spans(steps: int) -> list[tuple[int, int]]:
    """First steps and ends of spans that double."""
    ends = [5 * 2**i for i in range(20) if 5 * 2**i < steps] + [steps]
    return list(zip([0, *ends], ends, strict=False))


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is the heading."""
    heading, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---", *["---:"] * (len(heading) - 1)], *others])


def draw(losses: dict[str, np.ndarray], bound: float | None) -> Figure:
    """The mean curves above, and below their relative differences to the first; `bound`: of the last one's.

    Of several seeds each one's difference is drawn too, thinner.
    """
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    (first_name, first), *others = losses.items()
    steps = range(1, first.shape[1] + 1)
    above.plot(steps, first.mean(0), color="black", linewidth=2, label=first_name)
    for colour, (name, loss) in zip(COLOURS[-len(others) :], others, strict=True):
        above.plot(steps, loss.mean(0), color=colour, linewidth=1, label=name)
        if len(loss) > 1:
            below.plot(steps, 100 * (loss / first - 1).T, color=colour, linewidth=0.4, alpha=0.5)
        difference = 100 * (loss.mean(0) / first.mean(0) - 1)
        below.plot(steps, difference, color=colour, linewidth=1, label=f"{name} against {first_name}")
    if bound is not None:
        below.axhspan(-100 * bound, 100 * bound, color="#2e8540", alpha=0.12, label=f"published bound, {bound:.2%}")
    above.set_ylabel("smoothed loss (nats per token)")
    below.set_ylabel("relative difference (%)")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
