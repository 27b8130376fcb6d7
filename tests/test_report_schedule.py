import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from moejax import cli
from moejax.pipeline.schedule import dualpipe, dualpipe_v, named, one_f_one_b
from moejax.pipeline.simulate import Costs, simulate
from moejax.report.schedule import COLOURS, draw_schedule

DUALPIPE_4_8 = """\
dualpipe: 4 stages on 4 ranks, 8 micro-batches

rank 0   FFFfiwfFbb.fBBbb.fBBbbIWIW
rank 1   .FfFfFbbfBBFbbfBBbbBB.iIwW
rank 2   .fFfFfBBFbbfBBFbbBBbb.IiWw
rank 3   fffFIWFfBB.FbbBB.FbbBBiwiw

F forward, B backward, I backward for the input, W backward for the weights; small letters: the other direction

makespan     26, and 26 where sends wait for their partner
bubble       2 on each rank, 7.7% of the time; Table 2: 2
activations  5 on each rank in flight; Table 2: 5
W put off    1 2 2 1 at most
table        19 slots, 13 kinds of transfer; entries: 2 hidden, 5 residual, 2 deferred
"""
COARSE_1F1B = "FF...B.B", "..FBFB.."  # a letter for 2 units of time, which is F


def seen(timeline):
    """A letter for every unit of time of each rank, by the colour that the picture has low in that cell's place."""
    letters = {
        to_rgb(colour): (kind, kind.lower())[up] for kind, pair in COLOURS.items() for up, colour in enumerate(pair)
    }
    letters[1.0, 1.0, 1.0] = "."
    known = np.array(list(letters))
    figure = draw_schedule(timeline)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    lines = []
    for rank in range(timeline.program.num_ranks):
        at = [(unit + 0.4, rank + 0.85) for unit in range(int(timeline.makespan))]
        spots = figure.axes[0].transData.transform(at).astype(int)
        found = pixels[pixels.shape[0] - spots[:, 1], spots[:, 0]]
        nearest = np.abs(found[:, None] - known).max(-1).argmin(-1)
        lines.append("".join(list(letters.values())[index] for index in nearest))
    return lines


def in_units(timeline):
    """The same from the numbers."""
    units = {"F": 1, "B": 2, "I": 1, "W": 1}
    lines = []
    for spans in timeline.spans:
        line = ["."] * int(timeline.makespan)
        for start, end, cell in spans:
            word = "".join((op.kind, op.kind.lower())[op.chunk] * units[op.kind] for op in cell)
            line[int(start) : int(end)] = word
        lines.append("".join(line))
    return lines


def run(*words):
    return cli.main(["schedule", *map(str, words)])


def test_text_of_dualpipe(capsys):
    assert run("--stages", 4, "--microbatches", 8) == 0
    assert capsys.readouterr().out == DUALPIPE_4_8


def test_text_is_in_units_of_the_shortest_cell(capsys):
    assert (
        run("--kind", "one_f_one_b", "--stages", 2, "--microbatches", 2, "--costs", "F=2", "send=2", "I=1.5", "W=0.5")
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert tuple(line.removeprefix(f"rank {rank}   ") for rank, line in enumerate(lines[2:4])) == COARSE_1F1B


@pytest.mark.parametrize(
    "program", [dualpipe(8, 20), dualpipe_v(8, 10), named("zb1p", 4, 6)], ids=lambda program: program.name
)
def test_picture_shows_every_cell_at_its_time(program):
    timeline = simulate(program)
    assert seen(timeline) == in_units(timeline)


def test_picture_numbers_every_op_with_its_microbatch():
    timeline = simulate(dualpipe(4, 8))
    texts = [(text.get_text(), text.get_color()) for text in draw_schedule(timeline).axes[0].texts]
    ops = [op for spans in timeline.spans for span in spans for op in span.cell]
    assert texts == [(str(op.microbatch), ("black", "white")[op.chunk]) for op in ops]


def test_picture_of_a_long_schedule_stays_within_its_width():
    figure = draw_schedule(simulate(one_f_one_b(2, 600)))
    assert figure.get_size_inches()[0] < 62 and not figure.axes[0].texts


def test_png_and_json_are_written(tmp_path, capsys):
    path = tmp_path / "new" / "picture.png"
    assert (
        run("--kind", "zb1p", "--stages", 2, "--microbatches", 3, "--max-deferred-w", 1, "--json", "--png", path) == 0
    )
    assert path.read_bytes().startswith(b"\x89PNG") and list(path.parent.iterdir()) == [path]
    facts = json.loads(capsys.readouterr().out)
    program = named("zb1p", 2, 3, max_deferred_w=1)
    timeline = simulate(program)
    assert facts["makespan"] == facts["executed_makespan"] == timeline.makespan
    assert facts["bubble"] == timeline.bubble.tolist() and facts["deferred_w"] == [1, 1]
    cells = [[tuple(tuple(op.values()) for op in cell["ops"]) for cell in cells] for cells in facts["cells"]]
    assert cells == [[tuple(map(tuple, cell)) for cell in rank] for rank in program.cells]
    assert [cell["end"] for cell in facts["cells"][1]] == [span.end for span in timeline.spans[1]]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--stages 7", "stages=7: wanted an even number; the nearest: 6 or 8"),
        (
            "--microbatches 12",
            "microbatches=12: wanted an even number, at least 2 * stages = 16; the nearest: 16",
        ),
        ("--kind pipedream", "schedule='pipedream': wanted one of gpipe, one_f_one_b, zb1p, dualpipe, dualpipe_v"),
        ("--kind zb1p --max-deferred-w -1", "max_deferred_w=-1: wanted 0 or more"),
        ("--kind zb1p --costs F=x", "costs='F=x': wanted KIND=TIME, as in F=1.5"),
        ("--kind zb1p --stages many", "argument --stages: invalid int value: 'many'"),
        (
            "--kind zb1p --stages 2 --png /proc/none/x.png",
            "FILE='/proc/none': wanted a file that can be read or written",
        ),
        ("dualpipe", "unrecognized arguments: dualpipe"),
        ("--compare --stages 4 --microbatches 3", "microbatches=3: wanted an even number, at least 2 * stages = 8"),
        ("--trace /proc/none/x.json", "FILE='/proc/none/x.json': wanted a file that can be read or written"),
        ("--trace x.json --measured none.json", "FILE='none.json': wanted a file that can be read or written"),
    ],
)
def test_bad_input_is_one_line(words, line, capsys):
    assert run(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("moejax: ") and error.count("\n") == 1 and line in error


def test_costs_of_a_run_are_shown(capsys):
    assert run("--costs", "FB=2.5", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    costs = Costs(FB=2.5)
    assert facts["makespan"] == simulate(dualpipe(8, 20), costs).makespan < facts["executed_makespan"]
    assert facts["bubble_published"] == 3 * (2.5 + 2 - 3)


# ------------------------------------------------------------------------------------------------- comparison and trace

TABLE_2 = {  # of 8 stages and 20 micro-batches with F = I = W = 1: bubble, parameters, activations, ranks
    "gpipe": (21, 1, 20, 8),
    "one_f_one_b": (21, 1, 8, 8),
    "zb1p": (7, 1, 8, 8),
    "dualpipe": (6, 2, 9, 8),
    "dualpipe_v": (6, 2, 9, 4),
}


def test_comparison_is_table_2(capsys):
    assert run("--compare", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    got = {row["name"]: (row["bubble"], row["parameters"], row["activations"], row["ranks"]) for row in rows}
    assert got == TABLE_2
    for row in rows:
        assert (row["bubble"], row["activations"]) == (row["bubble_published"], row["activations_published"])


def test_comparison_is_a_table(capsys):
    assert run("--compare", "--costs", "FB=2.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "(PP/2-1)(F&B+B-3W)" in lines[4] and " 4.5 " in lines[4]


def test_trace_has_every_op_at_its_time(tmp_path, capsys):
    path = tmp_path / "trace.json"
    assert run("--stages", 4, "--microbatches", 8, "--trace", path) == 0
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["dualpipe, simulated", "rank 0", "rank 1", "rank 2", "rank 3"]
    boxes = [event for event in events if event["ph"] == "X"]
    program = dualpipe(4, 8)
    ops = [(rank, str(op)) for rank, cells in enumerate(program.cells) for cell in cells for op in cell]
    assert [(box["tid"], box["name"]) for box in boxes] == ops
    assert max(box["ts"] + box["dur"] for box in boxes) == 26_000  # a unit is a millisecond
    busy = {rank: sum(box["dur"] for box in boxes if box["tid"] == rank) for rank in range(4)}
    assert busy == dict.fromkeys(range(4), 24_000)
    assert boxes[-1]["args"] == {"stage": 0, "chunk": 1, "microbatch": 3}


def test_measured_times_stand_beside_the_simulated(tmp_path, capsys):
    measured, path = tmp_path / "measured.json", tmp_path / "trace.json"
    assert run("--kind", "zb1p", "--stages", 2, "--microbatches", 3, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    for cell in (cell for rank in facts["cells"] for cell in rank):
        cell["start"], cell["end"] = 2 * cell["start"], 2 * cell["end"]
    measured.write_text(json.dumps(facts))
    assert run("--kind", "zb1p", "--stages", 2, "--microbatches", 3, "--trace", path, "--measured", measured) == 0
    boxes = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    first, second = ([box for box in boxes if box["pid"] == process] for process in (0, 1))
    assert [box["name"] for box in first] == [box["name"] for box in second]
    assert [2 * box["ts"] for box in first] == [box["ts"] for box in second]


@pytest.mark.parametrize("text", ["{", "{}", '{"cells": [[{"start": 0, "end": 1}]]}'], ids=["broken", "empty", "other"])
def test_measured_times_of_something_else_are_refused(text, tmp_path, capsys):
    measured = tmp_path / "measured.json"
    measured.write_text(text)
    assert run("--trace", tmp_path / "trace.json", "--measured", measured) == 2
    assert "--measured=" in capsys.readouterr().err
