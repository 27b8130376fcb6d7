"""Copies of finished checkpoints at an address that fsspec knows: s3://, gs://, a folder.

    <remote>/<step>/identity.json    written first: {"identity"}, the content that the files beside it belong to
    <remote>/<step>/<path>           every file of the local checkpoint
    <remote>/<step>/complete.json    written last: {"identity", "files": {path: bytes}}

A reader sees the steps that have a complete.json, and no others. An upload that ended in the middle goes on when the
same content is put again: files that are there with their size are not sent again. Other content of the same step, from
a run that was resumed before it, replaces what is there, complete.json first.

A process that is killed leaves parts of large files in a bucket, unseen and paid for: give the bucket a lifecycle rule
that ends unfinished multipart uploads.
"""

import contextlib
import json
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.checkpoint.store import COMPLETE, Patience, Store, one_line
from moejax.config import ConfigError

_IDENTITY = "identity.json"
_PATIENCE = Patience()
_logger = logging.getLogger("moejax")


@dataclass(frozen=True)
class _Checkpoint:
    step: int
    folder: Path
    identity: str
    files: dict[str, int]  # bytes of each path


class Uploader:
    """Uploads checkpoints one after the other on a thread of its own: a context manager.

    Nothing is raised after construction. `on_event(kind, step=..., ...)` is called from several threads, one at a time:

        uploaded                files, bytes: of the checkpoint; sent: files that were not there yet; seconds
        upload_failed           error; what was sent stays, and is not sent again when the same content is put again
        upload_superseded       by: a newer step that came before this one began
        upload_undone           was not finished when the uploader was closed
        remote_removed          by retention
        remote_remove_failed    error
        remote_retried          path, attempt, error
    """

    def __init__(
        self, remote: str, on_event: Callable[..., None], *, keep: int | None = None, patience: Patience = _PATIENCE
    ):
        """Writes, reads and deletes a small file at `remote`, to see that it can be done.

        `keep`: newest complete steps that are kept there, counted from the one that was uploaded last: what a run left
        ahead of the step from which it was resumed is not touched; None: all.

        Raises:
            ConfigError: fsspec does not know the address, its driver is not installed, or it cannot be used.
        """
        self._on_event, self._keep, self._patience = on_event, keep, patience
        self._one_event = threading.RLock()  # who is told may put
        self._stop = threading.Event()
        self._remote = Store(remote, patience, self._tell, self._stop)
        with self._remote.usable("written"):
            self._remote.probe()
        self._changed = threading.Condition()
        self._waiting: _Checkpoint | None = None
        self._running: _Checkpoint | None = None
        threading.Thread(target=self._work, name="uploader", daemon=True).start()

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.close(600.0 if kind is None else 10.0)

    def put(self, step: int, folder: Path, identity: str) -> None:
        """Queues a finished checkpoint and returns; one that waits is superseded.

        Its files are listed here, while they are all there; a folder that is removed later ends its upload.
        `identity`: differs for different content.
        """
        try:
            checkpoint = _Checkpoint(step, folder, identity, _list_files(folder))
        except (OSError, ValueError) as error:
            self._tell("upload_failed", step=step, error=one_line(error))
            return
        with self._changed:
            closed, superseded = self._stop.is_set(), self._waiting
            if not closed:
                self._waiting = checkpoint
                self._changed.notify_all()
        if closed:
            self._report("upload_undone", step=step)
        elif superseded is not None:
            self._tell("upload_superseded", step=superseded.step, by=step)

    def close(self, seconds: float) -> list[int]:
        """The steps that were not uploaded when all was done, or after `seconds`; nothing is begun or told after that.

        The thread may still hang in a request; it does not keep the process from ending.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._running is None and self._waiting is None, timeout=seconds)
            undone = [checkpoint.step for checkpoint in (self._running, self._waiting) if checkpoint is not None]
            self._running = self._waiting = None
            self._stop.set()
            self._changed.notify_all()
        for step in undone:
            self._report("upload_undone", step=step)
        return undone

    # ------------------------------------------------------------------------------------------------- on the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting is not None or self._stop.is_set())
                if self._waiting is None or self._stop.is_set():
                    return
                checkpoint = self._running = self._waiting
                self._waiting = None
            try:
                self._upload(checkpoint)
            except Exception as error:  # drivers have errors of their own kinds
                self._tell("upload_failed", step=checkpoint.step, error=one_line(error))
                continue
            try:
                self._retain(checkpoint.step)
            except Exception as error:
                self._tell("remote_remove_failed", step=checkpoint.step, error=one_line(error))

    def _upload(self, checkpoint: _Checkpoint) -> None:
        began, files = time.monotonic(), checkpoint.files
        sent = _send(self._remote, checkpoint, self._patience.threads, self._stop)
        counts = {"files": len(files), "bytes": sum(files.values()), "sent": sent}
        self._tell("uploaded", step=checkpoint.step, **counts, seconds=round(time.monotonic() - began, 3))

    def _retain(self, step: int) -> None:
        if self._keep is None:
            return
        kept = [whole for whole in self._remote.complete_steps() if whole <= step][-self._keep :]
        for old in self._remote.steps():
            if len(kept) == self._keep and old < kept[0]:
                self._remote.remove(old)
                self._tell("remote_removed", step=old)

    def _tell(self, kind: str, **fields: Any) -> None:
        if not self._stop.is_set():
            self._report(kind, **fields)

    def _report(self, kind: str, **fields: Any) -> None:
        with self._one_event:
            try:
                self._on_event(kind, **fields)
            except Exception as error:
                _logger.warning("%s %s could not be reported: %s", kind, fields, one_line(error))


@dataclass(frozen=True)
class Copy:
    """What there is of a step at an address."""

    step: int
    state: str  # complete; uploading, or left by an upload that ended in the middle
    files: int
    bytes: int


def remote_copies(remote: str, patience: Patience = _PATIENCE) -> list[Copy]:
    """The steps of which there is anything at an address, ascending.

    Raises:
        ConfigError: the address cannot be read.
    """
    source = Store(remote, patience, _log, threading.Event())
    found = []
    with source.usable("read"):
        for step in source.steps():
            complete = source.read(step, COMPLETE)
            files = source.sizes(step) if complete is None else complete["files"]
            state = "uploading" if complete is None else "complete"
            found.append(Copy(step, state, len(files), sum(files.values())))
    return found


def remote_steps(remote: str, patience: Patience = _PATIENCE) -> list[int]:
    """The complete steps at an address, ascending; none where there is nothing.

    Raises:
        ConfigError: the address cannot be read.
    """
    source = Store(remote, patience, _log, threading.Event())
    with source.usable("read"):
        return source.complete_steps()


def upload(remote: str, step: int, folder: Path, identity: str, patience: Patience = _PATIENCE) -> int:
    """Sends a finished checkpoint to an address, as the `Uploader` does; the number of files that were not there yet.

    Raises:
        ConfigError: the address cannot be written, or has a complete step with other content.
    """
    target = Store(remote, patience, _log, threading.Event())
    with target.usable("written"):
        target.probe()
        there = target.read(step, COMPLETE)
        if there is None or there.get("identity") == identity:
            checkpoint = _Checkpoint(step, folder, identity, _list_files(folder))
            return _send(target, checkpoint, patience.threads, threading.Event())
    raise ConfigError("checkpoint.remote", f"{remote}/{step}", "a place where no other checkpoint is yet")


def download(remote: str, step: int, folder: Path, patience: Patience = _PATIENCE) -> None:
    """Brings a step from an address to `folder`, which appears when it is whole.

    A download that ended in the middle goes on: until then the files are in `.<name>.part` beside the folder.

    Raises:
        ConfigError: the step is not complete there, or the address cannot be read.
        FileExistsError: the folder is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already")
    source = Store(remote, patience, _log, threading.Event())
    with source.usable("read"):
        complete = source.read(step, COMPLETE)
        if complete is not None:
            part = folder.with_name(f".{folder.name}.part")
            _fetch(source, step, complete, part, patience.threads)
            part.rename(folder)
    if complete is None:
        raise ConfigError("checkpoint.remote", f"{remote}/{step}", "a step that was uploaded whole")


def _send(remote: Store, checkpoint: _Checkpoint, threads: int, stop: threading.Event) -> int:
    """Sends what is not there yet of a checkpoint, complete.json last; the number of files that were sent."""
    step, files, folder = checkpoint.step, checkpoint.files, checkpoint.folder
    identity = {"identity": checkpoint.identity}
    complete = {**identity, "files": files}
    there = remote.read(step, COMPLETE)
    if there == complete:
        return 0
    if there is not None or remote.read(step, _IDENTITY) != identity:
        remote.remove(step)
        remote.write(step, _IDENTITY, identity)
    sizes = remote.sizes(step)
    missing = [path for path in files if sizes.get(path) != files[path]]
    _in_parallel(lambda path: remote.send(step, path, folder / path, files[path]), missing, threads, stop)
    sizes = remote.sizes(step)
    for path in files:
        if sizes.get(path) != files[path]:
            raise OSError(f"{path} has {sizes.get(path)} bytes there and {files[path]} here")
    remote.write(step, COMPLETE, complete)
    return len(missing)


def _fetch(source: Store, step: int, complete: dict[str, Any], part: Path, threads: int) -> None:
    """All files of a step into the folder `part`; its complete.json says until then to which content they belong."""
    note, files = part / COMPLETE, complete["files"]
    if wrong := [path for path in files if path.startswith("/") or ".." in path.split("/")]:
        raise ValueError(f"complete.json names {wrong[0]!r}, which is not below the checkpoint's folder")
    if not note.is_file() or note.read_text(encoding="utf-8") != json.dumps(complete):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        note.write_text(json.dumps(complete), encoding="utf-8")
    missing = [path for path in files if not (part / path).is_file()]
    _in_parallel(lambda path: source.fetch(step, path, part / path, files[path]), missing, threads, threading.Event())
    if source.read(step, COMPLETE) != complete:
        raise OSError(f"step {step} was replaced while it was downloaded")
    note.unlink()


def _in_parallel(action: Callable[[str], None], items: Iterable[str], threads: int, stop: threading.Event) -> None:
    """Calls `action` with each item, until one fails, or `stop` is set; raises the first error.

    On daemon threads: those of `concurrent.futures` keep a process from ending while they hang.
    """
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    errors: list[Exception] = []
    for item in items:
        todo.put(item)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not errors and not stop.is_set():
                item = todo.get_nowait()
                try:
                    action(item)
                except Exception as error:
                    errors.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def _list_files(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder; ValueError if it has none, or one with a name that is used here."""

    def fail(error: OSError) -> None:
        raise error

    paths = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=fail) for name in names]
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(paths)}
    if not files or {_IDENTITY, COMPLETE} & files.keys():
        raise ValueError(f"{folder} has no files, or one named {_IDENTITY} or {COMPLETE}")
    return files


def _log(kind: str, **fields: Any) -> None:
    _logger.warning("%s: %s", kind, fields)
