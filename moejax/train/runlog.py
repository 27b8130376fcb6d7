"""What a run writes while it runs, in the run folder:

    config.json         the resolved settings; `moejax train` takes it instead of a config file
    environment.json    see environment.py
    metrics.jsonl       one object a step, keys of METRICS; steps are unique and ascending, also in a resumed run
    events.jsonl        {"time", "kind", ...}; the kinds are below
    expert_load.jsonl   {"step", "load", "bias"}: per MoE layer (as max_violation) and expert, tokens relative to the
                        mean, and the router's bias after the step (no "bias" where the gate has none)
    log.txt             every record of the logger "moejax", which is also what the console shows
    tensorboard/        the metrics again; they go to Weights & Biases too where log.wandb names a project
    summary.json        how the run ended; its `time` says where the wall clock went, see ledger.py

Beside them lie checkpoints/ and, of a process that hung, stacks-<process>.txt (watchdog.py). Kinds of events:

- started, resumed: the text's unigram_loss, parameters and peak_flops; of resumed also the step, how much of its
  checkpoint was verified in how many seconds, and the bytes that each replica then read (read_bytes)
- damaged: a checkpoint that was skipped, with its step, the name that it has now, and the first damaged files
- validation: step, valid_loss, valid_bits_per_byte
- checkpoint: one that was committed, with its step, the seconds since its save began, bytes, and the steps deleted
- checkpoint_failed: one that was not, with its step and the error
- uploaded, upload_failed and so on: of copies at checkpoint.remote, see checkpoint/remote.py
- ledger: see ledger.py
- non_finite: step, quantities; also when it was repeated from the same data
- machine_fault: step, quantities; they were finite when the step was repeated
- spike: step, loss, z
- rolled_back: step, from_step, and whether the batches in between are skipped
- finished, stopped, non_finite, machine_fault, spike, failed: how the run ended, with the step or the error

JSON has no NaN: a number that is not finite is written as null, and an event of kind non_finite names it.

On a full disk a run goes on: it says so once, lines wait in memory until there is space, points of TensorBoard are
lost. Only at its end is that an error.
"""

import contextlib
import dataclasses
import errno
import importlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from moejax.config import ConfigError, RunConfig
from moejax.train.console import ConsoleHandler, StepLines, logger
from moejax.train.environment import environment_report
from moejax.train.ledger import read_events
from moejax.train.notebook import CellHandler, in_notebook
from moejax.train.tensorboard import TensorBoard

SPACE = "a disk with space left"
BY_STEP = ("metrics", "expert_load")  # files with lines that go when a run goes back


class Metric(NamedTuple):
    """One key of metrics.jsonl."""

    unit: str
    meaning: str


METRICS = {
    "step": Metric("", "optimizer steps done, this one included"),
    "tokens": Metric("tokens", "predicted since the start of the run, this step included"),
    "loss": Metric("nats/token", "next-token cross entropy of the main model, without MTP and balance terms"),
    "mtp_loss": Metric("nats/token", "mean cross entropy of the MTP modules, before mtp_weight"),
    "balance_loss": Metric("", "auxiliary balance losses, as they are added to the loss"),
    "grad_norm": Metric("", "L2 norm of the gradient of all parameters together, before clipping"),
    "learning_rate": Metric("", "of this step"),
    "bias_update_speed": Metric("", "gamma, by which the router's biases move"),
    "mtp_weight": Metric("", "lambda, the weight of mtp_loss"),
    "tokens_per_second": Metric("tokens/s", "of this step, all devices together"),
    "flops_per_second": Metric("FLOP/s", "the model's own work, without recomputation, all devices together"),
    "mfu": Metric("", "flops_per_second as a share of the devices' peak"),
    "max_violation": Metric(
        "", "per MoE layer, those of MTP modules last: (tokens of the fullest expert - mean) / mean"
    ),
    "load_entropy": Metric(
        "nats", "per MoE layer: entropy of the experts' shares of its tokens; ln(num_experts) if all have as many"
    ),
    "dead_experts": Metric("experts", "without a token in this step, all MoE layers together"),
    "exchange_rounds": Metric("", "rounds of the expert exchange, mean of the layers; 1: slots sufficed"),
    "data_wait": Metric("s", "time the step waited for its batch"),
    "step_time": Metric("s", "of this step, the wait included"),
    "memory_bytes": Metric("bytes", "peak of the fullest device so far; on CPU of the process"),
    "valid_loss": Metric("nats/token", "loss on the validation batches; only on validation steps"),
    "valid_bits_per_byte": Metric("bits/byte", "the same, per byte of text; only on validation steps"),
}


class RunLog:
    """The open files and the console of a run: a context manager.

    An exception that leaves the `with` block before `finish` becomes an event of kind failed. Every method raises
    ConfigError where the folder cannot be written; opening and `finish` also where the disk is full.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        total_steps: int,
        resumed_step: int = 0,
        console: Console | None = None,
        pictures: bool = True,
    ) -> None:
        """Creates the run folder, or continues it.

        Args:
            config: the run's settings.
            total_steps: step at which the run ends.
            resumed_step: last step that the state holds; lines of later steps are dropped.
            console: where the run is shown; None: stdout, or the cell of a notebook.
            pictures: whether a notebook shows them.
        """
        self.folder = Path(config.folder)
        self._open = contextlib.ExitStack()
        self._lines = StepLines(total_steps=total_steps, seconds=config.log.console_seconds)
        self._last: dict[str, Any] = {}
        self._waiting = {"metrics": b"", "events": b"", "expert_load": b""}  # lines that did not fit on the disk
        self._finished = self._full = False
        self._began = time.time()
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(self.folder / "config.json", config.to_json())
            _write_whole(self.folder / "environment.json", _json(environment_report(), indent=2))
            for name in BY_STEP:
                _cut(self.folder / f"{name}.jsonl", resumed_step)
            _cut(self.folder / "events.jsonl")
            self._files = {name: self._open_file(name) for name in (*BY_STEP, "events")}
            self._console = _console(total_steps, console, pictures)
            self._open_logger(self._console, _LogFile(self.folder / "log.txt", encoding="utf-8"))
            self._tensorboard = self._open_tensorboard(resumed_step) if config.log.tensorboard else None
        self._wandb = self._open_wandb(config) if config.log.wandb else None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not self._finished:
            with contextlib.suppress(ConfigError):  # a full disk: it is what brought us here, or will be met again
                self.event("failed", error=f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):  # lines that did not fit are tried again, in vain
            self._open.close()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of one step: keys of METRICS, with floats, or lists with one float per MoE layer."""
        unknown = metrics.keys() - METRICS.keys()
        if unknown:
            raise KeyError(f"metrics without a line in METRICS: {', '.join(sorted(unknown))}")
        self._append("metrics", metrics)
        bad = [key for key, value in metrics.items() if _finite(value) != value]
        if bad:
            self.event("non_finite", step=metrics["step"], quantities=bad)
        if metrics.get("valid_loss") is not None:
            self.event("validation", **{key: metrics[key] for key in metrics if key == "step" or "valid" in key})
        self._last = dict(metrics)
        self._console.progress(metrics["step"], self._lines.show(metrics))
        scalars = dict(_scalars(metrics))
        with self.full_disk_borne():
            if self._tensorboard is not None:
                self._tensorboard.write(metrics["step"], scalars)
            if self._wandb is not None:
                self._wandb.log(scalars, step=metrics["step"])

    def expert_load(
        self, step: int, load: Sequence[Sequence[float]], bias: Sequence[Sequence[float]] | None = None
    ) -> None:
        """Writes the load of every expert, [MoE layers][experts], relative to its layer's mean, and its bias."""
        self._append("expert_load", {"step": step, "load": load} | ({} if bias is None else {"bias": bias}))

    def event(self, kind: str, **fields: Any) -> None:
        """Writes an event; the kinds are named at the top of this file."""
        self._append("events", {"time": round(time.time(), 3), "kind": kind, **fields})

    def pictures(self, paths: Sequence[Path]) -> None:
        """Shows these files, where there is a place for pictures."""
        self._console.pictures(paths)

    def roll_back(self, step: int) -> None:
        """Drops the lines of the steps after `step`, which are done again; all that wait where the disk is full."""
        with self.full_disk_borne():
            self._write_waiting()
        with self._disk():
            for name in BY_STEP:
                self._waiting[name] = b""
                _cut(self.folder / f"{name}.jsonl", step)
        with self.full_disk_borne():
            if self._tensorboard is not None:
                self._tensorboard.restart(step + 1)

    def finish(self, kind: str, **fields: Any) -> None:
        """Writes the last event, of kind finished, stopped or an `EndError.kind`, and summary.json with `fields`."""
        self._finished = True
        self.event(kind, step=self._last.get("step"))
        with self._disk():
            self._write_waiting()
        losses = [event.get("valid_loss") for event in read_events(self.folder / "events.jsonl")]
        best = min((loss for loss in losses if loss is not None), default=None)
        summary = {"ended": kind, "seconds": round(time.time() - self._began, 3), "best_valid_loss": best}
        with self._disk():
            _write_whole(self.folder / "summary.json", _json({**summary, "last": self._last, **fields}, indent=2))

    # ------------------------------------------------------------------------------------------------------- pieces

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        self._waiting[name] += f"{_json(line)}\n".encode()
        with self.full_disk_borne():
            self._write_waiting()

    def _write_waiting(self) -> None:
        for name, file in self._files.items():
            while self._waiting[name]:
                self._waiting[name] = self._waiting[name][file.write(self._waiting[name]) :]
        self._full = False

    @contextlib.contextmanager
    def full_disk_borne(self) -> Iterator[None]:
        """A context in which a full disk is a warning, once until the log could be written again."""
        try:
            with self._disk():
                yield
        except ConfigError as error:
            if error.wanted != SPACE:
                raise
            if not self._full:
                logger.warning(f"{error}; the run goes on, and its log waits in memory")
            self._full = True

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = SPACE if full else f"a folder that can be written ({error.strerror})"
            raise ConfigError("out", str(self.folder), reason) from None

    def _open_logger(self, *handlers: logging.Handler) -> None:
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._open.callback(setattr, logger, "propagate", logger.propagate)
        logger.propagate = False  # libraries put handlers on the root logger that would say everything again
        logger.setLevel(logging.INFO)
        for handler in handlers:
            logger.addHandler(handler)
            self._open.callback(handler.close)
            self._open.callback(logger.removeHandler, handler)

    def _open_file(self, name: str) -> FileIO:
        return self._open.enter_context(open(self.folder / f"{name}.jsonl", "ab", buffering=0))

    def _open_tensorboard(self, resumed_step: int) -> TensorBoard:
        return self._open.enter_context(
            contextlib.closing(TensorBoard(self.folder / "tensorboard", first_step=resumed_step + 1))
        )

    def _open_wandb(self, config: RunConfig) -> Any:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise ConfigError("log.wandb", config.log.wandb, "the package wandb (pip install wandb), or None") from None
        settings = dataclasses.asdict(config)
        run = wandb.init(project=config.log.wandb, name=config.name, dir=str(self.folder), config=settings)
        self._open.callback(run.finish)
        return run


class NoLog:
    """The log of the processes that are not the main one: it writes and shows nothing."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._before = logger.disabled

    def __enter__(self) -> "NoLog":
        logger.disabled = True
        return self

    def __exit__(self, *error: object) -> None:
        logger.disabled = self._before

    def step(self, metrics: Mapping[str, Any]) -> None:
        """As `RunLog.step`."""

    def expert_load(
        self, step: int, load: Sequence[Sequence[float]], bias: Sequence[Sequence[float]] | None = None
    ) -> None:
        """As `RunLog.expert_load`."""

    def event(self, kind: str, **fields: Any) -> None:
        """As `RunLog.event`."""

    def pictures(self, paths: Sequence[Path]) -> None:
        """As `RunLog.pictures`."""

    def roll_back(self, step: int) -> None:
        """As `RunLog.roll_back`."""

    def finish(self, kind: str, **fields: Any) -> None:
        """As `RunLog.finish`."""

    def full_disk_borne(self) -> contextlib.nullcontext:
        """As `RunLog.full_disk_borne`."""
        return contextlib.nullcontext()


def _console(total_steps: int, console: Console | None, pictures: bool) -> ConsoleHandler | CellHandler:
    if console is None and in_notebook():
        return CellHandler(total_steps=total_steps, pictures=pictures)
    return ConsoleHandler(total_steps=total_steps, console=console)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Nothing: what keeps log.txt from being written is reported by the next line of metrics."""


def _finite(value: Any) -> Any:
    """`value` with None for every float that is not finite, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return type(value)(_finite(item) for item in value) if isinstance(value, list | tuple) else value


def _json(value: Any, **options: Any) -> str:
    return json.dumps(_finite(value), allow_nan=False, **options)


def _scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and numbers for TensorBoard: a list becomes one curve per MoE layer."""
    for key, value in metrics.items():
        if isinstance(value, list):
            yield from ((f"{key}/layer_{layer}", item) for layer, item in enumerate(value))
        elif key != "step":
            yield key, value


def _write_whole(path: Path, text: str) -> None:
    """Writes `path` so that a reader sees the old text or the new one, never a part."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _cut(path: Path, step: int | None = None) -> None:
    """Cuts off the lines of the steps after `step`, and a last line that is not whole: it would spoil the next one."""
    if path.is_file():
        lines = path.read_bytes().splitlines(keepends=True)
        whole = (line.endswith(b"\n") and (step is None or json.loads(line)["step"] <= step) for line in lines)
        os.truncate(path, sum(map(len, itertools.compress(lines, itertools.takewhile(bool, whole)))))
