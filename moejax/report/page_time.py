"""Sections of the report on the course of the runs: where the time went, faults and restarts."""

import time
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from moejax.report.axes import Scale
from moejax.report.chart import LETTER, WIDE, figure, svg
from moejax.report.page_runs import BAD, clock, table
from moejax.report.records import Records
from moejax.train.ledger import KINDS

QUIET = ("ledger", "validation", "checkpoint", "uploaded")  # events that are no news
ROWS = 100  # of a run's events that are listed at most
ATTEMPTS = 24  # that are drawn at most


# ------------------------------------------------------------------------------------------------ where the time went


def where_time_went(runs: Sequence[Records]) -> str:
    """The ledger's kinds as a table, and the attempts of runs that had several."""
    known = [run for run in runs if run.time is not None and run.time["wall_seconds"]]
    if not known:
        return ""
    titles = [run.name if len(runs) > 1 else "time" for run in known]
    heads = "".join(f'<th class="num">{escape(title)}</th><th>of the wall clock</th>' for title in titles)
    rows = []
    for index, (kind, meaning) in enumerate(KINDS.items()):
        seconds = [run.time["seconds"].get(kind, 0.0) for run in known]  # type: ignore[index]
        if max(seconds) < 0.05:
            continue
        cells = ""
        for run, value in zip(known, seconds, strict=True):
            share = 100 * value / run.time["wall_seconds"]  # type: ignore[index]
            cells += f'<td class="num">{clock(value)}<br><small class="soft">{share:.1f} %</small></td>'
            cells += f'<td class="share"><i style="width:{share:.1f}%"></i></td>'
        name = f'{kind.replace("_", " ")}<br><small class="soft">{escape(meaning)}</small>'
        rows.append(f'<tr class="k{index}"><td>{name}</td>{cells}</tr>')
    total = "".join(f'<td class="num"><b>{clock(run.time["wall_seconds"])}</b></td><td></td>' for run in known)  # type: ignore[index]
    rows.append(f"<tr><td><b>wall clock</b></td>{total}</tr>")
    return table(f"<th></th>{heads}", rows) + "".join(
        _attempts(run, len(runs) > 1) for run in known if run.time and run.time["attempts"] > 1
    )


def _attempts(run: Records, named: bool) -> str:
    """A bar for each attempt of a run, from its start, by what its time went into."""
    lines = {line["attempt"]: line for line in run.of_kind("ledger")}  # the last of each
    shown = list(enumerate(lines.values(), 1))[-ATTEMPTS:]
    began = shown[0][1]["attempt"]
    end = max(line["until"] for _, line in shown)
    names = [f"{number}: steps {line['resumed']:,} to {line['step']:,}" for number, line in shown]
    left, row = 14 + LETTER * max(map(len, names)), 20
    x = Scale(0, (end - began) * 1.01 or 1.0, WIDE - left - 12)
    pieces, kinds = [], list(KINDS)
    for index, ((_, line), name) in enumerate(zip(shown, names, strict=True)):
        at, y = line["attempt"] - began, 4 + row * index
        pieces.append(f'<text class="y" x="{left - 6:.1f}" y="{y + 12}">{name}</text>')
        for kind, seconds in sorted(line["seconds"].items(), key=lambda item: kinds.index(item[0])):
            start, stop = float(x(at)), float(x(at + seconds))
            words = f"{kind.replace('_', ' ')}: {clock(seconds)}"
            box = f'x="{left + start:.1f}" y="{y}" width="{max(stop - start, 0.4):.1f}" height="{row - 5}"'
            pieces.append(f'<rect class="part k{kinds.index(kind)}" {box}><title>{words}</title></rect>')
            at += seconds
    bottom = 8 + row * len(shown)
    pieces.append(f'<path class="axis" d="M{left:.1f} {bottom}h{x.length:.1f}"/>')
    for tick in x.ticks(8):
        place = left + float(x(tick))
        pieces.append(f'<text class="x" x="{place:.1f}" y="{bottom + 15}">{clock(tick)}</text>')
    used = dict.fromkeys(kind for kind in kinds if any(kind in line["seconds"] for _, line in shown))
    key = "".join(f'<li><i class="k{kinds.index(kind)} box"></i>{kind.replace("_", " ")}</li>' for kind in used)
    title = f"Attempts of {run.name}" if named else "Attempts"
    if len(lines) > len(shown):
        title += f", the last {len(shown)} of {len(lines)}"
    note = "Each bar begins when its attempt did; within it the kinds are sorted. Gaps are restarts"
    picture = svg(WIDE, bottom + 22, title, pieces)
    whole = figure(title, "", picture, f'<ul class="key">{key}</ul>', note, wide=True)
    return f'<div class="grid below">{whole}</div>'


# ---------------------------------------------------------------------------------------------------------- faults


def faults(runs: Sequence[Records]) -> str:
    """What happened to each run: starts, restarts, faults and its end."""
    parts = []
    for run in runs:
        events = [event for event in run.events if event["kind"] not in QUIET]
        rows = [_event_row(event) for event in events]
        if len(rows) > ROWS:
            gap = f'<tr><td colspan="4" class="soft">{len(rows) - ROWS:,} more are in events.jsonl</td></tr>'
            rows = [*rows[: ROWS // 2], gap, *rows[-ROWS // 2 :]]
        head = f'<h3 class="run">{escape(run.name)}</h3>' if len(runs) > 1 else ""
        saved = run.of_kind("checkpoint")
        hung = sorted(path.name for path in run.folder.glob("stacks-*") if path.stat().st_size)
        said = [f"{name}: what every thread of a process that hung was doing" for name in hung]
        if saved:
            seconds = [event["seconds"] for event in saved if isinstance(event.get("seconds"), int | float)]
            median = f", a save took {clock(float(np.median(seconds)))} (median) while steps went on" if seconds else ""
            said.append(f"{len(saved):,} checkpoint{'s were' if len(saved) > 1 else ' was'} saved{median}")
        words = "".join(f"<p>{escape(line)}.</p>" for line in said)
        listed = table('<th>UTC</th><th class="num">step</th><th>what</th><th></th>', rows) if rows else ""
        parts.append(head + words + listed)
    return "".join(parts) if any(parts) else ""


def _event_row(event: dict[str, Any]) -> str:
    stamp = event.get("time")
    when = time.strftime("%m-%d %H:%M:%S", time.gmtime(stamp)) if isinstance(stamp, int | float) else ""
    kind, step = event["kind"], event.get("step")
    number = f"{step:,}" if isinstance(step, int) else ""
    tone = "bad" if kind in BAD else {"finished": "good", "stopped": "warn", "rolled_back": "warn"}.get(kind, "")
    cells = f'<td class="when">{when}</td><td class="num">{number}</td>'
    cells += f'<td class="kind {tone}">{escape(kind.replace("_", " "))}</td>'
    return f"<tr>{cells}<td>{escape(_words(event))}</td></tr>"


def _words(event: dict[str, Any]) -> str:
    """What an event says beside its time, kind and step."""
    kind = event["kind"]
    if kind == "rolled_back":
        batches = "skipped" if event.get("skipped") else "done again"
        return f"from step {event.get('from_step')}; the batches in between are {batches}"
    if kind in ("non_finite", "machine_fault") and isinstance(event.get("quantities"), list):
        again = "finite when repeated" if kind == "machine_fault" else "not finite"
        return f"{again}: {', '.join(map(str, event['quantities']))}"
    if kind in ("started", "resumed"):
        source = f"with the weights of {event['source']}" if event.get("source") else ""
        files = event.get("files")
        return f"{files:,} files verified in {event.get('seconds')} s" if isinstance(files, int) else source
    rest = {key: value for key, value in event.items() if key not in ("time", "kind", "step") and value is not None}
    return "; ".join(f"{key}: {_value(value)}" for key, value in rest.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
