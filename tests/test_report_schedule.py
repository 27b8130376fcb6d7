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
    assert run("dualpipe", "--stages", 4, "--microbatches", 8) == 0
    assert capsys.readouterr().out == DUALPIPE_4_8


def test_text_is_in_units_of_the_shortest_cell(capsys):
    assert run("one_f_one_b", "--stages", 2, "--microbatches", 2, "--costs", "F=2", "send=2", "I=1.5", "W=0.5") == 0
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
    assert run("zb1p", "--stages", 2, "--microbatches", 3, "--max-deferred-w", 1, "--json", "--png", path) == 0
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
        ("dualpipe --stages 7", "stages=7: wanted an even number; the nearest: 6 or 8"),
        (
            "dualpipe --microbatches 12",
            "microbatches=12: wanted an even number, at least 2 * stages = 16; the nearest: 16",
        ),
        ("pipedream", "schedule='pipedream': wanted one of gpipe, one_f_one_b, zb1p, dualpipe, dualpipe_v"),
        ("zb1p --max-deferred-w -1", "max_deferred_w=-1: wanted 0 or more"),
        ("zb1p --costs F=x", "costs='F=x': wanted KIND=TIME, as in F=1.5"),
        ("zb1p --stages many", "argument --stages: invalid int value: 'many'"),
        ("zb1p --stages 2 --png /proc/none/x.png", "--png='/proc/none/x.png': wanted a file that can be written"),
        ("", "the following arguments are required: NAME"),
    ],
)
def test_bad_input_is_one_line(words, line, capsys):
    assert run(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("moejax: ") and error.count("\n") == 1 and line in error


def test_costs_of_a_run_are_shown(capsys):
    assert run("dualpipe", "--costs", "FB=2.5", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    costs = Costs(FB=2.5)
    assert facts["makespan"] == simulate(dualpipe(8, 20), costs).makespan < facts["executed_makespan"]
    assert facts["bubble_published"] == 3 * (2.5 + 2 - 3)
