"""The processes of a run on one machine: started, watched, ended together, and started again where that is asked for.

Process 0 writes to this one's stdout and stderr. What another says is shown if it is the first that fails.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO

from moejax.config import RunConfig
from moejax.launch.join import LAUNCHER_PIPE
from moejax.launch.place import find_place
from moejax.launch.restarts import Restarts, Start

POLL_SECONDS = 0.05
OWN_END_SECONDS = 8.0  # in which the others may end by themselves after one has failed, mostly for the same reason
KILLED_END_SECONDS = 2.0  # the same where a signal ended it: they have no other reason than that it is gone
TERMINATE_SECONDS = 5.0  # between SIGTERM and SIGKILL; JAX may swallow the first
LAST_LINES = 40


@dataclass(frozen=True)
class Failure:
    """The end of the process that failed first."""

    process: int  # its number
    code: int  # below 0: the signal that ended it
    said: list[str] | None  # its last lines; None: the user has seen them

    @property
    def how(self) -> str:
        """What happened, in a few words."""
        if self.code < 0:
            return f"process {self.process} was ended by {signal.Signals(-self.code).name}"
        return f"process {self.process} ended with exit code {self.code}"

    @property
    def exit_code(self) -> int:
        """As a shell says it: 128 and the signal's number if a signal ended the process."""
        return self.code if self.code > 0 else 128 - self.code


def is_launcher(config: RunConfig) -> bool:
    """Whether this process is to start those of the run, rather than to be one of them."""
    several = config.launch.processes > 1 or config.launch.restarts > 0
    return several and LAUNCHER_PIPE not in os.environ and find_place(config.launch, os.environ) is None


def run_processes(command: Sequence[str], config: RunConfig) -> int:
    """Runs a command, whose settings are `config`, in the processes of one run until all have ended.

    When one fails the others are ended too. `launch.restarts` times all may start again: see restarts.py. The command
    then gets flags for what is no longer as in `config`. SIGINT and SIGTERM are passed on to all processes, and none is
    started after that. None that has come to `join` outlives this process.

    Returns:
        0, or the exit code of the process that failed first in the last start: 128 and the signal's number if a signal
        ended it. 128 and the signal's number also where one came between two starts.
    """
    restarts = Restarts(config)
    processes: list[subprocess.Popen[bytes]] = []
    with _signals_passed_on(processes) as signals:
        while True:
            failure = _run_once(command, restarts.start, processes)
            if failure is None:
                return 0
            goes_on = not signals and restarts.after(failure.process, failure.code)
            _explain(failure, "" if signals else restarts.word)
            if not goes_on:
                return failure.exit_code
            due = time.monotonic() + restarts.wait
            while not signals and time.monotonic() < due:
                time.sleep(POLL_SECONDS)
            if signals:
                return 128 + signals[0]


def _run_once(command: Sequence[str], start: Start, processes: list[subprocess.Popen[bytes]]) -> Failure | None:
    """One start of all processes, which are put into `processes`, until all have ended."""
    with ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        pipe, held = os.pipe()  # the processes end when `held` is closed, and that happens even if this one is killed
        stack.callback(os.close, held)
        outputs = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in start.devices[1:])]
        processes.clear()
        for number, output in enumerate(outputs):
            processes.append(_start(command, start, address, number, pipe, output))
        os.close(pipe)
        failed = _first_failure(processes)
        if failed is None:
            return None
        code = processes[failed].returncode
        _end(processes, OWN_END_SECONDS if code > 0 else KILLED_END_SECONDS)
        return Failure(failed, code, _unseen(code, processes[0].returncode, outputs[failed]))


def _start(
    command: Sequence[str], start: Start, address: str, number: int, pipe: int, output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    place = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(len(start.devices)),
        "JAX_PROCESS_ID": str(number),
        LAUNCHER_PIPE: str(pipe),
    }
    device = start.devices[number]
    if device is not None and start.config.simulate is None:  # of GPUs one each; processors are not concerned
        if len(start.devices) > 1:
            place["JAX_LOCAL_DEVICE_IDS"] = str(device)
        else:  # JAX reads that variable only where processes are joined
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            place["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
    return subprocess.Popen(
        [*command, *start.flags],
        env={**os.environ, **place},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output and subprocess.STDOUT,
        pass_fds=[pipe],
        start_new_session=True,  # a terminal's Ctrl-C comes to this process alone, which passes it on
    )


@contextmanager
def _signals_passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """A context with the numbers of the signals that have come."""
    came: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        came.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Number of the process that failed first; None when all have ended well.

    JAX aborts the others when one is gone, and their collective operations raise errors: of several that have ended,
    these failed last.
    """
    while True:
        codes = [process.poll() for process in processes]
        failed = [(code == -signal.SIGABRT, code == 1, number) for number, code in enumerate(codes) if code]
        if failed:
            return min(failed)[-1]
        if None not in codes:
            return None
        time.sleep(POLL_SECONDS)


def _end(processes: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Returns when all processes have ended, by themselves in `patience` seconds, or else by signals."""
    for number, seconds in ((None, patience), (signal.SIGTERM, TERMINATE_SECONDS), (signal.SIGKILL, None)):
        deadline = time.monotonic() + (seconds or 0)
        for process in processes:
            if number is not None and process.poll() is None:
                process.send_signal(number)
        while any(process.poll() is None for process in processes) and (seconds is None or time.monotonic() < deadline):
            time.sleep(POLL_SECONDS)


def _unseen(code: int, first_code: int, output: IO[bytes] | None) -> list[str] | None:
    """The last lines of the process that failed; None if process 0 has shown them, or a line that says the same."""
    if output is None or (code > 1 and code == first_code):
        return None
    output.seek(0)
    return output.read().decode(errors="replace").splitlines()[-LAST_LINES:]


def _explain(failure: Failure, next_word: str) -> None:
    """One line that says what happened and comes next, if the user does not know, and what the failed process said."""
    if next_word or failure.code < 0 or failure.said is not None:
        print(f"moejax: {failure.how}{next_word}", file=sys.stderr)
    for line in failure.said or ():
        print(f"[process {failure.process}] {line}", file=sys.stderr)
