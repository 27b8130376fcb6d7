"""The processes of a run on one machine: started, watched, and ended together.

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
from typing import IO

from moejax.config import RunConfig
from moejax.launch.join import LAUNCHER_PIPE
from moejax.launch.place import find_place

POLL_SECONDS = 0.05
OWN_END_SECONDS = 8.0  # in which the others may end by themselves after one has failed, mostly for the same reason
TERMINATE_SECONDS = 5.0  # between SIGTERM and SIGKILL; JAX may swallow the first
LAST_LINES = 40


def is_launcher(config: RunConfig) -> bool:
    """Whether this process is to start those of the run, rather than to be one of them."""
    return config.launch.processes > 1 and find_place(config.launch, os.environ) is None


def run_processes(command: Sequence[str], config: RunConfig) -> int:
    """Runs a command, whose settings are `config`, in the processes of one run until all have ended.

    SIGINT and SIGTERM are passed on to all of them. None that has come to `join` outlives this process.

    Returns:
        0, or the exit code of the process that failed first: 128 and the signal's number if a signal ended it.
    """
    with ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        pipe, held = os.pipe()  # the processes end when `held` is closed, and that happens even if this one is killed
        stack.callback(os.close, held)
        outputs = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, config.launch.processes))]
        processes: list[subprocess.Popen[bytes]] = []
        stack.enter_context(_signals_passed_on(processes))
        for number, output in enumerate(outputs):
            processes.append(_start(command, config, address, number, pipe, output))
        os.close(pipe)
        failed = _first_failure(processes)
        if failed is None:
            return 0
        _end(processes)
        _explain(failed, processes, outputs[failed])
        code = processes[failed].returncode
        return code if code > 0 else 128 - code


def _start(
    command: Sequence[str], config: RunConfig, address: str, number: int, pipe: int, output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    place = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(config.launch.processes),
        "JAX_PROCESS_ID": str(number),
        LAUNCHER_PIPE: str(pipe),
    }
    if config.simulate is None:
        place["JAX_LOCAL_DEVICE_IDS"] = str(number)  # of GPUs one each; processors are not concerned
    return subprocess.Popen(
        command,
        env={**os.environ, **place},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output and subprocess.STDOUT,
        pass_fds=[pipe],
        start_new_session=True,  # a terminal's Ctrl-C comes to this process alone, which passes it on
    )


@contextmanager
def _signals_passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
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


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Returns when all processes have ended."""
    for number, seconds in ((None, OWN_END_SECONDS), (signal.SIGTERM, TERMINATE_SECONDS), (signal.SIGKILL, None)):
        deadline = time.monotonic() + (seconds or 0)
        for process in processes:
            if number is not None and process.poll() is None:
                process.send_signal(number)
        while any(process.poll() is None for process in processes) and (seconds is None or time.monotonic() < deadline):
            time.sleep(POLL_SECONDS)


def _explain(failed: int, processes: Sequence[subprocess.Popen[bytes]], output: IO[bytes] | None) -> None:
    """Says what process `failed` said, unless that was one line, which process 0 has said too."""
    code = processes[failed].returncode
    if code < 0:
        print(f"moejax: process {failed} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    if output is None or (code > 1 and processes[0].returncode == code):
        return
    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    if code > 0:
        print(f"moejax: process {failed} ended with exit code {code}", file=sys.stderr)
    for line in lines:
        print(f"[process {failed}] {line}", file=sys.stderr)
