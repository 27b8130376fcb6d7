"""Sections of the report that are tables: the summary, what is missing, where the time went, faults, and settings."""

import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from moejax.report.axes import Scale, short, smooth
from moejax.report.chart import LETTER, WIDE, figure, svg
from moejax.report.page_training import COLOURS, validations
from moejax.report.records import Records
from moejax.train.console import duration
from moejax.train.ledger import KINDS

QUIET = ("ledger", "validation", "checkpoint", "uploaded")  # events that are no news
BAD = ("non_finite", "machine_fault", "spike", "failed", "damaged", "checkpoint_failed", "upload_failed")
ROWS = 100  # of a run's events that are listed at most
ATTEMPTS = 24  # that are drawn at most
NOT_ENDED = "not ended"
ENVIRONMENT = ("packages", "backend", "devices", "processes", "processor", "cores", "python", "platform")


# ------------------------------------------------------------------------------------------------------------- summary


def summary(runs: Sequence[Records]) -> str:
    """The numbers that one looks for first: tiles of one run, or a table of several."""
    if len(runs) == 1:
        tiles = (
            f"<div><dt>{escape(name)}</dt><dd{_tone(value)}>{escape(value)}</dd><small>{escape(more)}</small></div>"
            for name, value, more in facts(runs[0])
        )
        return f'<dl class="tiles">{"".join(tiles)}</dl>'
    columns = [facts(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name, _, _ in column))
    heads = "".join(f'<th class="run c{i % COLOURS}">{escape(run.name)}</th>' for i, run in enumerate(runs))
    rows = []
    for name in names:
        cells = []
        for column in columns:
            value, more = next(((value, more) for other, value, more in column if other == name), ("-", ""))
            cells.append(f"<td><b{_tone(value)}>{escape(value)}</b><br><small class=soft>{escape(more)}</small></td>")
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return _table(f"<th></th>{heads}", rows)


def _tone(value: str) -> str:
    """The colour of a run's end."""
    tones = {"finished": "good", "stopped": "warn", NOT_ENDED: "warn"}
    tone = tones.get(value, "bad" if value.replace(" ", "_") in BAD else "")
    return f' class="{tone}"' if tone else ""


def facts(run: Records) -> list[tuple[str, str, str]]:
    """Name, value and details of a run's most important numbers; those that there are."""
    return [*_progress(run), *_quality(run), *_balance(run), *_cost(run)]


def _progress(run: Records) -> Iterator[tuple[str, str, str]]:
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.written))
    ago = f"last written {duration(max(time.time() - run.written, 0))} ago: it runs, or was cut off"
    yield "State", (run.ended or NOT_ENDED).replace("_", " "), f"at {written}" if run.ended else ago
    if len(run.step):
        total = run.config.steps if run.config and run.config.steps else None
        tokens = run.column("tokens")[-1]
        yield "Step", f"{run.step[-1]:,}" + (f" of {total:,}" if total else ""), f"{short(tokens)} tokens"
    started = run.of_kind("started", "resumed")
    if run.config and started and isinstance(started[0].get("parameters"), int):
        model = run.config.model
        moe = (
            f"{model.moe.num_experts} experts, {model.moe.top_k} of them per token" if model.num_moe_layers else "dense"
        )
        yield "Parameters", short(started[0]["parameters"]), f"{model.num_layers} layers; {moe}"


def _quality(run: Records) -> Iterator[tuple[str, str, str]]:
    loss = run.column("loss")
    if np.isfinite(loss).any():
        yield "Training loss", f"{smooth(loss)[np.isfinite(loss)][-1]:.4f}", "nats per token, mean of the last steps"
    steps, valid = validations(run, "valid_loss")
    if len(steps):
        best = int(valid.argmin())
        where = f"at step {steps[-1]:,}" + (
            f"; best {valid[best]:.4f} at {steps[best]:,}" if valid[best] < valid[-1] else ""
        )
        yield "Validation loss", f"{valid[-1]:.4f}", where
    _, bits = validations(run, "valid_bits_per_byte")
    unigram = next((e["unigram_loss"] for e in run.of_kind("started", "resumed") if e.get("unigram_loss")), None)
    if len(bits):
        yield "Bits per byte", f"{bits[-1]:.4f}", "of validation text"
    if isinstance(unigram, float):
        yield "Unigram model", f"{unigram:.4f}", "nats per token: what knowing only frequencies gives"


def _balance(run: Records) -> Iterator[tuple[str, str, str]]:
    violation = run.by_layer("max_violation")
    if violation.size and np.isfinite(violation).any():
        last = violation[-max(1, len(violation) // 10) :]
        steps = f"last {len(last)} steps" if len(last) > 1 else "last step"
        yield "Violation of balance", short(float(np.nanmean(last))), f"mean of the layers, {steps}"
    dead = run.column("dead_experts")
    if violation.size and np.isfinite(dead).any():
        yield (
            "Dead experts",
            short(float(dead[np.isfinite(dead)][-1])),
            f"in the last step; at most {short(np.nanmax(dead))}",
        )


def _cost(run: Records) -> Iterator[tuple[str, str, str]]:
    speed, mfu = run.column("tokens_per_second"), run.column("mfu")
    if np.isfinite(speed).any():
        share = f"MFU {100 * np.nanmedian(mfu):.1f} %" if np.isfinite(mfu).any() else ""
        yield "Tokens/s", short(float(np.nanmedian(speed))), f"median; {share}"
    devices = run.environment.get("devices")
    if isinstance(devices, dict) and devices:
        mesh = run.config.mesh if run.config else None
        lengths = {name: getattr(mesh, name) for name in ("pipe", "replica", "data", "expert")} if mesh else {}
        shape = " x ".join(f"{name} {length}" for name, length in lengths.items() if length > 1)
        names = ", ".join(f"{count} x {name}" for name, count in devices.items())
        yield "Devices", names, "; ".join(filter(None, (shape, run.config.precision if run.config else "")))
    if run.time is not None:
        lost = f", {run.time['lost_steps']} steps lost" if run.time["lost_steps"] else ""
        attempts = f"{run.time['attempts']} attempt{'s' if run.time['attempts'] != 1 else ''}"
        yield "Goodput", f"{100 * run.time['goodput']:.1f} %", f"of {_time(run.time['wall_seconds'])}; {attempts}{lost}"


def notes(runs: Sequence[Records]) -> str:
    """What the folders lack."""
    items = [f"{run.name}: {line}" if len(runs) > 1 else line for run in runs for line in run.missing]
    if not items:
        return ""
    return f'<div class="notes">Not there:<ul>{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul></div>'


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
            cells += f'<td class="num">{_time(value)}<br><small class="soft">{share:.1f} %</small></td>'
            cells += f'<td class="share"><i style="width:{share:.1f}%"></i></td>'
        name = f'{kind.replace("_", " ")}<br><small class="soft">{escape(meaning)}</small>'
        rows.append(f'<tr class="k{index}"><td>{name}</td>{cells}</tr>')
    total = "".join(f'<td class="num"><b>{_time(run.time["wall_seconds"])}</b></td><td></td>' for run in known)  # type: ignore[index]
    rows.append(f"<tr><td><b>wall clock</b></td>{total}</tr>")
    return _table(f"<th></th>{heads}", rows) + "".join(
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
            words = f"{kind.replace('_', ' ')}: {_time(seconds)}"
            box = f'x="{left + start:.1f}" y="{y}" width="{max(stop - start, 0.4):.1f}" height="{row - 5}"'
            pieces.append(f'<rect class="part k{kinds.index(kind)}" {box}><title>{words}</title></rect>')
            at += seconds
    bottom = 8 + row * len(shown)
    pieces.append(f'<path class="axis" d="M{left:.1f} {bottom}h{x.length:.1f}"/>')
    for tick in x.ticks(8):
        place = left + float(x(tick))
        pieces.append(f'<text class="x" x="{place:.1f}" y="{bottom + 15}">{_time(tick)}</text>')
    used = dict.fromkeys(kind for kind in kinds if any(kind in line["seconds"] for _, line in shown))
    key = "".join(f'<li><i class="k{kinds.index(kind)} box"></i>{kind.replace("_", " ")}</li>' for kind in used)
    title = f"Attempts of {run.name}" if named else "Attempts"
    if len(lines) > len(shown):
        title += f", the last {len(shown)} of {len(lines)}"
    note = "Each bar begins when its attempt did; within it the kinds are sorted. Gaps are restarts"
    picture = svg(WIDE, bottom + 22, title, pieces)
    whole = figure(title, "", picture, f'<ul class="key">{key}</ul>', note, wide=True)
    return f'<div class="grid below">{whole}</div>'


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 60 else duration(seconds)


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
        head = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        saved = run.of_kind("checkpoint")
        hung = sorted(path.name for path in run.folder.glob("stacks-*") if path.stat().st_size)
        said = [f"{name}: what every thread of a process that hung was doing" for name in hung]
        if saved:
            seconds = [event["seconds"] for event in saved if isinstance(event.get("seconds"), int | float)]
            median = f", a save took {_time(float(np.median(seconds)))} (median) while steps went on" if seconds else ""
            said.append(f"{len(saved):,} checkpoint{'s were' if len(saved) > 1 else ' was'} saved{median}")
        words = "".join(f"<p>{escape(line)}.</p>" for line in said)
        table = _table('<th>UTC</th><th class="num">step</th><th>what</th><th></th>', rows)
        parts.append(head + words + (table if rows else ""))
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


# --------------------------------------------------------------------------------------------------------- settings


def differences(runs: Sequence[Records]) -> str:
    """What differs between the settings and the machines of several runs, or all settings of one."""
    flat = [dict(_flat(run.settings)) | dict(_flat(_machine(run), "environment.")) for run in runs]
    names = list(dict.fromkeys(name for values in flat for name in values if name != "out"))
    if len(runs) == 1:
        if not names:
            return ""
        table = _table("<th>setting</th><th>value</th>", [_setting(name, flat) for name in names])
        return f"<details><summary>All settings, and the machine</summary>{table}</details>"
    differ = [name for name in names if len({_shown(values, name) for values in flat}) > 1]
    if not differ:
        return "<p>The settings are the same.</p>"
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    same = f'<p class="soft">{len(names) - len(differ)} settings are the same.</p>'
    return _table(f"<th></th>{heads}", [_setting(name, flat) for name in differ]) + same


def _setting(name: str, flat: Sequence[dict[str, Any]]) -> str:
    cells = "".join(f"<td><code>{_shown(values, name)}</code></td>" for values in flat)
    return f"<tr><td><code>{escape(name)}</code></td>{cells}</tr>"


def _machine(run: Records) -> dict[str, Any]:
    return {key: run.environment[key] for key in ENVIRONMENT if key in run.environment}


def _flat(value: Any, place: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{place}{name}.")
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{place}{index}.")
    else:
        yield place.removesuffix("."), value


def _shown(values: dict[str, Any], name: str) -> str:
    """A setting as HTML text; a dash where a run does not have it."""
    if name not in values:
        return "-"
    value = values[name]
    return escape(" ".join(map(str, value)) if isinstance(value, list) else str(value))


def _table(heads: str, rows: Sequence[str]) -> str:
    """A table that scrolls by itself where the page is narrow; `heads` and `rows` are HTML."""
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'
