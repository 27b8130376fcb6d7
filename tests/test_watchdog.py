"""Processes of their own that hang, each in its way, under a limit of a second."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moejax.train.watchdog import END_SECONDS

LIMIT = 1.0
SLACK = 5.0  # seconds in which a busy machine starts Python and gets round to things

HEADER = f"""
import ctypes, os, re, sys, threading, time
from pathlib import Path
from moejax.train.watchdog import Watchdog

def hang_in_sleep():
    time.sleep(60)

def hang_in_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def hang_in_c():  # both keep the GIL, and neither ends when a signal comes
    re.match(r"(a+)+$", "a" * 60 + "b")

def hang_in_a_lock_of_c():
    mutex = ctypes.create_string_buffer(64)
    library = ctypes.PyDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

def hang_with_a_full_stderr():
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, b" " * 65536)
    except BlockingIOError:
        os.set_blocking(2, True)
    time.sleep(60)

def hang_without_stderr():
    os.close(2)
    time.sleep(60)

def watch(seconds={LIMIT}):
    return Watchdog(seconds, Path(sys.argv[1]))
"""
HANG = "with watch() as dog: dog.beat(6); dog.beat(7); {name}()"
HANGS = {
    "sleep": "hang_in_sleep",
    "lock": "hang_in_a_lock",
    "C that holds the GIL": "hang_in_c",
    "lock of C that holds the GIL": "hang_in_a_lock_of_c",
    "stderr full": "hang_with_a_full_stderr",
    "stderr closed": "hang_without_stderr",
}
LIVES = {
    "beats": "with watch(2) as dog:\n    for step in range(30): dog.beat(step); time.sleep(0.1)",
    "allowed": "with watch() as dog:\n    with dog.allow(30, 'restore'): time.sleep(2)\n    dog.beat(1)",
    "paused": "with watch() as dog:\n    with dog.allow(None, 'compilation'): time.sleep(2)\n    dog.beat(1)",
    "without a limit": "with watch(None) as dog:\n    with dog.allow(0.1, 'restore'): time.sleep(2)\n    dog.beat(1)",
    "closed": "with watch() as dog: dog.beat(1)\ntime.sleep(2)",
}
PHASES = {
    "phase": "with watch(100) as dog, dog.allow(1, 'restore'): hang_in_sleep()",
    "after a phase": "with watch() as dog:\n    with dog.allow(100, 'restore'): pass\n    hang_in_sleep()",
    "around a phase": "with watch() as dog, dog.allow(1, 'outer'):\n"
    "    with dog.allow(100, 'inner'): pass\n    hang_in_sleep()",
}


class Child:
    """A Python process of `body`; its folder has what the watchdog leaves behind."""

    def __init__(self, body: str, folder: Path):
        folder.mkdir()
        self.stacks = folder / "stacks.txt"
        command = [sys.executable, "-c", HEADER + body, str(self.stacks)]
        path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=path)

    def end(self) -> tuple[int, str]:
        """Exit code and stderr, which nobody reads before the end."""
        try:
            return self.process.wait(LIMIT + END_SECONDS + SLACK), self.process.stderr.read()
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """All processes at once: most of their time is sleep."""
    bodies = {name: HANG.format(name=function) for name, function in HANGS.items()} | LIVES | PHASES
    folder = tmp_path_factory.mktemp("children")
    started = {name: Child(body, folder / name) for name, body in bodies.items()}
    yield started
    for child in started.values():
        child.process.kill()
        child.process.communicate()  # closes its pipes


@pytest.mark.parametrize("name", ["sleep", "lock"])
def test_hang_ends_with_11_and_says_where(children, name):
    code, said = children[name].end()
    assert code == 11, said
    for text in (said, children[name].stacks.read_text()):
        line, *stacks = text.splitlines()
        assert re.fullmatch(
            rf"moejax: a step has not ended in \d\.\d s \(limit 1 s\), after step 7; exit code 11; "
            rf"process {children[name].process.pid}:",
            line,
        )
        assert re.search(f"in {HANGS[name]}$", "\n".join(stacks), re.MULTILINE)


@pytest.mark.skipif(sys.platform != "linux", reason="the timers are Linux's")
@pytest.mark.parametrize("name", ["C that holds the GIL", "lock of C that holds the GIL"])
def test_hang_that_holds_the_gil_ends_with_11_and_says_where(children, name):
    code, said = children[name].end()
    assert code == 11, said
    assert said.startswith("Timeout")
    for text in (said, children[name].stacks.read_text()):
        assert re.search(f"in {HANGS[name]}$", text, re.MULTILINE)


@pytest.mark.skipif(sys.platform != "linux", reason="the timers are Linux's")
def test_stderr_that_nobody_reads_does_not_keep_the_process(children):
    code, _ = children["stderr full"].end()
    assert code == 11
    assert HANGS["stderr full"] in children["stderr full"].stacks.read_text()


def test_stderr_that_is_closed_does_not_keep_the_stacks(children):
    code, _ = children["stderr closed"].end()
    assert code == 11
    assert HANGS["stderr closed"] in children["stderr closed"].stacks.read_text()


@pytest.mark.parametrize("name", LIVES)
def test_process_in_time_lives_and_leaves_no_file(children, name):
    assert children[name].end() == (0, "")
    assert not children[name].stacks.exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("phase", r"restore has not ended in \d\.\d s \(limit 1 s\), before the first step"),
        ("after a phase", r"a step has not ended in \d\.\d s"),
        ("around a phase", r"outer has not ended in \d\.\d s"),
    ],
    ids=["phase", "after a phase", "around a phase"],
)
def test_phase_has_a_limit_of_its_own(children, name, says):
    code, said = children[name].end()
    assert code == 11
    assert re.match(f"moejax: {says}", said)


def test_process_that_continues_after_its_limit_ends_with_11(tmp_path):
    body = "with watch() as dog:\n    for step in range(200): dog.beat(step); print(step, flush=True); time.sleep(0.1)"
    child = Child(body, tmp_path / "stopped")
    assert child.process.stdout.readline() == "0\n"
    child.process.send_signal(signal.SIGSTOP)
    time.sleep(LIMIT + END_SECONDS + 0.5)
    assert child.process.poll() is None
    child.process.send_signal(signal.SIGCONT)
    continued = time.monotonic()
    code, said = child.end()
    assert code == 11, said
    assert time.monotonic() - continued < SLACK  # it does not go on beating


def test_step_that_was_too_long_is_no_beat(tmp_path):
    """The thread may come too late, as when everything was stopped: the next beat does not excuse that."""
    body = "with watch() as dog:\n    dog._closed.set(); time.sleep(1.5); dog.beat(1)\n    print('lives')"
    child = Child(body, tmp_path / "late")
    code, said = child.end()
    assert code == 11
    assert re.match(r"moejax: a step has not ended in \d\.\d s", said)


CLOSES = """
import faulthandler, signal
before = threading.enumerate()
for _ in range(3):
    with watch(60) as dog:
        dog.beat(1)
        assert len(threading.enumerate()) == len(before) + 1
        assert len(os.listdir(Path(sys.argv[1]).parent)) == 1
    assert threading.enumerate() == before
    assert not faulthandler.unregister(signal.SIGRTMAX)
    while len(os.listdir("/proc/self/task")) > 2:  # this one, and one of the C library's that serves all timers
        time.sleep(0.01)
    print(os.listdir("/proc/self/fd"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads and files are seen in /proc")
def test_closing_leaves_nothing_behind(tmp_path):
    child = Child(CLOSES, tmp_path / "closes")
    assert child.end() == (0, "")
    assert len(set(child.process.stdout.read().splitlines())) == 1
    assert not child.stacks.exists()
