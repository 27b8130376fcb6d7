"""Sections of the report: losses and gradients over the steps with the schedule's phases, and speed."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moejax.report.axes import reduced, short, smooth
from moejax.report.chart import WIDE, Curve, Mark, Span, chart
from moejax.report.records import Records
from moejax.train.schedules import schedule_tokens

COLOURS = 8  # of the page
MARKS = 60  # of a run that are drawn at most


class Along:
    """What the x axes of a report count: steps, or tokens where the runs' steps are of different sizes."""

    def __init__(self, runs: Sequence[Records]):
        common = min((int(run.step[-1]) for run in runs if len(run.step)), default=0)
        tokens = {_at(run, common) for run in runs if len(run.step) and np.isfinite(run.column("tokens")).all()}
        self.name = "tokens" if len({round(count / 1e-3) for count in tokens}) > 1 else "step"

    def __call__(self, run: Records, steps: np.ndarray) -> np.ndarray:
        """The places of a run's steps on the axis."""
        steps = np.asarray(steps, np.float64)
        return steps if self.name == "step" else np.interp(steps, run.step, run.column("tokens"))


def _at(run: Records, step: int) -> float:
    return float(np.interp(step, run.step, run.column("tokens")))


def losses(runs: Sequence[Records]) -> str:
    """Losses with the schedule's phases, gradient norm and schedule."""
    along = Along(runs)
    marks = [mark for run in runs for mark in marks_of(run, along)]
    curves = [curve for index, run in enumerate(runs) for curve in _losses_of(run, index, along, len(runs) == 1)]
    said = [event.get("unigram_loss") for run in runs for event in run.of_kind("started", "resumed")]
    unigram = dict.fromkeys(float(value) for value in said if isinstance(value, int | float))
    lines = [(value, "unigram model") for value in unigram][:3]
    single = runs[0] if len(runs) == 1 else None
    clips = {run.config.optimizer.clip_norm for run in runs if run.config}
    figures = [
        chart(
            "Loss",
            "nats per token",
            curves,
            x_name=along.name,
            width=WIDE,
            lines=lines,
            marks=marks,
            spans=_phases(single, along) if single else (),
            note="Thin: every step; thick: running mean. The unigram model knows only how often each token occurs",
        ),
        over_steps(runs, along, "MTP loss", "nats per token", "mtp_loss"),
        over_steps(
            runs,
            along,
            "Gradient norm",
            "L2, before clipping",
            "grad_norm",
            log=True,
            marks=marks,
            lines=[(clip, "clipped above") for clip in clips],
        ),
        _schedule(single, along) if single else over_steps(runs, along, "Learning rate", "", "learning_rate", raw=True),
        over_steps(runs, along, "Balance loss", "weighted, as it is added to the loss", "balance_loss"),
    ]
    return grid(figures)


def speed(runs: Sequence[Records]) -> str:
    """Tokens per second, MFU, the wait for data, memory, and rounds of the exchange where there are several."""
    along = Along(runs)
    figures = [
        over_steps(runs, along, "Throughput", "tokens/s, all devices together", "tokens_per_second", zero=True),
        over_steps(runs, along, "MFU", "% of the devices' peak", "mfu", scale=100, zero=True),
        over_steps(runs, along, "Time of a step", "s", "step_time", raw=True, zero=True),
        over_steps(runs, along, "Wait for data", "ms in each step", "data_wait", scale=1e3, raw=True, zero=True),
        over_steps(
            runs, along, "Memory", "GB, peak of the fullest device", "memory_bytes", scale=1e-9, raw=True, zero=True
        ),
    ]
    if any(np.nan_to_num(run.column("exchange_rounds")).max(initial=1) > 1 for run in runs):
        note = "1: every token's slots sufficed. Nothing is dropped in further rounds, but they take time"
        title = "Rounds of the expert exchange"
        figures.append(over_steps(runs, along, title, "mean of the layers", "exchange_rounds", note=note))
    return grid(figures)


def over_steps(
    runs: Sequence[Records],
    along: Along,
    title: str,
    unit: str,
    key: str,
    *,
    scale: float = 1.0,
    raw: bool = False,
    log: bool = False,
    zero: bool = False,
    lines: Sequence[tuple[float, str]] = (),
    marks: Sequence[Mark] = (),
    note: str = "",
) -> str:
    """A chart of one key, a curve for each run: its running mean over the steps, or with `raw` as it is."""
    curves = []
    for index, run in enumerate(runs):
        values = scale * run.column(key)
        if len(values):
            name = run.name if len(runs) > 1 else "last" if raw else "running mean"
            mean = values if raw else smooth(values)
            curves.append(Curve(name, along(run, run.step), mean, index % COLOURS, faint=None if raw else values))
    return chart(title, unit, curves, x_name=along.name, log=log, zero=zero, lines=lines, marks=marks, note=note)


def layers_over_steps(
    runs: Sequence[Records],
    along: Along,
    title: str,
    unit: str,
    values_of: Callable[[Records], tuple[np.ndarray, np.ndarray]],
    *,
    zero: bool = False,
    lines: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> str:
    """A chart of a quantity of the layers: their median, and a band over all of them.

    `values_of`: the steps of a run that have it, [S], and its values, [S, L].
    """
    curves = []
    for index, run in enumerate(runs):
        steps, values_SL = values_of(run)
        if values_SL.size and np.isfinite(values_SL).any():
            good = np.isfinite(values_SL).any(1)
            values_SL, steps = values_SL[good], steps[good]
            name = run.name if len(runs) > 1 else "median of the layers"
            low, high = (how.reduce(values_SL, axis=1) for how in (np.fmin, np.fmax))
            x, colour = along(run, steps), index % COLOURS
            curves.append(thin_band(Curve(name, x, np.nanmedian(values_SL, axis=1), colour, low=low, high=high)))
    note = ". ".join(filter(None, ("Band: from the least to the greatest of all layers", note)))
    return chart(title, unit, curves, x_name=along.name, zero=zero, lines=lines, note=note)


def thin_band(curve: Curve, buckets: int = 220) -> Curve:
    """The curve with at most so many points; its band keeps the extremes."""
    if len(curve.x) <= buckets or curve.low is None or curve.high is None:
        return curve
    counts = reduced(np.ones(len(curve.x)), buckets, np.add)
    x, y = (reduced(values, buckets, np.add) / counts for values in (curve.x, curve.y))
    low, high = reduced(curve.low, buckets, np.fmin), reduced(curve.high, buckets, np.fmax)
    return replace(curve, x=x, y=y, low=low, high=high)


# ------------------------------------------------------------------------------------------------------------ pieces


def grid(figures: Sequence[str]) -> str:
    """The figures side by side; those that are empty are left out."""
    found = "".join(figures)
    return f'<div class="grid">{found}</div>' if found else ""


def _losses_of(run: Records, index: int, along: Along, single: bool) -> list[Curve]:
    loss, found = run.column("loss"), []
    if len(loss):
        name = "training" if single else run.name
        found.append(Curve(name, along(run, run.step), smooth(loss), index % COLOURS, faint=loss))
    steps, valid = validations(run, "valid_loss")
    if len(steps):
        name, colour = ("validation", 1) if single else (f"{run.name}, validation", index % COLOURS)
        found.append(Curve(name, along(run, steps), valid, colour, kind="dots"))
    return found


def validations(run: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps with a validation that the run has kept, and what it gave."""
    found = {int(step): value for step, value in zip(run.step, run.column(key), strict=True) if np.isfinite(value)}
    last = int(run.step[-1]) if len(run.step) else None
    for event in run.of_kind("validation"):
        step, value = event.get("step"), event.get(key)
        if isinstance(step, int) and isinstance(value, int | float) and (last is None or step <= last):
            found.setdefault(step, float(value))
    steps = sorted(found)
    return np.array(steps), np.array([found[step] for step in steps])


def marks_of(run: Records, along: Along) -> list[Mark]:
    """Restarts and faults, where they happened."""
    kinds = {"resumed": "restart", "rolled_back": "restart", "non_finite": "fault", "machine_fault": "fault"}
    kinds |= {"spike": "fault", "damaged": "fault"}
    found = []
    for event in run.of_kind(*kinds):
        step = event.get("step")
        if isinstance(step, int) and len(run.step) and run.step[0] <= step <= run.step[-1]:
            words = f"{run.name}: {event['kind'].replace('_', ' ')} at step {step:,}"
            found.append(Mark(float(along(run, np.array(step))), kinds[event["kind"]], words))
    return found[-MARKS:]


def _phases(run: Records, along: Along) -> list[Span]:
    """The phases of the learning rate, as far as the run has come."""
    tokens = run.column("tokens")
    if run.config is None or not len(run.step) or not np.isfinite(tokens).all():
        return []
    schedule, total = run.config.schedule, schedule_tokens(run.config)
    before = tokens - np.diff(tokens, prepend=0)  # what a step knows of the progress
    first, last = float(run.step[0]), float(run.step[-1])
    start, found = first, []
    if schedule.warmup_steps:
        start = min(float(schedule.warmup_steps), last)
        found.append(Span(first, start, "warm-up"))
    for phase in schedule.learning_rate:
        index = int(np.searchsorted(before, phase.until * total))
        end = float(run.step[index]) if index < len(run.step) else last
        if end > start:
            level = "peak" if phase.value == 1 else f"{phase.value:.2g} of the peak"
            found.append(Span(start, end, level if phase.shape == "constant" else f"{phase.shape} to {level}"))
            start = end
    places = ((along(run, np.array([span.start, span.end])), span.name) for span in found)
    return [Span(float(start), float(end), name) for (start, end), name in places]


def _schedule(run: Records, along: Along) -> str:
    """What changes in the course of the run, as shares of the greatest value."""
    tokens = run.column("tokens")
    values = {
        "learning rate": run.column("learning_rate"),
        "bias update speed": run.column("bias_update_speed"),
        "MTP weight": run.column("mtp_weight"),
        "tokens of a step": np.diff(tokens, prepend=0) if len(tokens) and run.step[0] == 1 else np.zeros(0),
    }
    curves, constant = [], []
    for colour, (name, value) in enumerate(values.items()):
        good = value[np.isfinite(value)]
        most = good.max(initial=0)
        if most > good.min(initial=most):
            x = along(run, run.step)
            curves.append(Curve(name, x, value / most, colour, value=f"at most {short(float(most))}"))
        elif most > 0:
            constant.append(f"{name} {short(float(most))}")
    note = f"Constant: {', '.join(constant)}" if constant else ""
    return chart("Schedule", "share of the greatest value", curves, x_name=along.name, zero=True, note=note)
