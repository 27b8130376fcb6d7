"""A disk that is full while a run saves."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from faults.bench import (
    DUE,
    KEEP,
    LONGEST_SECONDS,
    STEPS,
    Bench,
    Report,
    committed,
    damaged,
    events_of,
    require_equal,
    tail,
    wait_until,
)
from faults.fork import NoSpace

PAGE = 4096


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path | None]:
    """A context with a disk of `size` bytes, by a path of this process; None where it cannot be mounted.

    It is a tmpfs in a namespace of its own, in which another process waits: no privilege is needed where the system
    lets users have namespaces, and nothing stays mounted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = 'mount -t tmpfs -o size="$2" none "$1" && echo mounted && exec sleep 3600'
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(folder), str(size)]
    if shutil.which("unshare") is None:
        yield None
        return
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as holder:
        try:
            assert holder.stdout is not None
            inside = Path(f"/proc/{holder.pid}/root{folder.absolute()}")
            yield inside if holder.stdout.readline() == "mounted\n" and os.access(inside, os.W_OK) else None
        finally:
            holder.kill()


def size_on_disk(folder: Path) -> int:
    """Bytes that the files below a folder take, in whole pages."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


def full(bench: Bench, report: Report, name: str, keep: int, room: int, freed: bool) -> str:
    """A run on a disk with room for so many checkpoints; `freed`: there is more after the second save that failed.

    Returns how the disk was made full.
    """
    one = size_on_disk(bench.whole / "checkpoints" / str(STEPS))
    size, output = (len(DUE) + 4) * one, bench.work / f"{name}.txt"
    with small_disk(bench.work / name, size) as mounted:
        folder, ballast = (mounted or bench.work / name) / "run", (mounted or bench.work / name) / "ballast"
        ballast.write_bytes(bytes(size - int((room + 0.6) * one)) if mounted else b"")
        flags = ("--data.cache", str(bench.work / "tokens"), "--checkpoint.keep", str(keep))
        process = bench.fork(folder, output, *flags, no_space=None if mounted else NoSpace(ballast, room))
        if freed:
            wait_until(lambda: len(_failed(output)) >= 2, "two saves that failed", process.is_alive)
            os.kill(process.pid, signal.SIGSTOP)
            before = committed(folder)
            report.require(before == DUE[:room], f"{folder}: {before} on a full disk with room for {room}")
            report.require(not (found := damaged(folder)), f"{folder}: damaged on a full disk: {found}")
            ballast.unlink()
            os.kill(process.pid, signal.SIGCONT)
        process.join(LONGEST_SECONDS)
        process.kill()
        steps, failed, where = committed(folder), _failed(output), f"{folder}\n{tail(output)}"
        events = [event["step"] for event in events_of(folder, "checkpoint_failed")]
        report.require(process.exitcode == (0 if freed else 2), f"exit code {process.exitcode} {where}")
        report.require(not (found := damaged(folder)), f"damaged: {found} {where}")
        report.require(steps[:room] == DUE[:room], f"whole {steps} of {DUE[:room]} before {where}")
        if freed:
            report.require(sorted([*steps, *failed]) == DUE and events == failed, f"{failed} failed {where}")
            require_equal(bench, report, folder, bench.whole)
        else:  # the save of the last step is tried twice
            report.require((steps, failed) == (DUE[:room], [*DUE[room:], STEPS]), f"{failed} failed {where}")
            report.require("wanted a disk with space left" in tail(output).splitlines()[-1], f"the end: {where}")
    title = f"disk full, {'freed later' if freed else 'to the end'}"
    how = f"a tmpfs of {size / 1e6:.1f} MB" if mounted else "errors put into the run, for want of a mount"
    report.say(f"{title}: {how}; failed {failed}, whole {steps}")
    report.rows.append((title.capitalize(), f"{how}; exit code {process.exitcode}"))
    report.rows.append(("  saves that failed, all said", f"{len(failed)}: {', '.join(map(str, failed))}"))
    report.rows.append(("  whole at the end", ", ".join(map(str, steps))))
    return how


def _failed(output: Path) -> list[int]:
    """The steps whose saves have failed, as the run says."""
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    return [int(line.split()[2]) for line in lines if line.startswith("warning: checkpoint") and "not saved" in line]


def disk(bench: Bench, report: Report) -> None:
    """A disk that is full for some saves, with room for three checkpoints, and to the end, with room for two."""
    full(bench, report, "disk-freed", keep=100, room=3, freed=True)
    full(bench, report, "disk-full", keep=KEEP, room=KEEP, freed=False)
