"""The checkpoint on a faster disk, saved more often than the durable ones: of `checkpoint.local`.

A link in the run folder, `checkpoints.local`, leads to a folder of the run's own there. Where the run folder is deleted
the link is gone, and no later run takes up what it led to.
"""

import uuid
from pathlib import Path

from moejax.checkpoint.commit import Retention
from moejax.checkpoint.manager import Checkpoints
from moejax.config import CheckpointConfig, ConfigError
from moejax.train.together import everyones, is_main, together


def open_local(config: CheckpointConfig, folder: Path) -> Checkpoints | None:
    """The local checkpoints of a run, of which the newest is kept; None: there are to be none.

    Args:
        config: with `local`.
        folder: the run folder.

    Raises:
        ConfigError: it cannot be written, or some processes do not see it.
    """
    if config.local is None:
        return None
    link, place = folder / "checkpoints.local", Path(config.local).absolute()
    together(lambda: _make(link, place) if is_main() else None)
    target = Path(everyones(str(link.resolve()))[0])
    seen = everyones(target.is_dir())
    if not all(seen):
        missing = f"all processes see; process {seen.index(False)} does not"
        raise ConfigError("checkpoint.local", config.local, f"a folder that {missing}")
    return Checkpoints(target, Retention(newest=1, best=False), agree=everyones)


def _make(link: Path, place: Path) -> None:
    """Makes the link and the folder that it leads to, unless they are there."""
    try:
        if not link.is_symlink() or link.resolve().parent != place.resolve():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(place / f"{link.parent.name}-{uuid.uuid4().hex[:12]}")
        link.resolve().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("checkpoint.local", str(place), f"a folder that can be written ({error.strerror})") from None
