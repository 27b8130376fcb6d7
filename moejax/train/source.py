"""A checkpoint of a run, named by a path: to be read, or to start another run from."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        folder: a run folder, or one of its checkpoints/<step>.
        wanted: what else it may be, for errors.
        agree: as of `Checkpoints`.

    Raises:
        ConfigError: it is none, or what is there is not whole.
    """
    run, step = Path(folder), None
    if run.parent.name == "checkpoints" and run.name.isdigit():
        run, step = run.parent.parent, int(run.name)
    if not (run / "config.json").is_file():
        raise ConfigError(place, str(folder), wanted)
    checkpoints = Checkpoints(run / "checkpoints", agree=agree)
    if not checkpoints.steps or (step is not None and step not in checkpoints.steps):
        raise ConfigError(place, str(folder), f"{wanted}; there is no checkpoint yet")
    config = RunConfig.from_json((run / "config.json").read_text(encoding="utf-8"))
    return config, checkpoints, _newest_whole(place, checkpoints) if step is None else _whole(place, checkpoints, step)


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
