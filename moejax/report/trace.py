"""A pipeline schedule as a Chrome trace, which opens in Perfetto (ui.perfetto.dev) and in chrome://tracing.

Every rank is a thread, every op of a cell an event, named as in `Program`: F0.3 is the forward of micro-batch 3 of
chunk 0. One unit of time is a millisecond. Times that were measured stand below, as a second process.
"""

import json
from pathlib import Path
from typing import Any

from moejax.config import ConfigError
from moejax.pipeline.simulate import Span, Timeline
from moejax.report.schedule import NAMES, pieces

COLOURS = {"F": "thread_state_runnable", "B": "thread_state_running", "I": "good", "W": "thread_state_iowait"}


def chrome_trace(timeline: Timeline, measured: Timeline | None = None) -> dict[str, Any]:
    """The content of a trace file."""
    events = _events(timeline, 0, f"{timeline.program.name}, simulated")
    events += _events(measured, 1, f"{timeline.program.name}, measured") if measured else []
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def measured_spans(path: str | Path, timeline: Timeline) -> Timeline:
    """The measured times of a file: JSON with `cells`, as `moejax schedule --json` has them, in the same unit.

    Raises:
        ConfigError: they are not those of the schedule's cells.
    """
    text = Path(path).read_text(encoding="utf-8")
    counts = [len(spans) for spans in timeline.spans]
    try:
        cells = json.loads(text)["cells"]
        found = [[(float(cell["start"]), float(cell["end"])) for cell in rank] for rank in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("--measured", str(path), "JSON with cells: [[{start, end}, ...], ...]") from error
    if [len(rank) for rank in found] != counts:
        raise ConfigError("--measured", str(path), f"so many cells of each rank: {counts}")
    spans = (
        tuple(Span(start, end, span.cell) for (start, end), span in zip(rank, own, strict=True))
        for rank, own in zip(found, timeline.spans, strict=True)
    )
    return Timeline(timeline.program, tuple(spans))


def _events(timeline: Timeline, process: int, name: str) -> list[dict[str, Any]]:
    events = [_name("process_name", process, 0, name)]
    for rank, spans in enumerate(timeline.spans):
        events.append(_name("thread_name", process, rank, f"rank {rank}"))
        for op, start, end in (piece for span in spans for piece in pieces(span)):
            event = {"name": str(op), "cat": NAMES[op.kind], "ph": "X", "ts": 1e3 * start, "dur": 1e3 * (end - start)}
            stage = timeline.program.stage(rank, op.chunk)
            where = {"pid": process, "tid": rank, "cname": COLOURS[op.kind]}
            events.append(event | where | {"args": {"stage": stage, "chunk": op.chunk, "microbatch": op.microbatch}})
    return events


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
