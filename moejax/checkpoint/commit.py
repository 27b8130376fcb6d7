"""One save of a checkpoint: begun by the thread that trains, ended and committed by one of its own.

A disk that is full or cannot be written ends a save, never the run: nothing that is whole is deleted before the new
checkpoint is committed.
"""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from moejax.checkpoint.integrity import is_complete, sync, write_manifest

logger = logging.getLogger("moejax")

OTHERS_SECONDS = 1200.0  # in which all processes have to write their checksums, once the arrays are written
SAVING = ".saving"  # in a folder's name while it is written, where Orbax adds to it at first, or deleted


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay; the others are deleted once a newer one is committed."""

    newest: int = 3
    every: int | None = None  # steps that are multiples of it stay for ever
    best: bool = True  # the one with the lowest validation loss stays

    def doomed(self, losses: dict[int, float | None]) -> list[int]:
        """The steps that go, given the validation losses of all there are."""
        known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        kept = set(sorted(losses)[-self.newest :])
        kept |= {step for step in losses if self.every is not None and step % self.every == 0}
        kept |= {min(known, key=lambda step: (known[step], step))} if self.best and known else set()
        return sorted(losses.keys() - kept)


@dataclass(frozen=True)
class Failure:
    """Why a save was not committed; what was there before it still is."""

    words: str
    wanted: str | None  # of the disk, for a ConfigError; None: it is not the disk's fault


@dataclass(frozen=True)
class Saved:
    """What came of a save."""

    step: int
    bytes: int  # of all processes, in files; known to the first
    seconds: float  # from the call of `save` to the commit
    failure: Failure | None  # of the first process that failed; None: it was committed
    deleted: tuple[int, ...]  # by retention; known to the first process


@dataclass(frozen=True)
class State:
    """How far a process is with a save."""

    running: bool
    failure: Failure | None


def has_ended(states: Sequence[State | None]) -> bool:
    """Whether a save has ended, given every process's state: one that failed lets the others wait in vain."""
    return not any(state and state.running for state in states) or any(state and state.failure for state in states)


class Saving(threading.Thread):
    """A save that has begun: this thread waits until Orbax has written everything, and commits."""

    def __init__(
        self,
        folder: Path,
        step: int,
        parts: dict[str, Any],
        retention: Retention | None,
        attempt: int,
        failure: Failure | None,
    ):
        """Begins.

        Args:
            folder: of all checkpoints.
            step: that is saved.
            parts: as Orbax takes them.
            retention: None: nothing is deleted.
            attempt: another one where an earlier save was given up, which may still be writing.
            failure: why this save cannot begin, on any process.
        """
        super().__init__(name=f"checkpoint {step}", daemon=True)
        self.folder, self.step, self.retention = folder, step, retention
        self.path = folder / f"{step}{SAVING}{f'.{attempt}' if attempt else ''}"
        self.began, self.seconds, self.bytes = time.monotonic(), 0.0, 0
        self.failure = failure
        self.deleted: list[int] = []
        self._given_up, self._lock = False, threading.Lock()
        if failure is None:
            try:
                with orbax_settings():
                    self._response = ocp.save_checkpointables_async(self.path, parts, overwrite=True)
            except Exception as error:
                self.failure = failure_of(error)
        self.start()

    @property
    def state(self) -> State:
        """How far this process is."""
        return State(self.is_alive(), self.failure)

    def run(self) -> None:
        """Waits, adds the checksums, renames, deletes what retention does not keep."""
        if self.failure is not None:
            return
        try:
            self._response.result()
            write_manifest(self.path, jax.process_index(), jax.process_count())
            if jax.process_index() == 0 and self._commit():
                self._delete_old()
        except Exception as error:
            self.failure = failure_of(error)
        self.seconds = time.monotonic() - self.began

    def ended(self, failure: Failure | None) -> Saved:
        """What came of it; `failure`: of any process. Then it is given up, though this one may be waiting for it."""
        if failure is None:
            self.join()
            return Saved(self.step, self.bytes, self.seconds, None, tuple(self.deleted))
        with self._lock:
            self._given_up = True
        for left in entries(self.folder) if jax.process_index() == 0 else ():  # on a full disk the run needs the space
            if left.name.startswith(self.path.name):
                shutil.rmtree(left.path, ignore_errors=True)
        return Saved(self.step, 0, time.monotonic() - self.began, failure, ())

    def _commit(self) -> bool:
        if not is_complete(self.path, wait=OTHERS_SECONDS):
            raise TimeoutError(f"the checksums of some processes are missing after {OTHERS_SECONDS:.0f} s")
        self.bytes = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        with self._lock:
            if not self._given_up:
                os.rename(self.path, self.folder / str(self.step))
                sync(self.folder)
        return not self._given_up

    def _delete_old(self) -> None:
        if self.retention is None:
            return
        own = [entry.name for entry in entries(self.folder) if entry.name.isdigit() and not entry.is_symlink()]
        for step in self.retention.doomed({int(name): read_meta(self.folder / name).get("valid_loss") for name in own}):
            gone = self.folder / f"{step}{SAVING}"  # at once: a kill in the middle leaves no half checkpoint
            try:
                os.rename(self.folder / str(step), gone)
                shutil.rmtree(gone)
                self.deleted.append(step)
            except OSError as error:
                logger.warning(f"checkpoint {step} could not be deleted: {error}")


def read_meta(folder: Path) -> dict[str, Any]:
    """A checkpoint's `meta`, without Orbax; empty where there is none, or it cannot be read."""
    try:
        meta = json.loads((folder / "meta" / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def failure_of(error: BaseException) -> Failure:
    """What to say of an error, and whether it is the disk's."""
    cause = first_cause(error)
    wanted = "a folder that can be written" if isinstance(cause, PermissionError) else None
    if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
        wanted = "a disk with space left for a checkpoint"
    what = f"wanted {wanted}" if wanted else f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    return Failure(what, wanted)


@contextlib.contextmanager
def orbax_settings() -> Iterator[None]:
    """How checkpoints are written and read."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.array.saving.use_compression = False  # training state does not compress; it only costs time
    # replicas share the writing of large arrays; each shape takes a program, for which small ones are not worth waiting
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    with context:
        yield


def entries(folder: Path) -> list[os.DirEntry]:
    """What lies in a folder, or will once it is there."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []


def first_cause(error: BaseException) -> BaseException:
    """The end of an error's chain of causes: Orbax wraps what it meets."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
