"""Checkpoints taken elsewhere: to a folder, to an address that fsspec knows (s3://bucket/run), and back from there."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from moejax.checkpoint.commit import failure_of
from moejax.checkpoint.integrity import identity, verify
from moejax.checkpoint.remote import Copy, download, remote_copies, upload
from moejax.config import ConfigError


def is_address(place: str) -> bool:
    """Whether it is an address rather than a folder."""
    return "://" in place


def copy(folder: Path, to: Path) -> int:
    """Copies a checkpoint, checks the copy, and returns the number of its files.

    Raises:
        ConfigError: there is something at `to` already, it cannot be written, or the copy is damaged, as the checkpoint
            may have been.
    """
    with becoming(to) as part:
        shutil.copytree(folder, part, dirs_exist_ok=True)
        return require_whole(part, f"checkpoint {folder}")


def send(folder: Path, to: str) -> int:
    """Uploads a checkpoint that is whole as a run's copies are; the number of files that were not there yet.

    A run with `checkpoint.remote` = `to` finds it there.

    Raises:
        ConfigError: the checkpoint is damaged, the address cannot be written, or has another one of that step.
    """
    require_whole(folder, f"checkpoint {folder}")
    with _named("TO"):
        return upload(to, int(folder.name), folder, identity(folder))


def copies(remote: str) -> list[Copy]:
    """What there is at an address, oldest step first.

    Raises:
        ConfigError: the address cannot be read, or there is nothing.
    """
    with _named("RUN"):
        found = remote_copies(remote)
    if not found:
        raise ConfigError("RUN", remote, "an address with copies of checkpoints")
    return found


def fetch(remote: str, step: int | None, to: Path) -> tuple[int, int]:
    """Downloads a checkpoint, the newest one for None, and checks it: its step, and the number of its files.

    A download that ended in the middle goes on.

    Raises:
        ConfigError: it is not complete there, it is damaged, there is something at `to` already, or that cannot be
            written.
    """
    complete = [copy.step for copy in copies(remote) if copy.state == "complete"]
    if not complete or step not in (None, *complete):
        there = ", ".join(map(str, complete)) or "none yet"
        raise ConfigError("STEP", step, f"a checkpoint that is complete at {remote}, which has {there}")
    step = complete[-1] if step is None else step
    with becoming(to) as part:
        part.rmdir()
        with _named("RUN"):
            download(remote, step, part)
        return step, require_whole(part, f"checkpoint {remote}/{step}")


def require_whole(folder: Path, place: str) -> int:
    """The number of a checkpoint's files; ConfigError for `place` where they are not as they were written."""
    found = verify(folder)
    if found.damages:
        raise ConfigError(place, str(found.damages[0]), "files as they were written")
    return found.files


@contextlib.contextmanager
def becoming(to: Path) -> Iterator[Path]:
    """A new folder to fill, which gets the name `to` when that is done; it is deleted when that fails.

    Raises:
        ConfigError: there is something at `to` already, or it cannot be written.
    """
    part = to.with_name(f".{to.name}.part")  # a name that no reader takes for a checkpoint
    try:
        if to.exists():
            raise ConfigError("TO", str(to), "a place where nothing is yet")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        part.rename(to)
    except (OSError, shutil.Error) as error:
        failure = failure_of(error)
        wanted = failure.wanted or f"a folder that can be written ({failure.words})"
        raise ConfigError("TO", str(to), wanted) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Errors of an address name the word of the command line that it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(place, error.value, error.wanted) from None
