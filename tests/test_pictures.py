import json
import math

import numpy as np
import pytest
from PIL import Image

from moejax.report import pictures
from moejax.report.pictures import draw_expert_load, draw_losses, draw_pictures, read_lines

NAMES = {"losses.png", "expert_load.png", "speed.png", "training.png"}


def metrics(step):
    line = {"step": step, "loss": 2 + 3 / step, "mtp_loss": 3 + 3 / step, "grad_norm": 1.0, "learning_rate": 1e-3}
    line |= {"tokens_per_second": 1e4, "mfu": 0.2, "data_wait": 0.001, "max_violation": [1 / step, 2 / step]}
    return line | ({"valid_loss": 2.5} if step % 10 == 0 else {})


def write_run(folder, steps, *, tail=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps) + tail)
    (folder / "events.jsonl").write_text('{"kind": "started", "unigram_loss": 3.1}\n')
    (folder / "expert_load.jsonl").write_text('{"step": 1, "load": [[0.5, 1.5], [1.0, 1.0]]}\n')


@pytest.mark.parametrize(
    "steps",
    [
        [metrics(1)],
        [metrics(step) for step in range(1, 41)],
        [metrics(1), metrics(2) | {"loss": None, "grad_norm": None, "max_violation": [None, 1.0]}, metrics(3)],
        [{"step": 1, "loss": 3.0, "grad_norm": 1.0, "learning_rate": 1e-3, "max_violation": []}],
    ],
    ids=["one step", "many steps", "not finite", "no experts, few keys"],
)
def test_pictures_are_drawn(steps, tmp_path):
    write_run(tmp_path, steps)
    assert {path.name for path in draw_pictures(tmp_path)} == NAMES
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == NAMES  # no part is left behind
    for name in NAMES:
        with Image.open(tmp_path / "pictures" / name) as image:
            assert image.width >= 900 and len(np.unique(np.asarray(image))) > 10


def test_losses_show_the_validation_at_the_end(tmp_path, monkeypatch):
    """It comes after the last step's line of metrics, and is an event alone."""
    write_run(tmp_path, [metrics(step) for step in range(1, 16)])
    with (tmp_path / "events.jsonl").open("a") as events:
        events.write('{"kind": "validation", "step": 10, "valid_loss": 9.0}\n{"kind": "validation", "step": 13}\n')
        events.write('{"kind": "validation", "step": 15, "valid_loss": 2.25}\n{"kind": "finished", "step": 15}\n')
    drawn = {}
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.setdefault(path.stem, figure))
    draw_pictures(tmp_path)
    (valid,) = (line for line in drawn["losses"].axes[0].get_lines() if str(line.get_label()).startswith("valid"))
    np.testing.assert_array_equal(valid.get_xydata(), [(10, 2.5), (15, 2.25)])


def test_line_that_is_cut_off_is_left_out(tmp_path):
    write_run(tmp_path, [metrics(1), metrics(2)], tail='{"step": 3, "lo')
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert len(draw_pictures(tmp_path)) == 4


def test_run_without_a_step_has_no_pictures(tmp_path):
    assert draw_pictures(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    assert draw_pictures(tmp_path) == []


def test_losses_show_every_curve_and_its_last_value():
    axes = draw_losses([metrics(step) for step in range(1, 41)], unigram=3.1).axes[0]
    shown = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"validation, last 2.500", "unigram model, 3.100"} <= shown
    assert {name.split(",")[0] for name in shown} == {"training", "MTP", "validation", "unigram model"}
    training = next(line for line in axes.get_lines() if str(line.get_label()).startswith("training"))
    # 40 steps are averaged over 5, and the last point over the 3 that there are
    last, fifth = (38, 39, 40), (3, 4, 5, 6, 7)
    wanted = [2 + np.mean([3 / step for step in steps]) for steps in (fifth, last)]
    np.testing.assert_allclose(np.asarray(training.get_ydata())[[4, -1]], wanted)


def test_expert_load_shows_the_loads_as_they_are():
    load = [[0.5, 1.5, 1.0], [3.0, 0.0, 0.0]]
    left, right = draw_expert_load([metrics(1), metrics(2)], {"step": 7, "load": load}).axes[:2]
    np.testing.assert_array_equal(left.images[0].get_array(), load)
    assert "step 7" in left.get_title()
    np.testing.assert_array_equal([line.get_ydata() for line in right.get_lines()], [[1.0, 0.5], [2.0, 1.0]])
    assert math.isclose(left.images[0].norm(1.0), 0.5)  # the mean is the middle of the colours
