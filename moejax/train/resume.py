"""How a run starts: from the newest whole checkpoint of its folder, or anew, and what it needs for that."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.checkpoint import reading
from moejax.checkpoint.manager import Checked, Checkpoints
from moejax.config import HOW_COMPUTED, ConfigError, RunConfig
from moejax.data.dataset import Data
from moejax.model.count import abstract_model, num_parameters
from moejax.train.copies import fetch
from moejax.train.guard import DamagedError
from moejax.train.peak import memory_limit_bytes
from moejax.train.runlog import NoLog, RunLog
from moejax.train.source import open_source
from moejax.train.state import (
    TrainState,
    abstract_state,
    bytes_per_device,
    layer_of_slot,
    new_state,
    stacked_as,
    state_from,
    to_slots,
)
from moejax.train.together import everyones, is_main, together

logger = logging.getLogger("moejax")

LISTED = 5  # damaged files of a checkpoint, or settings, that are named in the log


@dataclass
class Position:
    """How far a run is; saved as a checkpoint's meta."""

    step: int = 0
    tokens: int = 0
    data: dict[str, Any] | None = None  # of `Prefetcher.state`
    valid_loss: float | None = None  # of the last validation, by which the best checkpoint is kept


@dataclass(frozen=True)
class Found:
    """The checkpoints that a run found in its folder."""

    whole: Checked | None  # the newest that is
    place: Checkpoints  # where that is
    damaged: list[Checked]  # newer ones
    seconds: float  # in which they were checked
    fetched: str | None = None  # the address from which the whole one was brought
    source: tuple[Checkpoints, int] | None = None  # of `resume_from`, where there is no checkpoint here: whose weights
    read_bytes: list[int] = field(default_factory=list)  # of arrays, by each replica: filled in by `start`


def find(config: RunConfig, checkpoints: Checkpoints, local: Checkpoints | None = None) -> Found:
    """Checks the checkpoints, from the newest to one that is whole, and keeps those aside that are not.

    Those of `checkpoint.local` count where they are newer. Where none is whole, the newest whole one of
    `checkpoint.remote` is fetched.

    Raises:
        DamagedError: there are some, and none is whole.
    """
    began = time.monotonic()
    remote, sample = config.checkpoint.remote, config.checkpoint.verify
    whole, place = None, checkpoints
    damaged: list[tuple[Checkpoints, Checked]] = []  # and where they are
    places = [checkpoints] if local is None else [local, checkpoints]
    newest = everyones([other.latest or 0 for other in places])[0]
    for latest, other in sorted(zip(newest, places, strict=True), key=lambda pair: -pair[0]):
        if whole is None or latest > whole.step:
            found, more = together(lambda other=other: other.newest_whole(sample, set_aside=True))  # type: ignore[misc]
            damaged += [(other, one) for one in more]
            if found is not None and (whole is None or found.step > whole.step):
                whole, place = found, other
    if whole is not None:
        remote = None
    elif remote is not None:
        together(lambda: fetch(remote, checkpoints) if is_main() else None)
        whole, more = together(lambda: checkpoints.newest_whole(sample, set_aside=True))
        again = {one.step for one in more}
        damaged = [(checkpoints, one) for one in more] + [pair for pair in damaged if pair[1].step not in again]
    if whole is None and damaged:
        bad = [checked for _, checked in damaged]
        steps = f"step{'s' if len(bad) > 1 else ''} {', '.join(str(checked.step) for checked in bad)}"
        first = f"{bad[0].step} has {bad[0].damages[0]}"
        raise DamagedError(
            f"no checkpoint in {checkpoints.folder} is whole, of {steps}; {first}; restore one from a copy, or move "
            "them away to begin anew"
        )
    source = None
    if whole is None and config.resume_from is not None:
        wanted = "a run folder, or one of its checkpoints/<step>"
        source = together(lambda: open_source("resume_from", config.resume_from or "", wanted, agree=everyones)[1:])
    fetched = remote if whole is not None else None
    bad = together(lambda: [_aside(*pair) for pair in damaged])
    return Found(whole, place, bad, time.monotonic() - began, fetched, source)


def _aside(place: Checkpoints, checked: Checked) -> Checked:
    """A damaged checkpoint, renamed unless it has been: its step is to be saved again."""
    if checked.aside or not is_main() or checked.step not in place.steps:
        return checked
    return dataclasses.replace(checked, aside=place.set_aside(checked.step))


def start(config: RunConfig, mesh: Mesh, data: Data, found: Found) -> tuple[TrainState, Position]:
    """The state and position to go on from; `data` goes to that position.

    Raises:
        ConfigError: the checkpoint is of another model or of other text.
    """
    if found.whole is not None:  # 1. the newest whole checkpoint of this run folder
        step, checkpoints = found.whole.step, found.place
        shapes = checkpoint_parts(abstract_state(config, mesh))
        meta = checkpoints.load_meta(step)
        if meta["data"] is None:  # only a run that did a step knows a position
            wanted = "a folder of its own: this one has imported weights, with which a run starts by --resume-from"
            raise ConfigError("out", str(checkpoints.folder.parent), wanted)
        before = reading.bytes_read()
        parts = _loaded(config, checkpoints, step, tuple(meta["layer_of_slot"]), shapes)
        found.read_bytes[:] = reading.by_replica(mesh, everyones(reading.bytes_read() - before))
        position = Position(**{name: meta[name] for name in ("step", "tokens", "data", "valid_loss")})
        assert position.data is not None
        data.train.restore(position.data)
        return TrainState(**parts["model"], **parts["optimizer"]), position
    if found.source is not None:  # 2. the weights of another run
        return _of_another_run(config, mesh, *found.source), Position()
    return new_state(config, mesh), Position()  # 3. parameters drawn from the seed


def _of_another_run(config: RunConfig, mesh: Mesh, checkpoints: Checkpoints, step: int) -> TrainState:
    state = checkpoint_parts(abstract_state(config, mesh))
    shapes = {"model": state["model"]}
    if config.resume_optimizer:
        shapes["optimizer"] = {"opt_state": state["optimizer"]["opt_state"]}
    before = tuple(checkpoints.load_meta(step)["layer_of_slot"])
    parts = _loaded(config, checkpoints, step, before, shapes, partial=True)
    opt_state = parts["optimizer"]["opt_state"] if config.resume_optimizer else None
    return state_from(config, mesh, **parts["model"], opt_state=opt_state)


def _loaded(
    config: RunConfig, checkpoints: Checkpoints, step: int, before: tuple[int, ...], shapes: Any, partial: bool = False
) -> dict[str, Any]:
    """Parts of a checkpoint whose MoE blocks lie in the order of the slots `before`, in this run's order."""
    after = layer_of_slot(config)
    if before == after:
        return checkpoints.load(step, shapes, partial)
    return checkpoints.load(step, stacked_as(before, shapes), partial, to_slots(before, after, shapes))


def checkpoint_parts(state: TrainState) -> dict[str, Any]:
    """The state as a checkpoint has it: what a reader of the model needs, and the rest."""
    return {
        "model": {"params": state.params, "router_bias": state.router_bias},
        "optimizer": {"step": state.step, "opt_state": state.opt_state, "ema": state.ema},
    }


def tell(found: Found, total_steps: int, log: RunLog | NoLog, **fields: Any) -> None:
    """Says what was found, what was wrong with it and where the run goes on; `fields` go into the event."""
    tell_damaged(found, log)
    if found.whole is None:
        if found.source is not None:
            folder, step = found.source[0].folder, found.source[1]
            folder = folder.parent if folder.name == "checkpoints" else folder
            logger.info(f"started with the weights of step {step} of {folder}")
            fields |= {"source": str(folder), "source_step": step}
        log.event("started", **fields)
        return
    whole = found.whole
    part = "" if whole.bytes_read == whole.bytes else f"{whole.bytes_read / (whole.bytes or 1):.0%} of "
    verified = f"{whole.files:,} files, {part}{volume(whole.bytes)} verified in {found.seconds:.1f} s"
    brought = f"fetched from {found.fetched}, " if found.fetched else ""
    is_local = found.place.folder.parent != log.folder.absolute()
    brought = f"from {found.place.folder}, " if is_local else brought
    logger.info(f"resumed at step {whole.step}/{total_steps} of {log.folder}: {brought}{verified}{_who_read(found)}")
    counts = {"files": whole.files, "bytes": whole.bytes, "bytes_read": whole.bytes_read}
    log.event(
        "resumed", step=whole.step, **counts, read_bytes=found.read_bytes, seconds=round(found.seconds, 3), **fields
    )


def tell_damaged(found: Found, log: RunLog | NoLog) -> None:
    """Says which checkpoints are damaged."""
    for checked in found.damaged:
        lines = [str(damage) for damage in checked.damages]
        for line in lines[:LISTED]:
            logger.warning(f"checkpoint {checked.step}: damaged: {line}")
        as_name = f" as {checked.aside}" if checked.aside else ""
        more = f"{len(lines) - LISTED} more damaged files; " if len(lines) > LISTED else ""
        logger.warning(f"checkpoint {checked.step}: {more}kept aside{as_name}")
        log.event("damaged", step=checked.step, aside=checked.aside, files=lines[:LISTED], count=len(lines))


def _who_read(found: Found) -> str:
    if len(found.read_bytes) == 1 or jax.process_count() == 1:
        return ""
    read = (f"replica {n} read {volume(size) if size else 'nothing'}" for n, size in enumerate(found.read_bytes))
    return f"; {', '.join(read)}"


def require_same_model(config: RunConfig, folder: Path) -> None:
    """Raises ConfigError where the run folder holds a run of another model; it names the settings that differ.

    How the model is computed, `HOW_COMPUTED`, may differ.
    """
    file = folder / "config.json"
    if not (file.is_file() and (folder / "checkpoints").is_dir()):
        return
    before = RunConfig.from_json(file.read_text(encoding="utf-8"))
    there, here = (dict(_flat(dataclasses.asdict(model), "model")) for model in (before.model, config.model))
    differ = [name for name in there | here if there.get(name) != here.get(name) and name not in HOW_COMPUTED]
    if differ:
        listed = [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in differ[:LISTED]]
        listed += [f"{len(differ) - LISTED} more differ"] if len(differ) > LISTED else []
        wanted = f"a folder of its own: this one has a run of another model ({'; '.join(listed)})"
        raise ConfigError("out", str(folder), wanted)


def volume(size: int) -> str:
    """Bytes for people: 4.2 MB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"


def require_memory(config: RunConfig, state: TrainState) -> None:
    """Raises ConfigError where a device's part of the state alone is larger than its memory."""
    needed, limit = bytes_per_device(state), memory_limit_bytes()
    if jax.devices()[0].platform == "cpu":  # simulated devices share the machine's memory
        needed *= jax.local_device_count()
    if needed > limit:
        model = f"{num_parameters(abstract_model(config.model)):,} parameters"
        wanted = (
            f"a model whose training state, here {needed / 1e9:,.1f} GB, fits in the {limit / 1e9:,.1f} GB of memory"
        )
        raise ConfigError("model", model, wanted)


def _flat(settings: dict[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{place}.{name}")
        else:
            yield f"{place}.{name}", value
