"""A plan as a picture: what each rank of the pipeline holds, what it does, and where the time of a step goes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GB = 1e9
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#bab0ac")
IDLE = "#d5d5d5"


def draw_plan(
    title: str,
    bytes_by_part: Mapping[str, Sequence[float]],
    memory: float,
    seconds_by_part: Mapping[str, float],
    busy: Sequence[float],
    bubble: Sequence[float],
) -> Figure:
    """The picture.

    Args:
        title: of the whole.
        bytes_by_part: of a device of each pipeline rank, by part.
        memory: bytes of a device.
        seconds_by_part: of a step, the mean of the ranks.
        busy: seconds of each rank's cells.
        bubble: seconds that each rank waits for others.
    """
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 0.8, 1.1))
    _draw_memory(left, bytes_by_part, memory)
    _draw_ranks(middle, busy, bubble)
    _draw_time(right, seconds_by_part)
    return figure


def save_plan(figure: Figure, path: Path) -> None:
    """Writes the picture; the file is replaced as a whole."""
    part = path.with_name(f"{path.stem}.part.png")
    FigureCanvasAgg(figure).print_figure(part, dpi=110)
    part.replace(path)


def _draw_memory(axes: Axes, bytes_by_part: Mapping[str, Sequence[float]], memory: float) -> None:
    ranks = np.arange(len(next(iter(bytes_by_part.values()))))
    below = np.zeros(len(ranks))
    for index, (name, sizes) in enumerate(bytes_by_part.items()):
        heights = np.asarray(sizes) / GB
        hatch = "//" if index >= len(COLOURS) else None
        axes.bar(ranks, heights, bottom=below, label=name, color=COLOURS[index % len(COLOURS)], hatch=hatch, width=0.85)
        below += heights
    axes.axhline(memory / GB, color="black", linewidth=1.2, linestyle="--", label="the device's memory")
    axes.set(xlabel="rank of the pipeline", ylabel="GB", ylim=(0, 1.05 * max(memory / GB, below.max())), xticks=ranks)
    axes.set_title(f"Memory of a device: at most {below.max():.1f} of {memory / GB:.1f} GB", loc="left", fontsize=10)
    axes.legend(fontsize=7.5, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)


def _draw_ranks(axes: Axes, busy: Sequence[float], bubble: Sequence[float]) -> None:
    ranks = np.arange(len(busy))
    axes.bar(ranks, busy, color=COLOURS[0], label="cells", width=0.85)
    axes.bar(ranks, bubble, bottom=busy, color=IDLE, label="bubble", width=0.85)
    axes.set(xlabel="rank of the pipeline", ylabel="seconds", xticks=ranks)
    axes.set_title(f"The pipeline of a step: {busy[0] + bubble[0]:.2f} s", loc="left", fontsize=10)
    axes.legend(fontsize=7.5, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)


def _draw_time(axes: Axes, seconds_by_part: Mapping[str, float]) -> None:
    step = sum(seconds_by_part.values())
    shown = sorted((seconds, name) for name, seconds in seconds_by_part.items() if seconds >= 0.002 * step)
    places = np.arange(len(shown))
    colours = [IDLE if name == "bubble" or "exposed" in name else COLOURS[0] for _, name in shown]
    axes.barh(places, [seconds for seconds, _ in shown], color=colours)
    for place, (seconds, _) in zip(places, shown, strict=True):
        axes.text(seconds, float(place), f" {seconds:.2f} s, {seconds / step:.1%}", va="center", fontsize=7.5)
    axes.set_yticks(places, [name for _, name in shown], fontsize=8)
    axes.set(xlabel="seconds, mean of the ranks", xlim=(0, 1.3 * shown[-1][0]))
    axes.set_title(f"A step: {step:.2f} s", loc="left", fontsize=10)
