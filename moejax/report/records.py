"""A run folder as a reader finds it: finished, still being written, or cut off. It reads what is there."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import ConfigError, RunConfig
from moejax.train.ledger import written_summary

LOADS = 400  # records of the experts' load that are read, evenly spread and the last: a long run has many
ENDS = ("finished", "stopped", "non_finite", "machine_fault", "spike", "failed")  # events that may be a run's last
FILES = {  # of a run folder, and what a report lacks without them
    "config.json": "settings and the schedule's phases",
    "environment.json": "what the run ran on",
    "metrics.jsonl": "all curves",
    "expert_load.jsonl": "the load and the bias of every expert",
    "events.jsonl": "validations, faults, restarts, and where the time went",
}


@dataclass(frozen=True)
class Loads:
    """The records of expert_load.jsonl: R of them, L MoE layers, E experts."""

    step: np.ndarray  # int [R], ascending
    load: np.ndarray  # float32 [R, L, E], relative to the layer's mean
    bias: np.ndarray | None  # float32 [R, L, E]; None: not recorded, or the gate has none


@dataclass(frozen=True)
class Records:
    """What a run folder says. Numbers that are missing or were not finite are NaN."""

    folder: Path
    name: str  # tells the run from the others of a report
    settings: dict[str, Any]  # config.json as it is; empty where it is missing
    config: RunConfig | None  # the same; None where this version cannot read it
    environment: dict[str, Any]
    step: np.ndarray  # int [S], ascending
    columns: dict[str, np.ndarray]  # of metrics.jsonl: float [S], or [S, L] where there is a number for each layer
    loads: Loads | None
    events: list[dict[str, Any]]
    time: dict[str, Any] | None  # `Ledger.summary`
    ended: str | None  # kind of the event with which it ended; None: it runs, or was cut off
    written: float  # when a file of it was last written, seconds since the epoch
    missing: list[str]  # a line for each thing that is not there

    def column(self, key: str) -> np.ndarray:
        """The numbers of a key at each step, [S]; NaN where there is none."""
        found = self.columns.get(key)
        return np.full(len(self.step), np.nan) if found is None or found.ndim != 1 else found

    def by_layer(self, key: str) -> np.ndarray:
        """The same of a key with a number for each MoE layer, [S, L]; L is 0 where there is none."""
        found = self.columns.get(key)
        return np.zeros((len(self.step), 0)) if found is None or found.ndim != 2 else found

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds, in their order."""
        return [event for event in self.events if event["kind"] in kinds]


def read_runs(folders: Sequence[str | Path]) -> list[Records]:
    """The records of several runs, each with a name of its own.

    Raises:
        ConfigError: a folder is missing, or has none of the files of a run.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not any((path / name).is_file() for name in FILES):
            raise ConfigError("RUN", str(path), f"a run folder, with at least one of {', '.join(FILES)}")
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ; a number behind a folder that comes twice."""
    full = [path.absolute().parts for path in paths]
    tails = [parts[-1] for parts in full]
    for index, parts in enumerate(full):
        others = {other for other in full if other != parts}
        lengths = (n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        tails[index] = "/".join(parts[-next(lengths, len(parts)) :]).replace("//", "/")
    seen: dict[str, int] = {}
    for index, tail in enumerate(tails):
        seen[tail] = seen.get(tail, 0) + 1
        tails[index] = tail if seen[tail] == 1 else f"{tail} ({seen[tail]})"
    return tails


def _read(folder: Path, name: str) -> Records:
    missing: list[str] = []
    settings = _object(folder / "config.json", missing)
    config = None
    if settings:
        try:
            config = RunConfig.from_json(json.dumps(settings))
        except (ConfigError, TypeError, KeyError) as error:
            missing.append(f"config.json is of another version ({error}): the schedule's phases are left out")
    step, columns = _columns(folder / "metrics.jsonl", missing)
    loads = _loads(folder / "expert_load.jsonl", missing)
    events = [line for line in _lines(folder / "events.jsonl", missing) if isinstance(line.get("kind"), str)]
    starts = [index for index, event in enumerate(events) if event["kind"] in ("started", "resumed")]
    after = events[starts[-1] if starts else 0 :]
    ended = after[-1]["kind"] if after and after[-1]["kind"] in ENDS and not _is_bad_step(after[-1]) else None
    if not (folder / "checkpoints").is_dir() or not any((folder / "checkpoints").iterdir()):
        missing.append("there is no checkpoint")
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in (".jsonl", ".json", ".txt")]
    return Records(
        folder=folder,
        name=name,
        settings=settings,
        config=config,
        environment=_object(folder / "environment.json", missing),
        step=step,
        columns=columns,
        loads=loads,
        events=events,
        time=_time(folder / "events.jsonl", missing),
        ended=ended,
        written=max((path.stat().st_mtime for path in files), default=time.time()),
        missing=missing,
    )


def _time(path: Path, missing: list[str]) -> dict[str, Any] | None:
    try:
        return written_summary(path)
    except (KeyError, TypeError, ValueError):
        missing.append("events.jsonl: where the time went cannot be read")
        return None


def _is_bad_step(event: dict[str, Any]) -> bool:
    """Whether an event is of a step, where others of its kind are of a run's end."""
    return "quantities" in event or "z" in event


# ------------------------------------------------------------------------------------------------------------- files


def _object(path: Path, missing: list[str]) -> dict[str, Any]:
    """The object of a JSON file; empty where there is none."""
    if not path.is_file():
        missing.append(f"{path.name} is missing: {FILES[path.name]} are left out")
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        missing.append(f"{path.name} is no JSON: {FILES[path.name]} are left out")
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path, missing: list[str], most: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file, at most `most`, evenly spread and the last; says what cannot be read."""
    if not path.is_file():
        missing.append(f"{path.name} is missing: {FILES[path.name]} are left out")
        return
    content = path.read_bytes()
    lines = content.splitlines()
    if content and not content.endswith(b"\n"):
        missing.append(f"{path.name}: the last line is cut off")
        del lines[-1]
    picked: Sequence[int] = (
        np.unique(np.linspace(0, len(lines) - 1, most).round().astype(int)).tolist() if most and lines else []
    )
    bad = 0
    for line in [lines[index] for index in picked] if most else lines:
        found = None
        with contextlib.suppress(ValueError):  # no JSON, or no UTF-8
            found = json.loads(line)
        if isinstance(found, dict):
            yield found
        else:
            bad += 1
    if bad:
        missing.append(f"{path.name}: {bad} line{'s' if bad > 1 else ''} cannot be read")


def _columns(path: Path, missing: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The steps of metrics.jsonl, [S], and the numbers of each key."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in _lines(path, missing):
        if isinstance(line.get("step"), int):
            values = {key: _number(value) for key, value in line.items() if key != "step"}
            by_step[line["step"]] = {key: value for key, value in values.items() if value is not None}
    steps = sorted(by_step)
    keys = dict.fromkeys(key for line in by_step.values() for key in line)
    return np.array(steps, np.int64), {key: _column([by_step[step].get(key) for step in steps]) for key in keys}


def _number(value: Any) -> float | np.ndarray | None:
    """A number, NaN for null, or float32 [L] for a list of them; None for anything else."""
    if value is None:
        return float("nan")
    if isinstance(value, list):
        try:
            return np.array(value, np.float32)  # null becomes NaN
        except (ValueError, TypeError):
            return None
    return float(value) if isinstance(value, int | float) else None


def _column(values: list[float | np.ndarray | None]) -> np.ndarray:
    """The values of a key below each other; NaN where a step has none, or none of the usual shape."""
    shapes = [value.shape for value in values if isinstance(value, np.ndarray)]
    if not shapes:
        return np.array([value if isinstance(value, float) else np.nan for value in values])
    shape = max(set(shapes), key=shapes.count)
    blank = np.full(shape, np.nan, np.float32)
    return np.stack([value if isinstance(value, np.ndarray) and value.shape == shape else blank for value in values])


def _loads(path: Path, missing: list[str]) -> Loads | None:
    found: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
    for line in _lines(path, missing, most=LOADS):
        load, bias = (_matrix(line.get(key)) for key in ("load", "bias"))
        if isinstance(line.get("step"), int) and load is not None:
            found[line["step"]] = load, bias if bias is not None and bias.shape == load.shape else None
    shapes = [load.shape for load, _ in found.values()]
    steps = sorted(step for step in found if found[step][0].shape == shapes[-1]) if shapes else []
    if not steps:
        return None
    biases = [found[step][1] for step in steps]
    whole = [bias for bias in biases if bias is not None]
    if len(whole) < len(steps):
        missing.append("expert_load.jsonl: lines without the router's bias; the gate has none, or they are older")
    blank = np.full(shapes[-1], np.nan, np.float32)
    stacked = np.stack([blank if bias is None else bias for bias in biases]) if whole else None
    return Loads(np.array(steps), np.stack([found[step][0] for step in steps]), stacked)


def _matrix(value: Any) -> np.ndarray | None:
    try:
        found = np.array(value, np.float32)
    except (ValueError, TypeError):
        return None
    return found if found.ndim == 2 and found.size else None
