"""Runs sections one after the other, each in a process of its own that may crash or be late."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu.results import Result, append, read, write

TOOLS = Path(__file__).parents[1]
LEAST_SECONDS = 5.0  # with less left no section is started


@dataclass(frozen=True)
class Section:
    """A function `MODULE:FUNCTION` that takes a `Bench`."""

    name: str
    function: str
    typical: int  # seconds that it is expected to take on an H200
    limit: int  # seconds after which it is ended


def run_sections(
    sections: Sequence[Section],
    out: Path,
    *,
    dry: bool = False,
    seconds: float = float("inf"),
    torch: str = sys.executable,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """The results of the sections, and those of other sections that `out/results.jsonl` has from before.

    A section that crashes or is late has a result that says so; its output is in `out/NAME.log`.

    Args:
        sections: in their order.
        out: a folder, which is made.
        dry: compile only; for this nothing has a limit but `seconds`.
        seconds: that all of them may take; then what runs is ended, and the others are not started.
        torch: the interpreter with torch and transformers.
        say: is given a line for each section.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, names = out / "results.jsonl", {section.name for section in sections}
    write(path, [result for result in read(path) if result.section not in names])
    end = time.monotonic() + seconds
    for section in sections:
        begin, left = time.monotonic(), end - time.monotonic()
        if left < LEAST_SECONDS:
            append(path, Result(section=section.name, name=section.name, error="not started: no time is left"))
            continue
        failure = _run(section, out, dry, left if dry else min(left, section.limit), torch)
        if failure:
            append(path, Result(section=section.name, name=section.name, error=failure))
        say(f"{section.name:16} {time.monotonic() - begin:5.0f} s  {failure or ''}".rstrip())
    return read(path)


def _run(section: Section, out: Path, dry: bool, seconds: float, torch: str) -> str:
    """What went wrong; empty where nothing did."""
    words = ["-m", "gpu.section", section.name, section.function, "--out", str(out), "--torch", torch]
    log = out / f"{section.name}.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *words, *(["--dry-run"] if dry else [])],
            env=_environment(dry),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to end what it starts, too
        )
        try:
            code = process.wait(None if seconds == float("inf") else seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"ended after its {seconds:.0f} s"
    if code == 0:
        return ""
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{how}: {lines[-1][:200]}" if lines else how


def _environment(dry: bool) -> dict[str, str]:
    paths = [str(TOOLS.parent), str(TOOLS), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # the last section's process has given it all back
    return memory | os.environ | own | ({"JAX_PLATFORMS": "cpu"} if dry else {})
