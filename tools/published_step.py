"""The plan of DeepSeek-V3's training beside what DeepSeek measured and paid, as a Markdown table.

    python tools/published_step.py                     2048 H800: pipe 16, data 2, expert 64 on 8 nodes each, FP8
    python tools/published_step.py --model.remat full  any other field of the config

Published: arXiv:2505.09343, table 4 (a step and its cells), and the V3 report's Table 1 (GPU-hours, dollars). The
estimate is of this program: its slots of the exchange, its casts, its placement of the head. No number of it is fitted.
"""

import sys

from moejax.config_source import load_config
from moejax.mesh import resolve
from moejax.plan.arrays import state_arrays
from moejax.plan.cost import cost
from moejax.plan.hardware import load_hardware
from moejax.plan.time import Timing, estimate

MESH = ("--mesh.pipe", "16", "--mesh.data", "2", "--mesh.expert", "64", "--mesh.expert-nodes", "8")
DEVICES = 2048


def rows(words: list[str]) -> list[tuple[str, float, float]]:
    """Name, estimate and published value of each number."""
    config = resolve(load_config("configs/deepseek_v3.py", [*MESH, "--precision", "fp8", *words]), DEVICES)
    hardware = load_hardware("h800")
    timing: Timing = estimate(config, hardware)
    run = cost(config, hardware, timing, state_arrays(config))
    cells = timing.cells
    return [
        ("a step, s", timing.step, 19.926),
        ("of it forward alone (1F)", cells["1F"], 1.13),
        ("backward alone, of the input (1B; here with weights where they are not put off)", cells["1B"], 1.99),
        ("weight gradients alone (1W)", cells.get("1W", 0.0), 0.48),
        ("forward and backward joined (1F1B)", cells["1F1B"], 13.95),
        ("bubble", cells["bubble"], 2.06),
        ("optimizer, with what is sent once a step", cells["outside"], 0.29),
        ("tokens/s per GPU", timing.tokens_per_second, 1543),
        ("MFU, causal, % of the BF16 peak", 100 * timing.mfu, 38.94),
        ("GPU-hours per trillion tokens, thousands", run.gpu_hours_per_trillion / 1e3, 180),
        ("GPU-hours of pre-training, thousands", run.gpu_hours / 1e3, 2664),
        ("dollars of pre-training, millions", run.dollars / 1e6, 5.328),
    ]


def main() -> None:
    """Prints the table."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    print("| | estimate | published | ratio |\n|---|---:|---:|---:|")
    for name, estimated, published in rows(sys.argv[1:]):
        print(f"| {name} | {estimated:,.4g} | {published:,.4g} | {estimated / published:.2f} |")


if __name__ == "__main__":
    main()
