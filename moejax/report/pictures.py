"""Pictures of a run, drawn from its metrics.jsonl, expert_load.jsonl and events.jsonl; also while it runs.

pictures/losses.png       training, validation and MTP loss, beside what a unigram model of the text reaches
pictures/expert_load.png  tokens of every expert, and how far each layer is from balance over the run
pictures/speed.png        tokens/s, share of the peak, and the wait for data
pictures/training.png     learning rate and gradient norm
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from moejax.report.axes import smooth

BLUE, ORANGE, GREEN, RED, GREY = "#2563a8", "#d9730d", "#2e8540", "#b3261e", "#6b7280"


def draw_pictures(run_folder: str | Path) -> list[Path]:
    """Draws all pictures of the run and returns their paths; none where there is no whole line of metrics yet.

    A last line that is still being written is left out. Each file is replaced as a whole.
    """
    folder = Path(run_folder)
    steps = read_lines(folder / "metrics.jsonl")
    if not steps:
        return []
    events, loads = read_lines(folder / "events.jsonl"), read_lines(folder / "expert_load.jsonl")
    unigram = next((event["unigram_loss"] for event in events if event.get("unigram_loss") is not None), None)
    figures = {
        "losses": draw_losses(_with_validations(steps, events), unigram),
        "speed": draw_speed(steps),
        "training": draw_training(steps),
    }
    if loads and loads[-1]["load"]:
        figures["expert_load"] = draw_expert_load(steps, loads[-1])
    return [_save(figure, folder / "pictures" / f"{name}.png") for name, figure in figures.items()]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, without a last line that is cut off; none where the file is missing."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


# ----------------------------------------------------------------------------------------------------------- figures


def draw_losses(steps: list[dict[str, Any]], unigram: float | None) -> Figure:
    """Losses in nats per token over the steps. `unigram`: entropy of the text's single tokens, nats per token."""
    figure, (axes,) = _figure(1, "Loss", height=5)
    for key, name, colour in (("mtp_loss", "MTP", GREEN), ("loss", "training", BLUE)):
        _curve(axes, steps, key, name, colour)
    at, valid = _series(steps, "valid_loss")
    if len(at):
        axes.plot(at, valid, "o-", color=ORANGE, markersize=5, label=f"validation, last {valid[-1]:.3f}", zorder=4)
    if unigram is not None:
        axes.axhline(unigram, color=GREY, linestyle="--", linewidth=1.2, label=f"unigram model, {unigram:.3f}")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False)
    return figure


def draw_expert_load(steps: list[dict[str, Any]], latest: dict[str, Any]) -> Figure:
    """Left: load of each expert of each MoE layer, 1 is the mean. Right: maximal violation of each layer."""
    load_LE = np.array(latest["load"], np.float64)
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    image = left.imshow(load_LE, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    figure.colorbar(image, ax=left, label="tokens of the expert / mean of its layer", extend="max")
    left.set(title=f"Expert load at step {latest['step']}", xlabel="expert", ylabel="MoE layer")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(_whole_numbers())
    at, violation_SL = _series(steps, "max_violation")
    for layer, colour in enumerate(colormaps["viridis"](np.linspace(0, 0.9, violation_SL.shape[1]))):
        right.plot(at, smooth(violation_SL[:, layer]), color=colour, linewidth=1.3, label=f"layer {layer}")
    _axes_style(right)
    right.set(title="Violation of balance", ylabel="(fullest expert - mean) / mean", xlabel="step", ylim=(0, None))
    if 1 <= violation_SL.shape[1] <= 12:
        right.legend(frameon=False, ncols=2)
    return figure


def draw_speed(steps: list[dict[str, Any]]) -> Figure:
    """Tokens per second, MFU in percent, and the wait for data in milliseconds."""
    figure, axes = _figure(3, "Speed")
    rows = (
        ("tokens_per_second", "tokens/s", BLUE, 1.0),
        ("mfu", "MFU, %", GREEN, 100.0),
        ("data_wait", "wait for data, ms", RED, 1e3),
    )
    for panel, (key, label, colour, scale) in zip(axes, rows, strict=True):
        values = _curve(panel, steps, key, None, colour, scale)
        panel.set_ylabel(label)
        usual = values[np.isfinite(values)][1 if len(values) > 1 else 0 :]  # the first step compiles
        if len(usual) and usual.max() > 0:
            panel.set_ylim(0, 1.15 * np.quantile(usual, 0.99))
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure


def draw_training(steps: list[dict[str, Any]]) -> Figure:
    """Learning rate, and gradient norm on a logarithmic axis."""
    figure, (rate, norm) = _figure(2, "Training")
    rate.plot(*_series(steps, "learning_rate"), color=BLUE, linewidth=1.8)
    rate.set(ylabel="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _curve(norm, steps, "grad_norm", None, ORANGE)
    norm.set(ylabel="gradient norm", yscale="log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norm.yaxis.set_minor_locator(NullLocator())
    norm.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


# ------------------------------------------------------------------------------------------------------------ pieces


def _figure(rows: int, title: str, height: float = 0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height or 2.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for panel in axes:
        _axes_style(panel)
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    figure.align_ylabels(axes)
    return figure, axes


def _axes_style(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(_whole_numbers())


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _with_validations(steps: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the steps with what was measured after them: the validation at the end has an event alone."""
    after = {event["step"]: event["valid_loss"] for event in events if event.get("valid_loss") is not None}
    return [{"valid_loss": after.get(line["step"]), **line} for line in steps]


def _series(steps: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that have a value of `key`, and the values; NaN in a list where it was not finite."""
    pairs = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], np.float64)


def _curve(
    axes: Axes, steps: list[dict[str, Any]], key: str, name: str | None, colour: str, scale: float = 1.0
) -> np.ndarray:
    """Draws the values faintly and their running mean on top; returns the values."""
    at, values = _series(steps, key)
    values = values * scale
    if len(at):
        marker = "o" if len(at) == 1 else None
        mean = smooth(values)
        axes.plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
        label = f"{name}, last {mean[-1]:.3f}" if name else None
        axes.plot(at, mean, color=colour, linewidth=1.8, marker=marker, label=label)
    return values


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.part.png")
    FigureCanvasAgg(figure).print_figure(part, dpi=110)
    os.replace(part, path)
    return path
