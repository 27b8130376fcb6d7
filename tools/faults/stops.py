"""SIGTERM; SIGSTOP and SIGKILL of one of two processes."""

import contextlib
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from faults.bench import (
    LONGEST_SECONDS,
    Bench,
    Report,
    committed,
    damaged,
    exact,
    require_equal,
    require_equal_end,
    tail,
    wait_until,
)
from moejax.train.watchdog import EXIT_CODE as HUNG

GRACE_SECONDS = 30.0  # from SIGTERM to the end; a scheduler gives as many or more before SIGKILL
HANG_SECONDS = 10.0  # limit of a step where a process is stopped
PAIR = ("--simulate", "2", "--launch.processes", "2")


def terminated(bench: Bench, report: Report, folder: Path, numbers: random.Random, *flags: str) -> float:
    """SIGTERM at a random moment after the first step; the seconds until the run has ended."""
    output = folder.with_suffix(".txt")
    with bench.command(folder, output, *flags) as process:
        wait_until(lambda: len(exact(folder)) > 0, "a step", lambda: process.poll() is None)
        time.sleep(numbers.uniform(0, 1.5))
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        code = process.wait(LONGEST_SECONDS)
    seconds, done = time.monotonic() - sent, len(exact(folder))
    report.say(f"{folder.name}: SIGTERM, exit code {code} after {seconds:.1f} s, at step {done}")
    report.require(code == 0, f"{folder}: exit code {code} after SIGTERM\n{tail(output)}")
    report.require(committed(folder)[-1:] == [done], f"{folder}: step {done}, checkpoints {committed(folder)}")
    report.require(not (found := damaged(folder)), f"{folder}: damaged after SIGTERM: {found}")
    report.require(seconds <= GRACE_SECONDS, f"{folder}: {seconds:.1f} s from SIGTERM to the end")
    return seconds


def terminated_in_start(bench: Bench, report: Report, folder: Path, numbers: random.Random) -> int:
    """SIGTERM before the first step: it ends at once, or after that step; the exit code."""
    before = len(exact(folder))
    with bench.command(folder, folder.with_suffix(".txt")) as process:
        time.sleep(numbers.uniform(0.0, 3.0))
        process.send_signal(signal.SIGTERM)
        code = process.wait(GRACE_SECONDS)
    done, steps = len(exact(folder)), committed(folder)
    report.say(f"{folder.name}: SIGTERM in the start, exit code {code}, step {before} before and {done} after")
    good = (done == before + 1 and steps[-1:] == [done]) if code == 0 else (code == -signal.SIGTERM and done == before)
    report.require(good, f"{folder}: exit code {code}, step {before} before and {done} after, checkpoints {steps}")
    report.require(not (found := damaged(folder)), f"{folder}: damaged after SIGTERM: {found}")
    return code


def process_of(launcher: subprocess.Popen, number: int) -> psutil.Process | None:
    """A process of a run of several, by its number; None where it has not been started."""
    for child in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.Error):
            if child.environ().get("JAX_PROCESS_ID") == str(number):
                return child
    return None


def stopped(bench: Bench, report: Report, whole: Path, number: int) -> float:
    """SIGSTOP of process `number` of two; the seconds until the run has ended."""
    folder = bench.work / f"stopped-{number}"
    output = folder.with_suffix(".txt")
    with bench.command(folder, output, *PAIR, "--hang-seconds", f"{HANG_SECONDS:g}") as launcher:
        wait_until(lambda: len(exact(folder)) >= 5, "five steps", lambda: launcher.poll() is None)
        processes = psutil.Process(launcher.pid).children()
        process = process_of(launcher, number)
        assert process is not None, f"process {number} is not among {processes}"
        process.suspend()
        sent, done = time.monotonic(), len(exact(folder))
        code = launcher.wait(LONGEST_SECONDS)
    seconds = time.monotonic() - sent
    left = [process for process in processes if process.is_running()]
    words = f"process {number} of 2 at step {done}: exit code {code} after {seconds:.1f} s (limit of a step"
    report.say(f"SIGSTOP of {words} {HANG_SECONDS:g} s)")
    report.require(code == HUNG, f"{folder}: exit code {code} after SIGSTOP, wanted {HUNG}\n{tail(output)}")
    report.require(not left, f"{folder}: still there: {left}")
    report.require(not (found := damaged(folder)), f"{folder}: damaged: {found}")
    report.require("has not ended in" in output.read_text(), f"{folder}: nothing is said of what hung\n{tail(output)}")
    require_equal_end(bench, report, folder, whole, *PAIR)
    return seconds


def restarted(bench: Bench, report: Report, whole: Path, times: int) -> float:
    """SIGKILL of process 1 of two after some steps, then at each start, `times` in all, under as many restarts.

    The run goes on in two processes, and where one has died twice without a new step, in one, on another mesh.
    """
    folder = bench.work / f"restarted-{times}"
    output = folder.with_suffix(".txt")
    with bench.command(folder, output, *PAIR, "--launch.restarts", f"{times}") as launcher:
        for death in range(times):
            wait_until(lambda: process_of(launcher, 1) is not None, "process 1", lambda: launcher.poll() is None)
            process = process_of(launcher, 1)
            if death == 0:
                wait_until(lambda: len(committed(folder)) > 0, "a checkpoint", lambda: launcher.poll() is None)
            assert process is not None
            process.kill()
            process.wait(LONGEST_SECONDS)
            gone = time.monotonic()
        before = len(exact(folder))
        wait_until(lambda: len(exact(folder)) > before, "a new step", lambda: launcher.poll() is None)
        seconds = time.monotonic() - gone
        code = launcher.wait(LONGEST_SECONDS)
    report.say(f"SIGKILL of process 1 of 2, {times} in a row: exit code {code}; a new step after {seconds:.1f} s")
    alone = "left out" in output.read_text()
    report.require(alone == (times > 1), f"{folder}: a device was {'' if alone else 'not '}left out\n{tail(output)}")
    report.require(code == 0, f"{folder}: exit code {code} after SIGKILL of one of two\n{tail(output)}")
    # float32: sums over the batch in another order on one device, and 30 steps of Adam let the difference grow
    require_equal(bench, report, folder, whole, rtol=0.0 if times == 1 else 1e-4)
    return seconds


def stops(bench: Bench, report: Report, number: int, numbers: random.Random) -> None:
    """SIGTERM `number` times, and what befalls one of two processes."""
    grace = []
    for one in range(number):
        folder = bench.work / f"terminated-{one}"
        grace.append(terminated(bench, report, folder, numbers))
        if one < 2:
            terminated_in_start(bench, report, folder, numbers)
        require_equal_end(bench, report, folder, bench.whole)
    report.rows.append(("SIGTERM", f"{number} times: a checkpoint of the last step, then exit code 0"))
    report.rows.append(("  most seconds to the end", f"{max(grace, default=0):.1f} of {GRACE_SECONDS:g}"))
    whole = bench.uninterrupted("whole-pair", *PAIR)
    seconds = terminated(bench, report, bench.work / "terminated-pair", numbers, *PAIR)
    require_equal_end(bench, report, bench.work / "terminated-pair", whole, *PAIR)
    report.rows.append(("  of two processes", f"exit code 0 after {seconds:.1f} s"))
    ends = [stopped(bench, report, whole, process) for process in (1, 0)]
    words = ", ".join(f"{seconds:.1f} s" for seconds in ends)
    report.rows.append(("SIGSTOP of one of two", f"exit code {HUNG} after {words}; limit of a step {HANG_SECONDS:g} s"))
    seconds = restarted(bench, report, whole, times=1)
    report.rows.append(("SIGKILL of one of two", f"a new step after {seconds:.1f} s; losses and state bitwise equal"))
    seconds = restarted(bench, report, whole, times=2)
    report.rows.append(("  again in its start", f"on one device {seconds:.1f} s later; losses equal to 1e-4"))
