"""Pipeline schedules side by side: Table 2 of the DeepSeek-V3 report, by the simulator and by its formulas."""

from typing import Any

from rich.table import Table

from moejax.pipeline.schedule import SCHEDULES, named
from moejax.pipeline.simulate import (
    Costs,
    activations,
    deferred_w,
    published_activations,
    published_bubble,
    simulate,
)

FORMULAS = {
    "gpipe": "(PP-1)(F+B)",
    "one_f_one_b": "(PP-1)(F+B)",
    "zb1p": "(PP-1)(F+B-2W)",
    "dualpipe": "(PP/2-1)(F&B+B-3W)",
    "dualpipe_v": "(PP/2-1)(F&B+B-3W)",
}


def compare(stages: int, microbatches: int, costs: Costs, max_deferred_w: int | None = None) -> list[dict[str, Any]]:
    """What each schedule costs for the same stages and micro-batches; times in the unit of `costs`.

    `bubble` and `activations` are the largest of the ranks, `parameters` stages that a rank has the parameters of.
    """
    rows = []
    for name in SCHEDULES:
        program = named(name, stages, microbatches, max_deferred_w=max_deferred_w)
        timeline = simulate(program, costs)
        rows.append(
            {
                "name": name,
                "ranks": program.num_ranks,
                "makespan": timeline.makespan,
                "bubble": float(timeline.bubble.max()),
                "bubble_published": published_bubble(name, stages, costs),
                "formula": FORMULAS[name],
                "parameters": program.num_chunks,
                "activations": int(activations(program).max()),
                "activations_published": published_activations(name, stages, microbatches),
                "deferred_w": int(deferred_w(program).max()),
            }
        )
    return rows


def as_table(rows: list[dict[str, Any]]) -> Table:
    """The rows for the console."""
    table = Table(box=None)
    table.add_column("schedule", no_wrap=True)
    for heading in (
        "ranks",
        "time",
        "bubble",
        "Table 2",
        "formula",
        "parameters",
        "activations",
        "Table 2",
        "W put off",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            str(row["ranks"]),
            f"{row['makespan']:g}",
            f"{row['bubble']:g}",
            f"{row['bubble_published']:g}",
            row["formula"],
            f"{row['parameters']}x",
            str(row["activations"]),
            str(row["activations_published"]),
            str(row["deferred_w"]),
        )
    return table
