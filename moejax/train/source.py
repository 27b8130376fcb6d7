"""A checkpoint of a run, named by a path: to be read, or to start another run from."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax.checkpoint.commit import read_meta
from moejax.checkpoint.manager import Checkpoints
from moejax.config import ConfigError, RunConfig

logger = logging.getLogger("moejax")


def open_source(
    place: str, folder: str | Path, wanted: str, agree: Callable[[Any], list[Any]] = lambda value: [value]
) -> tuple[RunConfig, Checkpoints, int]:
    """The run, its checkpoints, and the step of one that is whole: the newest, or the one that the path names.

    Nothing is renamed; damaged newer ones are said.

    Args:
        place: where the path comes from, for errors.
        folder: a run folder, one of its checkpoints/<step>, or a copy of such a folder.
        wanted: what else it may be, for errors.
        agree: as of `Checkpoints`.

    Raises:
        ConfigError: it is none, or what is there is not whole.
    """
    path = Path(folder)
    if path.name.isdigit() and (path / "meta").is_dir():
        checkpoints = Checkpoints(path.parent, agree=agree)
        step = _whole(place, checkpoints, int(path.name))
    elif (path / "config.json").is_file():
        checkpoints = Checkpoints(path / "checkpoints", agree=agree)
        if not checkpoints.steps:
            raise ConfigError(place, str(folder), f"{wanted}; there is no checkpoint yet")
        step = _newest_whole(place, checkpoints)
    else:
        raise ConfigError(place, str(folder), wanted)
    return saved_config(checkpoints.folder / str(step)), checkpoints, step


def saved_config(checkpoint: Path) -> RunConfig:
    """The settings of the run of a checkpoint: its config.json, and for a copy elsewhere what the checkpoint says.

    Raises:
        ConfigError: they cannot be read.
    """
    file = checkpoint.absolute().parent.parent / "config.json"
    if checkpoint.absolute().parent.name == "checkpoints" and file.is_file():
        return RunConfig.from_json(file.read_text(encoding="utf-8"))
    meta = read_meta(checkpoint)
    if "config" not in meta:
        raise ConfigError("checkpoint", str(checkpoint), "one with the settings of its run in meta/data.json")
    return RunConfig.from_json(json.dumps(meta["config"]))


def _newest_whole(place: str, checkpoints: Checkpoints) -> int:
    whole, damaged = checkpoints.newest_whole(1.0, set_aside=False)
    for checked in damaged:
        logger.warning(f"checkpoint {checked.step}: damaged, skipped: {checked.damages[0]}")
    if whole is None:
        raise ConfigError(place, str(checkpoints.folder), "a folder with a checkpoint that is whole")
    return whole.step


def _whole(place: str, checkpoints: Checkpoints, step: int) -> int:
    damages = checkpoints.check(step).damages
    if damages:
        raise ConfigError(place, str(checkpoints.folder / str(step)), f"a checkpoint that is whole ({damages[0]})")
    return step
