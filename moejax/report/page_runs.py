"""Sections of the report that say what the runs are: the summary, what is missing, and the settings."""

import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from moejax.report.axes import short, smooth
from moejax.report.page_training import COLOURS, validations
from moejax.report.records import Records
from moejax.train.console import duration

BAD = ("non_finite", "machine_fault", "spike", "failed", "damaged", "checkpoint_failed", "upload_failed")
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
    return table(f"<th></th>{heads}", rows)


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
        yield "Goodput", f"{100 * run.time['goodput']:.1f} %", f"of {clock(run.time['wall_seconds'])}; {attempts}{lost}"


def notes(runs: Sequence[Records]) -> str:
    """What the folders lack."""
    items = [f"{run.name}: {line}" if len(runs) > 1 else line for run in runs for line in run.missing]
    if not items:
        return ""
    return f'<div class="notes">Not there:<ul>{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul></div>'


# --------------------------------------------------------------------------------------------------------- settings


def differences(runs: Sequence[Records]) -> str:
    """What differs between the settings and the machines of several runs, or all settings of one."""
    flat = [dict(_flat(run.settings)) | dict(_flat(_machine(run), "environment.")) for run in runs]
    names = list(dict.fromkeys(name for values in flat for name in values if name != "out"))
    if len(runs) == 1:
        if not names:
            return ""
        listed = table("<th>setting</th><th>value</th>", [_setting(name, flat) for name in names])
        return f"<details><summary>All settings, and the machine</summary>{listed}</details>"
    differ = [name for name in names if len({_shown(values, name) for values in flat}) > 1]
    if not differ:
        return "<p>The settings are the same.</p>"
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    same = f'<p class="soft">{len(names) - len(differ)} settings are the same.</p>'
    return table(f"<th></th>{heads}", [_setting(name, flat) for name in differ]) + same


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


def clock(seconds: float) -> str:
    """A span of time: 12.3 s, or 0:04:05 of a minute and more."""
    return f"{seconds:,.1f} s" if seconds < 60 else duration(seconds)


def table(heads: str, rows: Sequence[str]) -> str:
    """A table that scrolls by itself where the page is narrow; `heads` and `rows` are HTML."""
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'
