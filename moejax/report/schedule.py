"""A pipeline schedule as the DeepSeek-V3 report's Figure 5 draws it, in text and as a picture, with what it costs.

Time runs to the right and every rank has a row. A joined pair is a forward and a backward without a gap; the picture
puts one frame around them. Chunk 0 (down, to higher ranks) is pale with dark numbers, or a capital letter; chunk 1 (up)
is dark with white numbers, or a small letter. Numbers are micro-batches, each chunk's from 0.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from rich.text import Text

from moejax.pipeline.replay import execute
from moejax.pipeline.schedule import Op
from moejax.pipeline.simulate import (
    Costs,
    Span,
    Timeline,
    activations,
    deferred_w,
    published_activations,
    published_bubble,
)
from moejax.pipeline.table import Table

NAMES = {"F": "forward", "B": "backward", "I": "backward for the input", "W": "backward for the weights"}
COLOURS = {  # of chunk 0 and of chunk 1
    "F": ("#f7b84b", "#b0610d"),
    "B": ("#86d45f", "#2f7a24"),
    "I": ("#cdf0b8", "#63a556"),
    "W": ("#86c2fa", "#2b62a8"),
}
TERMINAL = {"F": "yellow", "B": "green", "I": "cyan", "W": "blue", ".": "bright_black"}
WIDEST = 60.0  # inches


def describe(table: Table, timeline: Timeline, costs: Costs) -> dict[str, Any]:
    """What the schedule costs, for JSON: times in the unit of `costs`, lists by rank.

    `executed_makespan` is the time of the table if every send waits for its partner.
    """
    program = table.program
    return {
        "name": program.name,
        "stages": program.num_stages,
        "ranks": program.num_ranks,
        "microbatches": program.num_microbatches,
        "makespan": timeline.makespan,
        "executed_makespan": execute(table, costs).makespan,
        "bubble": timeline.bubble.tolist(),
        "bubble_published": published_bubble(program.name, program.num_stages, costs),
        "activations": activations(program).tolist(),
        "activations_published": published_activations(program.name, program.num_stages, program.num_microbatches),
        "deferred_w": deferred_w(program).tolist(),
        "slots": table.num_slots,
        "transfers": len(table.transfers),
        "pools": {"hidden": table.num_hidden, "residual": table.num_residual, "deferred": table.num_deferred},
        "cells": [
            [{"start": start, "end": end, "ops": [op._asdict() for op in cell]} for start, end, cell in spans]
            for spans in timeline.spans
        ],
    }


def as_text(facts: dict[str, Any], timeline: Timeline) -> Text:
    """One line per rank, a letter for as much time as the shortest cell takes; the facts of `describe` below it."""
    text = Text(f"{facts['name']}: {facts['stages']} stages on {facts['ranks']} ranks, ")
    text.append(f"{facts['microbatches']} micro-batches\n\n")
    unit = _shortest(timeline)
    for rank, spans in enumerate(timeline.spans):
        text.append(f"rank {rank:<3} ")
        for letter in _letters(spans, timeline.makespan, unit):
            text.append(letter, style=TERMINAL[letter.upper()])
        text.append("\n")
    text.append("\n" + ", ".join(f"{kind} {name}" for kind, name in NAMES.items()))
    text.append("; small letters: the other direction\n\n")
    share = max(facts["bubble"]) / facts["makespan"]
    pools = ", ".join(f"{number} {name}" for name, number in facts["pools"].items())
    for name, value in (
        ("makespan", f"{facts['makespan']:g}, and {facts['executed_makespan']:g} where sends wait for their partner"),
        ("bubble", f"{_each(facts['bubble'])}, {share:.1%} of the time; Table 2: {facts['bubble_published']:g}"),
        ("activations", f"{_each(facts['activations'])} in flight; Table 2: {facts['activations_published']}"),
        ("W put off", f"{_each(facts['deferred_w'])} at most"),
        ("table", f"{facts['slots']} slots, {facts['transfers']} kinds of transfer; entries: {pools}"),
    ):
        text.append(f"{name:<12} {value}\n")
    return text


def draw_schedule(timeline: Timeline) -> Figure:
    """The picture; numbers are left out where cells are too narrow for them."""
    program, makespan = timeline.program, timeline.makespan
    shortest = _shortest(timeline)
    scale = min(0.23 / shortest, WIDEST / makespan)  # inches per unit of time
    width, height = scale * makespan, 0.34 * program.num_ranks
    figure = Figure(figsize=(max(width + 0.8, 10), height + 1.3))
    inches = np.array([*figure.get_size_inches()] * 2)
    axes = figure.add_axes(tuple(np.array([0.7, 1.0, width, height]) / inches))
    _draw_cells(axes, timeline)
    digits = len(str(program.microbatches_per_chunk - 1))
    size = min(9.0, 72 * scale * shortest / (0.75 * digits))  # points
    if size >= 4:
        _draw_numbers(axes, timeline, size)
    title = f"{program.name}: {program.num_stages} stages, {program.num_microbatches} micro-batches"
    axes.set_title(f"{title}; makespan {makespan:g}, bubble {_each(timeline.bubble.tolist())}", fontsize=10, loc="left")
    axes.set(xlim=(0, makespan), ylim=(program.num_ranks, 0), xlabel="time")
    axes.set_yticks(np.arange(program.num_ranks) + 0.5, [f"rank {rank}" for rank in range(program.num_ranks)])
    axes.tick_params(length=0)
    figure.legend(handles=_legend(timeline), ncols=6, frameon=False, fontsize=8, loc="lower left")
    return figure


def save_schedule(timeline: Timeline, path: str | Path) -> None:
    """Writes the picture; the file is replaced as a whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.part.png")
    FigureCanvasAgg(draw_schedule(timeline)).print_figure(part, dpi=110)
    os.replace(part, path)


# ------------------------------------------------------------------------------------------------------------ pieces


def _shortest(timeline: Timeline) -> float:
    return min(end - start for spans in timeline.spans for start, end, _ in spans)


def pieces(span: Span) -> list[tuple[Op, float, float]]:
    """The ops of a cell with their start and end; the two of a joined pair share its time as 1 to 2."""
    start, end, cell = span
    if len(cell) == 1:
        return [(cell[0], start, end)]
    middle = start + (end - start) / 3
    return [(cell[0], start, middle), (cell[1], middle, end)]


def _letters(spans: tuple[Span, ...], makespan: float, unit: float) -> str:
    letters = ["."] * round(makespan / unit)
    for op, start, end in (piece for span in spans for piece in pieces(span)):
        letter = op.kind if op.chunk == 0 else op.kind.lower()
        for at in range(round(start / unit), min(round(end / unit), len(letters))):
            letters[at] = letter
    return "".join(letters)


def _draw_cells(axes: Axes, timeline: Timeline) -> None:
    boxes, colours, lines, frames = [], [], [], []
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            joined = len(span.cell) == 2
            for op, start, end in pieces(span):
                boxes.append(Rectangle((start, rank), end - start, 1))
                colours.append(COLOURS[op.kind][op.chunk])
                lines.append(0 if joined else 0.4)
            if joined:
                frames.append(Rectangle((span.start, rank), span.end - span.start, 1))
    axes.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors="black", linewidths=lines))
    axes.add_collection(PatchCollection(frames, facecolors="none", edgecolors="black", linewidths=1.3))


def _draw_numbers(axes: Axes, timeline: Timeline, size: float) -> None:
    for rank, spans in enumerate(timeline.spans):
        for op, start, end in (piece for span in spans for piece in pieces(span)):
            colour = ("black", "white")[op.chunk]
            at = (start + end) / 2, rank + 0.5, str(op.microbatch)
            axes.text(*at, ha="center", va="center_baseline", color=colour, fontsize=size)


def _legend(timeline: Timeline) -> list[Patch]:
    kinds = {op.kind for spans in timeline.spans for span in spans for op in span.cell}
    shown = [(colours[0], NAMES[kind], 0.4) for kind, colours in COLOURS.items() if kind in kinds]
    if timeline.program.num_chunks == 2:
        shown += [(COLOURS["F"][1], "dark: chunk 1, on its way up", 0.4), ("white", "joined forward and backward", 1.3)]
    return [Patch(facecolor=face, edgecolor="black", linewidth=line, label=label) for face, label, line in shown]


def _each(values: Sequence[float]) -> str:
    """One number where all ranks have the same, or the number of each rank."""
    return f"{values[0]:g} on each rank" if len(set(values)) == 1 else " ".join(f"{value:g}" for value in values)
