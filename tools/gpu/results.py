"""What a section found, in lines of JSON, and what follows from all lines together: shares, aims, table, exit code.

A line is a `Result` without what has its default. `judged` fills in `share` and `met`.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number, or one thing that went wrong."""

    section: str
    name: str
    shape: str = ""
    by: str = ""  # whose implementation, where there are several
    value: float | None = None
    unit: str = ""
    of: str | None = None  # `label` of the results whose largest value this one is a share of
    share: float | None = None
    aim: float | None = None  # least share, or least value where there is no `of`
    bound: float | None = None  # largest value: an error of a kernel
    met: bool | None = None
    op: str = ""  # of hardware.json
    precision: str = ""
    note: str = ""
    error: str = ""  # why there is no value

    @property
    def label(self) -> str:
        """What `of` of other results calls it."""
        return f"{self.name} {self.shape}".strip()

    @property
    def status(self) -> str:
        """`failed` and `off` (an error above its bound) are failures; `missed` (an aim) is not."""
        if self.error:
            return "failed"
        if self.bound is not None:
            return "ok" if self.met else "off"
        return "" if self.met is None else "ok" if self.met else "missed"

    def to_json(self) -> str:
        """The line."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        return json.dumps({k: v for k, v in dataclasses.asdict(self).items() if v != default[k]})


def read(path: Path) -> list[Result]:
    """The lines of a file; none if it is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Result(**json.loads(line)) for line in lines]


def append(path: Path, result: Result) -> None:
    """Adds a line, which is on the disk when this returns to a process that may crash next."""
    with path.open("a", encoding="utf-8") as file:
        file.write(result.to_json() + "\n")


def write(path: Path, results: Iterable[Result]) -> None:
    """All lines of a file."""
    path.write_text("".join(result.to_json() + "\n" for result in results), encoding="utf-8")


def judged(results: Sequence[Result]) -> list[Result]:
    """The results with their shares, and whether aims and bounds are met, as far as they can be told."""
    largest: dict[tuple[str | None, str], float] = {}  # of results of a label that have the same unit
    for result in results:
        if result.value is not None:
            key = result.label, result.unit
            largest[key] = max(result.value, largest.get(key, -math.inf))

    def one(result: Result) -> Result:
        value, share, met = result.value, None, None
        if value is not None and (result.of, result.unit) in largest:
            share = value / largest[result.of, result.unit]
        if result.bound is not None and value is not None:
            met = value <= result.bound  # NaN is not
        elif result.aim is not None:
            reached = value if result.of is None else share
            met = None if reached is None else reached >= result.aim
        return dataclasses.replace(result, share=share, met=met)

    return [one(result) for result in results]


def exit_code(results: Iterable[Result]) -> int:
    """1 where something failed or a kernel is off, else 0; a missed aim is no failure."""
    return int(any(result.status in ("failed", "off") for result in results))


# --------------------------------------------------------------------------------------------------------- for a person


def table(results: Sequence[Result]) -> str:
    """One line a result, under its section's name; and how many there are of each status."""
    lines, section = [], None
    width = max((len(_title(result)) for result in results), default=0)
    for result in results:
        if result.section != section:
            section = result.section
            lines.append(f"\n{section}")
        aim = "" if result.aim is None else f"aim {_number(result.aim)}"
        limit = f"bound {result.bound:.1e}" if result.bound is not None else aim
        share = "" if result.share is None else f"{result.share:.3f}"
        scale, unit = _UNITS.get(result.unit, (1.0, result.unit))
        value = "" if result.value is None else f"{_number(result.value / scale)} {unit}".strip()
        row = f"  {_title(result):{width}}  {value:>22}  {share:>6}  {limit:13} {result.status:6}"
        lines.append(f"{row} {result.error or result.note}".rstrip())
    counts = {s: sum(result.status == s for result in results) for s in ("ok", "missed", "off", "failed")}
    return "\n".join(lines).lstrip("\n") + "\n\n" + ", ".join(f"{n} {status}" for status, n in counts.items())


_UNITS = {"FLOP/s": (1e12, "TFLOP/s"), "bytes/s": (1e9, "GB/s"), "bytes": (1e9, "GB")}


def _title(result: Result) -> str:
    whose = f" ({result.by})" if result.by else ""
    return f"{result.label}{whose}"


def _number(value: float) -> str:
    if not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1e7:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.3g}"


# -------------------------------------------------------------------------------------------------------- for a planner


def hardware(results: Sequence[Result]) -> dict[str, Any] | None:
    """The content of hardware.json (described in gpu_check.py); None without the ceilings."""

    def best(name: str) -> float | None:
        return max((r.value for r in results if r.name == name and r.value is not None), default=None)

    ceilings = {"bf16": best("dense bf16"), "fp8": best("dense fp8"), "": best("copy")}
    memory, device = best("device memory"), next((r.note for r in results if r.name == "device"), None)
    if device is None or memory is None or not ceilings["bf16"] or not ceilings[""]:
        return None
    shares: dict[str, dict[str, list[float]]] = {}
    for result in results:
        ceiling = ceilings.get(result.precision)
        if result.op and result.value is not None and ceiling:
            of_op = shares.setdefault(result.op, {})
            of_op.setdefault(result.precision or "bytes", []).append(result.value / ceiling)
    return {
        "device": device,
        "memory_bytes": memory,
        "copy_bytes_per_second": ceilings[""],
        "bf16_flops": ceilings["bf16"],
        "fp8_flops": ceilings["fp8"],
        "efficiency": {op: {p: statistics.median(found) for p, found in of.items()} for op, of in shares.items()},
    }
