"""Checks and measures moejax on a Hopper GPU, in less than 9 minutes. It has not run on a GPU yet.

    python tools/gpu_check.py                              all sections; results in runs/gpu_check
    python tools/gpu_check.py --only parity stage_fp8      these; the others' results of before stay, for the shares
    python tools/gpu_check.py --dry-run                    no GPU: every program of every section, compiled for an H200

It takes the extra `cuda` (a dry run: `hopper`); the sections in which torch runs say so where it is not installed.
Each section is a process with a limit of its own. One that crashes or is late is a line in the table, as is one for
which no time is left, and the others run.

In the folder:

    results.jsonl   one object a number: section, name, shape, value, unit; `of` and share; aim or bound, and `met`
    table.txt       the same for a person, as printed at the end
    NAME.log        what a section printed
    gpu.txtpb       the GPU as XLA describes it, if it does
    hardware.json   for a planner: device; memory_bytes, which JAX may take; copy_bytes_per_second, read and written;
                    bf16_flops and fp8_flops, of the fastest dense product (FLOP/s); and `efficiency`, the share of
                    these that an operation reaches, the median over shapes: grouped_forward, grouped_dx and grouped_dw
                    ({"bf16": share, "fp8": share}), attention_forward and attention_backward ({"bf16": share}; FLOPs
                    of the causal half), memory_bound ({"bytes": share of the copy})

A ratio to something that is measured in the same run is a share: of a dense product of the same size by the fastest
library (BF16), of the same product in BF16 (FP8: how many times as fast), of a copy, of `transformers`.

Exit code: 0; 1 where a section failed or a kernel is off its bound (an aim that is missed is no failure); 2 for wrong
words; 3 where there is no Hopper GPU.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from gpu.driver import Section, run_sections
from gpu.results import exit_code, hardware, judged, table, write

NO_GPU = 3
SECTIONS = (  # typical seconds on an H200 are estimates
    Section("versions", "gpu.ceilings:versions", 10, 40),
    Section("ceilings", "gpu.ceilings:ceilings", 25, 60),
    Section("torch_ceilings", "gpu.ceilings:ceilings_of_torch", 20, 45),
    Section("parity", "gpu.parity:kernels", 70, 130),
    Section("operations", "gpu.parity:operations", 30, 70),
    Section("grouped_bf16", "gpu.kernels:grouped_bf16", 35, 70),
    Section("grouped_fp8", "gpu.kernels:grouped_fp8", 55, 90),
    Section("memory_bound", "gpu.kernels:memory_bound", 25, 60),
    Section("attention", "gpu.attention:attention", 20, 50),
    Section("stage_bf16", "gpu.layers:stage_bf16", 35, 75),
    Section("stage_fp8", "gpu.layers:stage_fp8", 40, 75),
    Section("small_moe_bf16", "gpu.training:small_moe_bf16", 60, 100),
    Section("transformers", "gpu.training:transformers", 50, 90),
    Section("small_moe_fp8", "gpu.training:small_moe_fp8", 50, 90),
)
PROBE = "import jax; d = jax.local_devices()[0]; print(d.platform, getattr(d, 'compute_capability', ''), d.device_kind)"


def main(arguments: list[str] | None = None) -> int:
    """Runs sections and reports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder; default runs/gpu_check, of a dry run runs/gpu_check_dry")
    parser.add_argument("--only", nargs="+", metavar="SECTION", choices=[s.name for s in SECTIONS], help="sections")
    parser.add_argument("--dry-run", action="store_true", help="compile every program for an H200 that is not there")
    parser.add_argument("--minutes", type=float, default=9.0, help="that a run may take; a dry run has no limit")
    parser.add_argument(
        "--torch", default=sys.executable, metavar="PYTHON", help="interpreter with torch, transformers"
    )
    options = parser.parse_args(arguments)
    dry = options.dry_run
    if not dry:
        found = device()
        if not found.startswith("gpu 9.0"):
            print(f"gpu_check: no Hopper GPU here, JAX has {found!r}; --dry-run needs none", file=sys.stderr)
            return NO_GPU
    out = options.out or Path("runs/gpu_check_dry" if dry else "runs/gpu_check")
    sections = [s for s in SECTIONS if not options.only or s.name in options.only]
    seconds = float("inf") if dry else 60 * options.minutes - 15  # the probe and the report take a few
    results = judged(run_sections(sections, out, dry=dry, seconds=seconds, torch=options.torch))
    report(results, out)
    return exit_code(results)


def device() -> str:
    """Platform, compute capability and kind of JAX's first device, found by a process that then leaves it alone."""
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    lines = (probe.stdout if probe.returncode == 0 else probe.stderr).strip().splitlines()
    return lines[-1] if lines else "nothing"


def report(results: list, out: Path) -> None:
    """Writes the files of the folder, and prints the table."""
    write(out / "results.jsonl", results)
    printed = table(results)
    (out / "table.txt").write_text(printed + "\n", encoding="utf-8")
    found = hardware(results)
    if found is not None:
        (out / "hardware.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(printed)


if __name__ == "__main__":
    sys.exit(main())
