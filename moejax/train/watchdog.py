"""Ends a process that hangs: when no step has ended within a limit, with every thread's stack and exit code 11.

Two guards share the limit, since a hang may be anywhere:

1. A Python thread says what took too long and writes the stacks. It needs the interpreter's lock, the GIL: it sees
   what waits for a device, a lock, a file or another process.
2. On Linux, timers of the operating system, for calls into C that keep the GIL, under which no Python thread runs, and
   for a stderr that nobody reads. DUMP_SECONDS after the limit they write the stacks, and END_SECONDS after it the
   thread that a timer starts calls C's `_exit` with the exit code. Elsewhere faulthandler alone ends such a process,
   with code 1.

Their clock is CLOCK_MONOTONIC, which stands still while the machine sleeps. While the process itself is stopped, by
SIGSTOP or a debugger, it goes on: one that continues after its limit ends. `kill -RTMAX PID` writes the stacks at any
time.
"""

import contextlib
import ctypes
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

EXIT_CODE = 11
DUMP_SECONDS, END_SECONDS = 1.0, 3.0  # after the limit: when the second guard dumps, and ends the process
POLL_SECONDS = 1.0  # at least so often the thread looks whether the limit has become shorter
STDERR = 2  # the process's own: sys.stderr may be something else
LINUX = sys.platform == "linux"


class Watchdog:
    """Ends the process when a step takes longer than a limit: a context manager, one in a process at a time.

    `beat` and `allow` are for the thread that trains. Both end the process too when they come after the limit.
    """

    def __init__(self, seconds: float | None, dump: Path, exit_code: int = EXIT_CODE):
        """Nothing is watched before the `with` block.

        Args:
            seconds: limit of a step; None: no limit ever, as for work with a debugger.
            dump: file to which the stacks are appended, as they are written to stderr. It is there, and empty, while
                the watchdog is on.
            exit_code: of the process that is ended.
        """
        self.seconds, self.dump, self.exit_code = seconds, dump, exit_code
        self._step: int | None = None  # the last one done
        self._phase, self._limit = "a step", seconds
        self._since, self._deadline = time.monotonic(), math.inf
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds is not None:
            self.dump.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(self.dump, "ab", buffering=0)
            self._timers = _make_timers(self._file, self.exit_code) if LINUX else []
            self._begin(self._phase, self._limit)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.seconds is None:
            return
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        for timer in self._timers:
            timer.close()
        if LINUX:
            faulthandler.unregister(signal.SIGRTMAX)
        if not os.fstat(self._file.fileno()).st_size:
            self.dump.unlink(missing_ok=True)
        self._file.close()

    def beat(self, step: int) -> None:
        """Says that `step` is done: the time of the next one begins."""
        self._begin(self._phase, self._limit)
        self._step = step

    @contextlib.contextmanager
    def allow(self, seconds: float | None, phase: str) -> Iterator[None]:
        """Another limit for a phase that takes its own time, such as "compilation"; None: no limit.

        The limit before is back when the phase has ended, and its time begins again.
        """
        before = self._phase, self._limit
        self._begin(phase, seconds)
        try:
            yield
        finally:
            self._begin(*before)

    # ------------------------------------------------------------------------------------------------------- pieces

    def _begin(self, phase: str, limit: float | None) -> None:
        """Starts the time of a step or phase for both guards, unless that of the one before is over."""
        if self.seconds is None:
            return
        now = time.monotonic()
        if now >= self._deadline:
            self._end()
        self._phase, self._limit = phase, limit
        self._since, self._deadline = now, math.inf if limit is None else now + limit
        if limit is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(limit + DUMP_SECONDS, file=STDERR, exit=not LINUX)
        for timer in self._timers:
            timer.start(limit)

    def _watch(self) -> None:
        while not self._closed.wait(max(0.0, min(POLL_SECONDS, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline:
                self._end()

    def _end(self) -> None:
        after = "before the first step" if self._step is None else f"after step {self._step}"
        seconds = time.monotonic() - self._since
        line = f"{self._phase} has not ended in {seconds:.1f} s (limit {self._limit:g} s), {after}; exit code"
        try:
            for file in (STDERR, self._file.fileno()):
                with contextlib.suppress(OSError):  # a stderr that is closed must not keep the other from being written
                    os.write(file, f"moejax: {line} {self.exit_code}; process {os.getpid()}:\n".encode())
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            os._exit(self.exit_code)


# ------------------------------------------------------------------------------------------ timers that need no GIL


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux: what a timer does when its time is over."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("reserved", ctypes.c_byte * 32),
    ]


class _Setting(ctypes.Structure):
    """`struct itimerspec`: the period, which is 0, and the time left; 0: the timer is off."""

    _fields_ = [(name, ctypes.c_long) for name in ("period", "period_ns", "seconds", "nanoseconds")]


SIGEV_SIGNAL, SIGEV_THREAD = 0, 2
CLOCK_MONOTONIC = 1


class _Timer:
    """A timer of timer_create(2), off at first. It is due `delay` seconds after the limit that it is started with."""

    def __init__(self, library: ctypes.PyDLL, event: _Event, delay: float):
        self._library, self._delay, self._id = library, delay, ctypes.c_void_p()
        self._check(library.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)))

    def start(self, limit: float | None) -> None:
        """Starts it, also again; None: turns it off."""
        fraction, whole = math.modf(0.0 if limit is None else limit + self._delay)
        setting = _Setting(0, 0, int(whole), int(fraction * 1e9))
        self._check(self._library.timer_settime(self._id, 0, ctypes.byref(setting), None))

    def close(self) -> None:
        """Takes the timer away."""
        self._check(self._library.timer_delete(self._id))

    def _check(self, failed: int) -> None:
        if failed:
            raise OSError(ctypes.get_errno(), f"timer: {os.strerror(ctypes.get_errno())}")


def _make_timers(file: BinaryIO, exit_code: int) -> list[_Timer]:
    """Timers of the second guard: one writes the stacks to `file`, one ends the process.

    Stacks are written without the GIL by faulthandler's handler of a signal, and by its own timer, which can be given
    one file only: that is stderr.
    """
    library = ctypes.PyDLL("librt.so.1", use_errno=True)
    faulthandler.register(signal.SIGRTMAX, file, all_threads=True)
    dump = _Event(notify=SIGEV_SIGNAL, signal=signal.SIGRTMAX)
    exit_function = ctypes.cast(library._exit, ctypes.c_void_p).value
    end = _Event(notify=SIGEV_THREAD, function=exit_function, value=exit_code)
    return [_Timer(library, dump, DUMP_SECONDS), _Timer(library, end, END_SECONDS)]
