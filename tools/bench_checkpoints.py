"""What checkpoints cost: stalls, slower steps, memory, the speed of restoring and verifying, a killed run's way back.

    python tools/bench_checkpoints.py [--folder FOLDER] [--saves 8] [--rows 2] [--step-cores N] [--small-saves 50]

A model of 100 million parameters in FP32, with its moments 1.2 GB, is trained on this machine's CPU in one process and
saved again and again. Reported, as medians with the smallest and the largest:

- stall: how long the step after a save waits, and the same for a GB
- the 10 steps after a save, relative to the 10 steps before it: what else the machine does is in it, as in the control
- the control: the 10 steps before a save, relative to the 10 before them, with no save between
- how much longer the step beside a save takes than the usual one of the 20 around it, relative to 10 of them:
  a part of what a save costs, as later steps may be slower too
- peak of the process's memory in a save, beyond that before it, relative to the state (the shard of its one device)
- memory after each of many saves of a small state: how the median of the last third differs from that of the second
- bytes per second of a restore and of a verification from disk, relative to reading the same files and nothing else
- SIGKILL in a step of a run with `--launch.restarts 1`: the seconds to its first new step, and of what they consist

Files are dropped from the page cache before they are read, where the system allows it.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

CONFIG = '''"""Written by bench_checkpoints.py."""

from moejax.config import (
    AttentionConfig, CheckpointConfig, DataConfig, LogConfig, ModelConfig, MoEConfig, OptimizerConfig, Phase, RunConfig,
    ScheduleConfig,
)


def config() -> RunConfig:
    return RunConfig(
        steps=1,
        precision="fp32",
        model=ModelConfig(
            vocab_size=512,
            hidden_size={hidden},
            num_layers={layers},
            num_dense_layers=1,
            dense_width={hidden},
            attention=AttentionConfig(
                num_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_dim=32, qk_rope_dim=16, v_dim=32
            ),
            moe=MoEConfig(
                num_experts=32, num_shared=1, top_k=2, num_groups=4, top_groups=2, expert_width={expert_width}
            ),
            init_std=0.02,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-4, moments="fp32"),
        schedule=ScheduleConfig(warmup_steps=10, learning_rate=(Phase(until=1.0, value=1.0),)),
        data=DataConfig(train=({text!r},), sequence_length=64, batch_size={rows}, virtual_shards=2),
        checkpoint=CheckpointConfig(every_minutes=None, keep=2, keep_best=False),
        log=LogConfig(
            valid_every=10**6, pictures_every=10**6, sample_tokens=0, tensorboard=False, peak_flops=1e12
        ),
    )
'''
LARGE = {"hidden": 512, "layers": 9, "expert_width": 256}
SMALL = {"hidden": 64, "layers": 3, "expert_width": 32}
BETWEEN = 30  # steps between two saves: 10 after the one, 10 that nothing happens in, 10 before the other
GB = 1e9
ON_CPU = {**os.environ, "JAX_PLATFORMS": "cpu"}


def main() -> None:
    """Runs everything and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_checkpoints"))
    parser.add_argument("--saves", type=int, default=8, help="of the large state")
    parser.add_argument("--rows", type=int, default=2, help="of 64 tokens, in a step of the large model")
    cores = (
        "that a step of the large model keeps busy, as XLA takes them from NPROC: the others are free, as beside a GPU"
    )
    parser.add_argument("--step-cores", type=int, help=cores)
    parser.add_argument("--small-saves", type=int, default=50, help="of the small state")
    names = ["saves", "peaks", "many", "reading", "killed"]
    parser.add_argument("--parts", nargs="+", default=names, choices=names, help="reading needs the run of saves")
    options = parser.parse_args()
    if "saves" in options.parts:
        shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    text = options.folder / "text.txt"
    text.write_text("".join(f"{i} to the power of two is {i * i}\n" for i in range(100_000)))
    for name, sizes, rows in (("large", LARGE, options.rows), ("small", SMALL, 2)):
        (options.folder / f"{name}.py").write_text(CONFIG.format(text=str(text.absolute()), rows=rows, **sizes))
    parts = {
        "saves": lambda: saves(options.folder, options.saves, options.step_cores),
        "peaks": peaks,
        "many": lambda: many_saves(options.folder, options.small_saves),
        "reading": lambda: reading(options.folder),
        "killed": lambda: killed(options.folder),
    }
    for part in options.parts:
        for what, value in parts[part]():
            print(f"| {what} | {value} |", flush=True)


# ------------------------------------------------------------------------------------------------------------ saving


def saves(folder: Path, number: int, cores: int | None) -> list[tuple[str, str]]:
    """Stalls and slower steps of a run that saves the large state."""
    run, limit = folder / "large", {} if cores is None else {"NPROC": str(cores)}
    if train(folder / "large.py", run, BETWEEN * number + 10, BETWEEN, env=limit).wait():
        sys.exit(f"{run}: the run failed")
    steps = {line["step"]: line["step_time"] for line in lines(run, "metrics")}
    done = [event for event in lines(run, "events") if event["kind"] == "checkpoint" and event["step"] % BETWEEN == 0]
    done = [event for event in done if event["step"] + 10 in steps]
    size = done[0]["bytes"]
    ledger = [event["seconds"].get("save_stall", 0.0) for event in lines(run, "events") if event["kind"] == "ledger"]
    stalls = [after - before for before, after in itertools.pairwise(ledger) if after > before]
    stalls = stalls[: len(done)]  # the last save is waited for
    usual = {e["step"]: statistics.median(steps[e["step"] + k] for k in (*range(-9, 1), *range(2, 11))) for e in done}
    longer = [(steps[step + 1] - seconds) / seconds for step, seconds in usual.items()]
    around = [[window(steps, event["step"] + first) for first in (-19, -9, 1)] for event in done]
    return [
        ("state", f"{size / GB:.2f} GB"),
        ("a save, from its begin to its commit", f"{spread([event['seconds'] for event in done])} s"),
        ("stall per save", f"{spread(stalls)} s"),
        ("stall per GB", f"{spread([stall / size * GB for stall in stalls])} s"),
        ("10 steps after a save / before it", spread([after / before for _, before, after in around])),
        ("10 steps / 10 before them, no save between", spread([later / earlier for earlier, later, _ in around])),
        ("the step beside a save, longer by, of 10 steps", spread([share / 10 for share in longer])),
        ("step", f"{spread([before for _, before, _ in around])} s"),
    ]


def many_saves(folder: Path, number: int) -> list[tuple[str, str]]:
    """How memory grows over many saves of a small state."""
    run = folder / "small"
    shutil.rmtree(run, ignore_errors=True)
    with Sampled() as memory:
        memory.run(train(folder / "small.py", run, number, 1))
    done = [event for event in lines(run, "events") if event["kind"] == "checkpoint"]
    size = done[0]["bytes"]
    levels = [memory.median(event["time"] - 0.2, event["time"] + 0.2) for event in done]
    third = len(levels) // 3
    middle, last = (statistics.median(levels[start : start + third]) for start in (third, 2 * third))
    return [
        (f"memory after {len(done)} saves of {size / 1e6:.1f} MB", f"{levels[-1] / 1e6:.0f} MB"),
        ("growth from their second to their last third", f"{(last - middle) / 1e6:+.1f} MB"),
    ]


class Sampled:
    """The memory (proportional set) of a child process over time: a context manager."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []
        self._done = threading.Event()

    def __enter__(self) -> "Sampled":
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def run(self, process: subprocess.Popen) -> None:
        """Samples until the process has ended."""
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                self._samples.append((time.time(), seen.memory_info().rss))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.02)
        if process.wait():
            sys.exit(f"{process.args!r} ended with {process.returncode}")

    def median(self, began: float, ended: float) -> float:
        """The usual in a span of time, in bytes."""
        return statistics.median(size for moment, size in self._samples if began <= moment <= ended)


def peaks() -> list[tuple[str, str]]:
    """The memory that a save takes, while a step makes the next state, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--memory", folder]
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=ON_CPU).stdout
    size, *over = map(float, said.split())
    return [(f"peak of memory in a save of {size / GB:.2f} GB beyond that before it / state", spread(over))]


def memory_alone(folder: Path) -> str:
    """Bytes of a state, and for each of five saves the peak beyond the memory before it, relative to them."""
    import jax
    import jax.numpy as jnp

    from moejax.checkpoint.manager import Checkpoints

    shapes = [(8, 32, 512, 512)] * 2 + [(8, 32, 256, 512)] + [(512, 512)] * 40 + [(8, 512, 128)] * 20
    state = {f"{number}": jnp.ones(shape, jnp.float32) for number, shape in enumerate(shapes)}
    size = sum(array.nbytes for array in state.values())
    step = jax.jit(lambda state: jax.tree.map(lambda array: array * 0.5 + 1, state), donate_argnums=0)
    state = jax.block_until_ready(step(state))
    found = []
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for number in range(1, 6):
            before, done = psutil.Process().memory_info().rss, threading.Event()
            most = [before]

            def watch(done: threading.Event = done, most: list[int] = most) -> None:
                while not done.wait(0.003):
                    most.append(psutil.Process().memory_info().rss)

            watcher = threading.Thread(target=watch)
            watcher.start()
            checkpoints.save(number, {"state": state}, {})
            state = jax.block_until_ready(step(state))
            saved = checkpoints.wait()
            done.set()
            watcher.join()
            if saved is None or saved.failure is not None:
                sys.exit(f"save {number} failed: {saved}")
            found.append((max(most) - before) / size)
    return " ".join(map(str, [size, *found]))


# ----------------------------------------------------------------------------------------------------------- reading


def reading(folder: Path) -> list[tuple[str, str]]:
    """Speed of a verification and of a restore against that of reading the files, in turns, each in a new process."""
    checkpoint = max((folder / "large" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    seconds: dict[str, list[float]] = {"read": [], "verify": [], "restore": []}
    for _ in range(3):
        for what in seconds:
            dropped = drop(checkpoint)
            command = [sys.executable, __file__, f"--{what}", str(checkpoint)]
            seconds[what].append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    speeds = {what: [size / value / GB for value in values] for what, values in seconds.items()}
    plain = statistics.median(speeds["read"])
    where = "from disk" if dropped else "from the page cache"
    rows = [(f"reading the files {where}", f"{spread(speeds.pop('read'))} GB/s")]
    for what, values in speeds.items():
        rows.append((f"{what} {where}", f"{spread(values)} GB/s, {statistics.median(values) / plain:.2f} of reading"))
    return rows


def drop(folder: Path) -> bool:
    """Asks the system to forget the content of the files; whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def read_alone(checkpoint: Path) -> float:
    """Seconds to read all files of a checkpoint."""
    began, buffer = time.perf_counter(), bytearray(1 << 24)
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return time.perf_counter() - began


def verify_alone(checkpoint: Path) -> float:
    """Seconds to verify a checkpoint."""
    from moejax.checkpoint.integrity import verify

    began = time.perf_counter()
    if verify(checkpoint).damages:
        sys.exit(f"{checkpoint} is damaged")
    return time.perf_counter() - began


def restore_alone(checkpoint: Path) -> float:
    """Seconds to load the state of a checkpoint onto one device."""
    import jax

    from moejax.checkpoint.manager import Checkpoints
    from moejax.config import RunConfig
    from moejax.mesh import make_mesh, resolve
    from moejax.train.resume import checkpoint_parts
    from moejax.train.state import abstract_state

    run = checkpoint.parent.parent
    config = resolve(RunConfig.from_json((run / "config.json").read_text()), 1)
    shapes = checkpoint_parts(abstract_state(config, make_mesh(config.mesh, jax.devices()[:1])))
    began = time.perf_counter()
    jax.block_until_ready(Checkpoints(checkpoint.parent).load(int(checkpoint.name), shapes))
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------------- killed


def killed(folder: Path) -> list[tuple[str, str]]:
    """A run of the large state is killed in a step after its save, three times: its way back."""
    times = [way_back(folder / "large.py", folder / f"killed{number}") for number in range(3)]
    return [(what, spread([time[what] for time in times])) for what in times[0]]


def way_back(config: Path, run: Path) -> dict[str, float]:
    """Seconds of each part of the way from SIGKILL to the first new step, and the steps that are done again."""
    launcher = train(config, run, 1000, 3, "--launch.restarts", "1")
    event_of(run, "checkpoint", 0.0, launcher)
    time.sleep(5)
    (child,) = psutil.Process(launcher.pid).children()
    child.send_signal(signal.SIGKILL)
    at, before = time.time(), len(lines(run, "metrics"))
    resumed = event_of(run, "resumed", at, launcher)
    (again,) = psutil.Process(launcher.pid).children()
    began = again.create_time()
    while lines(run, "metrics")[-1]["step"] == resumed["step"]:
        time.sleep(0.01)
    stepped = time.time()
    launcher.terminate()
    if launcher.wait():
        sys.exit(f"{run}: ended with {launcher.returncode}")
    spent = [event for event in lines(run, "events") if event["kind"] == "ledger" and event["attempt"] >= at][-1]
    shutil.rmtree(run)
    return {
        "SIGKILL to the start of another process, 1 s of it waited": began - at,
        "its imports, devices and data": spent["seconds"]["initialisation"],
        "restore: verification and loading": spent["seconds"]["restore"],
        "programs, from the cache": spent["seconds"]["compilation"],
        "SIGKILL to the first new step": stepped - at,
        "steps done again": before - resumed["step"],
    }


def event_of(run: Path, kind: str, since: float, process: subprocess.Popen) -> dict:
    """Waits for an event."""
    while True:
        for event in lines(run, "events"):
            if event["kind"] == kind and event["time"] > since:
                return event
        if process.poll() is not None:
            sys.exit(f"{process.args!r} ended with {process.returncode}")
        time.sleep(0.01)


# -------------------------------------------------------------------------------------------------------------- pieces


def train(
    config: Path, run: Path, steps: int, every: int, *flags: str, env: dict[str, str] | None = None
) -> subprocess.Popen:
    """Starts a run; `env`: more of its environment."""
    words = ["--steps", str(steps), "--out", str(run), "--checkpoint.every-steps", str(every), *flags]
    command = [sys.executable, "-m", "moejax", "train", str(config), *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**ON_CPU, **(env or {})})


def lines(run: Path, name: str) -> list[dict]:
    """The whole lines of a file of a run."""
    path = run / f"{name}.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def window(steps: dict[int, float], first: int) -> float:
    """Mean seconds of 10 steps."""
    return statistics.fmean(steps[step] for step in range(first, first + 10))


def spread(values: Sequence[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    ALONE = {"--memory": memory_alone, "--read": read_alone, "--verify": verify_alone, "--restore": restore_alone}
    if len(sys.argv) == 3 and sys.argv[1] in ALONE:
        print(ALONE[sys.argv[1]](Path(sys.argv[2])))
    else:
        main()
