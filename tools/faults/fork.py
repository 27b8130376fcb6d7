"""A run in a fork of a process that has imported everything: it notes its phases, and kills itself in one."""

import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moejax.checkpoint import commit
from moejax.checkpoint.commit import SAVING, Saving
from moejax.checkpoint.manager import Checkpoints
from moejax.train import loop
from moejax.train.together import CompiledTogether

RESTORE = ("verification", "load")
PHASES = (*RESTORE, "log", "compilation", "step", "copy to host", "write", "checksums", "commit", "rename", "deletion")


@dataclass(frozen=True)
class Kill:
    """A run kills itself when it is in `phase` for the `nth` time, after `seconds`, or at its end if that is sooner."""

    phase: str
    nth: int
    seconds: float


@dataclass(frozen=True)
class NoSpace:
    """Stands for a full disk where none can be mounted: saves fail while `ballast` exists, after the first `room`."""

    ballast: Path
    room: int


class _Marks:
    """Notes the phases of this process in a file, and kills it in one."""

    def __init__(self, file: Path, kill: Kill | None):
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._kill, self._left = kill, 0 if kill is None else kill.nth

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began, armed = time.perf_counter(), False
        self._write("+", phase)
        if self._kill is not None and phase == self._kill.phase:
            self._left -= 1
            armed = self._left == 0
            if armed and self._kill.seconds == 0:
                _die_after(0.0)
            if armed:
                threading.Thread(target=_die_after, args=[self._kill.seconds], daemon=True).start()
        yield
        if armed:
            _die_after(0.0)
        self._write("-", phase, f"{time.perf_counter() - began}")

    def _write(self, *words: str) -> None:
        os.write(self._file, ("\t".join(words) + "\n").encode())


def _die_after(seconds: float) -> None:
    time.sleep(seconds)
    while True:  # until it is over
        os.kill(os.getpid(), signal.SIGKILL)


def forked(
    words: list[str], output: Path, phases: Path, compiled: str, kill: Kill | None, no_space: NoSpace | None
) -> None:
    """`moejax` in this process, with hooks."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.setswitchinterval(1e-4)  # so that the thread that kills gets its turn
    _hook(_Marks(phases, kill))
    if no_space is not None:
        _fill(no_space)
    from moejax.cli import main

    sys.exit(main(words))


def _hook(marks: _Marks) -> None:
    """Lets every phase of PHASES be noted."""

    def inside(owner: Any, name: str, phase: str | Callable[..., str | None]) -> None:
        function = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            now = phase if isinstance(phase, str) else phase(*arguments)
            with marks(now) if now else contextlib.nullcontext():
                result = function(*arguments, **options)
            if name == "save_checkpointables_async":
                inside(result, "result", "write")
            return result

        setattr(owner, name, noted)

    def of_rename(source: Any, target: Any, **options: Any) -> str | None:
        if SAVING in str(source) and Path(target).name.isdigit():
            return "rename"
        return "deletion" if str(target).endswith(SAVING) and Path(source).name.isdigit() else None

    inside(Checkpoints, "newest_whole", "verification")
    inside(loop, "start", lambda *arguments: "load" if arguments[-1].whole else None)
    inside(loop, "_open_log", "log")
    inside(CompiledTogether, "__call__", lambda self, *_: "step" if self._programs else "compilation")
    inside(commit.ocp, "save_checkpointables_async", "copy to host")
    inside(commit, "write_manifest", "checksums")
    inside(Saving, "_commit", "commit")
    inside(os, "rename", of_rename)
    inside(shutil, "rmtree", lambda path, *_, **__: "deletion" if SAVING in str(path) else None)


def _fill(no_space: NoSpace) -> None:
    """Lets saves fail as on a full disk."""
    write = commit.write_manifest

    def refused(folder: Path, *arguments: Any) -> None:
        if no_space.ballast.exists() and len(Checkpoints(folder.parent).steps) >= no_space.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, *arguments)

    commit.write_manifest = refused  # type: ignore[assignment]
