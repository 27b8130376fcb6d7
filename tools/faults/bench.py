"""The runs to which faults happen: a tiny model, on text made here; what they leave, and what must hold of it."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from faults.fork import Kill, NoSpace, forked
from moejax.checkpoint.integrity import verify
from moejax.checkpoint.manager import Checkpoints
from moejax.config import RunConfig
from moejax.config_source import load_config
from moejax.mesh import make_mesh, resolve
from moejax.train.ledger import read_events
from moejax.train.resume import checkpoint_parts
from moejax.train.state import abstract_state

STEPS, EVERY, KEEP = 30, 3, 2
DUE = [step for step in range(1, STEPS + 1) if step % EVERY == 0]  # after these a save begins
LONGEST_SECONDS = 300.0  # of anything that is waited for
EXACT = ("step", "tokens", "loss", "balance_loss", "grad_norm", "learning_rate", "max_violation", "dead_experts")
ROOT = Path(__file__).parents[2]
SMALL = """
    --simulate 1 --model.hidden-size 32 --model.num-layers 2 --model.dense-width 48 --model.mtp.depth 0
    --model.moe.num-experts 4 --model.moe.num-groups 2 --model.moe.top-groups 1 --model.moe.top-k 2
    --model.moe.expert-width 16 --data.sequence-length 32 --data.batch-size 4 --data.virtual-shards 2
    --data.valid-fraction 0 --checkpoint.every-minutes None --log.pictures-every 1000000 --log.sample-tokens 0
    --log.tensorboard False --log.peak-flops 1e9 --log.console-seconds 0
"""


def run_config(work: Path) -> RunConfig:
    """A run of a tiny model, on one simulated device and text that is written into `work`."""
    words = ("route", "each", "token", "to", "a", "few", "experts", "and", "drop", "none")
    (work / "text").mkdir(parents=True)
    for number in range(20):
        text = " ".join(words[(number * 7 + i * i) % len(words)] for i in range(100))
        (work / "text" / f"{number:02}.txt").write_text(text)
    every = ["--steps", str(STEPS), "--checkpoint.every-steps", str(EVERY), "--checkpoint.keep", str(KEEP)]
    return load_config(ROOT / "configs" / "tiny.py", [*SMALL.split(), *every, "--data.train", str(work / "text")])


class Report:
    """What was seen: lines at once, rows for the table at the end, and what was wrong."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []
        self.wrong: list[str] = []

    def say(self, line: str) -> None:
        """Prints a line."""
        print(line, flush=True)

    def require(self, good: bool, what: str) -> None:
        """Notes and prints `what` unless it is good."""
        if not good:
            self.wrong.append(what)
            self.say(f"WRONG: {what}")

    def table(self) -> str:
        """All rows, and the number of what was wrong."""
        rows = [*self.rows, ("wrong", f"{len(self.wrong)}")]
        return "\n".join(f"{name:<32} {value}" for name, value in rows)


class Bench:
    """The settings of all runs, the run that nothing happens to, and how others are started."""

    def __init__(self, work: Path):
        """Trains that run; `work` is made."""
        self.work, self.config = work, work / "config.json"
        config = run_config(work)
        self.config.write_text(config.to_json())
        self.compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(work / "compiled")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["moejax.cli", "moejax.train.loop"])
        alone = resolve(config, 1)
        self._shapes = checkpoint_parts(abstract_state(alone, make_mesh(alone.mesh, jax.devices()[:1])))
        self._loading = threading.Lock()
        self.whole = self.uninterrupted("whole")
        self.steps, self.state = exact(self.whole), self.fingerprint(self.whole)

    def uninterrupted(self, name: str, *flags: str) -> Path:
        """The folder of a run that nothing happens to."""
        folder, output = self.work / name, self.work / f"{name}.txt"
        with self.command(folder, output, *flags) as process:
            code = process.wait(LONGEST_SECONDS)
        if code or len(exact(folder)) != STEPS:
            raise RuntimeError(f"a run to which nothing happened ended with exit code {code}: {output.read_text()}")
        return folder

    def words(self, folder: Path, *flags: str) -> list[str]:
        """What follows `moejax`."""
        return ["train", str(self.config), "--out", str(folder), *flags]

    @contextlib.contextmanager
    def command(self, folder: Path, output: Path, *flags: str) -> Iterator[subprocess.Popen]:
        """A context with the run as a user starts it, without any hook; whatever is left of it at the end is killed."""
        kept = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
        cache = {"JAX_COMPILATION_CACHE_DIR": self.compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        env = {**kept, **cache, "PYTHONPATH": os.pathsep.join(sys.path)}
        words = [sys.executable, "-m", "moejax", *self.words(folder, *flags)]
        with open(output, "ab") as file:
            process = subprocess.Popen(words, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            if process.poll() is None:
                for child in (*psutil.Process(process.pid).children(recursive=True), process):
                    child.kill()
            process.wait()

    def fork(
        self, folder: Path, output: Path, *flags: str, kill: Kill | None = None, no_space: NoSpace | None = None
    ) -> Any:
        """A run in a fork, which has begun; the file beside `output`, .phases, gets what phases it is in."""
        phases = output.with_suffix(".phases")
        phases.unlink(missing_ok=True)
        arguments = (self.words(folder, *flags), output, phases, self.compiled, kill, no_space)
        process = self._context.Process(target=forked, args=arguments, daemon=True)
        process.start()
        return process

    def fingerprint(self, folder: Path) -> str:
        """A hash of the arrays of a run's newest checkpoint, and of the position in the data."""
        checkpoints = Checkpoints(folder / "checkpoints")
        step = checkpoints.steps[-1]
        with self._loading:
            meta, parts = checkpoints.load_meta(step), checkpoints.load(step, self._shapes)
        position = [meta[name] for name in ("step", "tokens", "data")]
        sha256 = hashlib.sha256(json.dumps(position, sort_keys=True).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
            array = np.asarray(leaf)
            sha256.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
            sha256.update(array.tobytes())
        return sha256.hexdigest()


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


def exact(folder: Path) -> list[dict[str, Any]]:
    """Of each step done what does not depend on time."""
    return [{key: line[key] for key in EXACT} for line in lines_of(folder / "metrics.jsonl")]


def committed(folder: Path) -> list[int]:
    """The steps of the committed checkpoints of a run, ascending."""
    return Checkpoints(folder / "checkpoints").steps


def damaged(folder: Path) -> list[str]:
    """What is wrong with the committed checkpoints of a run, in words."""
    found = ((step, verify(folder / "checkpoints" / str(step)).damages) for step in committed(folder))
    return [f"checkpoint {step}: {damage}" for step, damages in found for damage in damages]


def events_of(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of these kinds."""
    return [event for event in read_events(folder / "events.jsonl") if event["kind"] in kinds]


def tail(output: Path) -> str:
    """The end of what a run has said."""
    return "\n".join(output.read_text(errors="replace").splitlines()[-5:])


def wait_until(happened: Callable[[], bool], what: str, alive: Callable[[], bool] = lambda: True) -> None:
    """Returns once it has happened.

    Raises:
        RuntimeError: it has not, and the run has ended, or it took too long.
    """
    end = time.monotonic() + LONGEST_SECONDS
    while not happened():
        if not alive() and not happened():
            raise RuntimeError(f"the run ended before {what}")
        if time.monotonic() > end:
            raise RuntimeError(f"{LONGEST_SECONDS:g} s have passed without {what}")
        time.sleep(0.002)


def require_equal_end(bench: Bench, report: Report, folder: Path, whole: Path, *flags: str) -> None:
    """The run comes to its end, with the losses and the final state of `whole`, bitwise."""
    output = folder.with_suffix(".txt")
    with bench.command(folder, output, *flags) as process:
        code = process.wait(LONGEST_SECONDS)
    report.require(code == 0, f"{folder}: exit code {code}\n{tail(output)}")
    require_equal(bench, report, folder, whole)


def require_equal(bench: Bench, report: Report, folder: Path, whole: Path, rtol: float = 0.0) -> None:
    """The run has the losses and the final state of `whole`, bitwise; with `rtol` only the losses, and to that."""
    if rtol:
        got, want = ([line["loss"] for line in exact(one)] for one in (folder, whole))
        close = len(got) == len(want) and np.allclose(got, want, rtol=rtol, atol=0)
        report.require(close, f"{folder}: losses differ by more than {rtol:g}")
        return
    report.require(exact(folder) == exact(whole), f"{folder}: the steps are not those of {whole}")
    same = bench.fingerprint(folder) == bench.fingerprint(whole)
    report.require(same, f"{folder}: the final state is not that of {whole}")
