"""The plan as a whole: the function, the command, the picture."""

import dataclasses
import json

import pytest
from rich.console import Console

import moejax
from moejax import cli
from moejax.config import ConfigError
from moejax.plan import compile as compiled
from moejax.plan.compile import CompiledStep, Sites
from moejax.plan.overlap import Flight
from moejax.plan.plan import as_json, as_table
from moejax.report.plan import draw_plan


@pytest.fixture
def piped(run_config, change):
    config = change(change(run_config, "mesh.pipe", 2), "data.batch_size", 8)
    return dataclasses.replace(change(config, "mesh.data", 1), precision="bf16")


@pytest.fixture
def path(piped, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(piped.to_json())
    return path


def run(*words):
    return cli.main(["plan", *map(str, words)])


def test_plan_from_python(piped):
    made = moejax.plan(piped, "h200")
    assert isinstance(made, moejax.Plan) and made.fits and not made.notes
    assert list(made.bytes_by_rank) == [0, 1] and made.timing.devices == 2
    assert sum(made.bytes_by_rank.values()) == sum(part.bytes for part in made.memory)
    assert made.cost.steps == 6 and made.cost.tokens == 6 * 8 * 32
    assert json.loads(json.dumps(as_json(made)))["step_seconds"] == made.timing.step


def test_what_does_not_fit_is_said(piped):
    made = moejax.plan(piped, dataclasses.replace(moejax.plan(piped).hardware, memory=1e5))
    assert not made.fits
    assert made.notes[0].startswith("does not fit: a device of rank")
    console = Console(width=150)
    with console.capture() as shown:
        console.print(as_table(made))
    assert made.notes[0][:40] in shown.get() and "per trillion tokens" in shown.get()


def test_a_model_without_experts_has_a_plan(run_config, change):
    dense = change(change(run_config, "model.num_dense_layers", 3), "mesh.data", 2)
    made = moejax.plan(dense)
    assert made.fits and made.timing.parts.total() == pytest.approx(made.timing.step, rel=1e-9)
    assert "routed experts" not in made.timing.parts and list(made.timing.cells) == [
        "forward and backward",
        "bubble",
        "outside",
    ]


def test_a_ramp_that_would_not_start_is_said(piped, change):
    schedule = dataclasses.replace(piped.schedule, ramp_start=2, ramp_increment=2, tokens=20_000.0, ramp_until=0.5)
    made = moejax.plan(
        dataclasses.replace(
            piped, schedule=schedule, steps=None, pipeline=change(piped, "pipeline.microbatches", 4).pipeline
        )
    )
    assert any(note.startswith("the run would not start: schedule.ramp_start=2") for note in made.notes)


def test_command_writes_json_and_picture(path, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(path, "--hardware", "h200", "--out", out, "--model.remat", "full") == 0
    shown = capsys.readouterr().out
    facts = json.loads((out / "plan.json").read_text())
    assert facts["remat"] == "full" and facts["hardware"]["name"] == "H200" and facts["fits"]
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in out.iterdir()) == ["plan.json", "plan.png"]
    assert "2 H200: pipe 2" in shown and f"{facts['step_seconds']:.3f}" in shown


def test_json_on_the_console_is_what_is_written(path, tmp_path, capsys):
    assert run(path, "--out", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "plan.json").read_text())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--hardware tpu", "hardware='tpu': wanted one of b200, h100, h200, h800, or a JSON file"),
        ("--mesh.expert 3", "model.moe.num_experts=8: wanted a multiple of mesh.expert=3"),
        ("--pipeline.microbatches 2", "pipeline.microbatches=2: wanted an even number, at least 2 * stages = 4"),
        ("--mesh.data -1 --search", "--devices=None: wanted how many there are"),
        ("--target tpu", "argument --target: invalid choice: 'tpu'"),
        ("--out /proc/none", "--out='/proc/none': wanted a folder that can be written"),
    ],
)
def test_bad_input_is_one_line(words, line, path, capsys):
    assert run(path, *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("moejax: ") and error.count("\n") == 1 and line in error


def test_without_a_config_one_line_says_so(capsys):
    assert run() == run("--mesh.pipe", 2) == 2
    missing, late = capsys.readouterr().err.splitlines()
    assert "the following arguments are required: CONFIG" in missing
    assert late == "moejax: CONFIG='--mesh.pipe': wanted a config first: moejax plan CONFIG [--any.field value ...]"


def test_devices_that_the_mesh_does_not_fill(piped):
    with pytest.raises(ConfigError, match=r"to be the 3 devices there are"):
        moejax.plan(piped, "h200", devices=3)


def test_picture_has_every_rank_and_part():
    figure = draw_plan("t", {"weights": [1e9, 2e9], "rest": [3e9, 1e9]}, 8e9, {"bubble": 1.0, "w": 3.0}, [3, 2], [1, 2])
    memory, ranks, time = figure.axes
    tops = [bar.get_y() + bar.get_height() for bar in memory.patches]
    assert tops == [1, 2, 4, 3]
    assert [bar.get_y() + bar.get_height() for bar in ranks.patches] == [3, 2, 4, 4]
    assert [bar.get_width() for bar in time.patches] == [1, 3]
    assert [label.get_text() for label in time.get_yticklabels()] == ["bubble", "w"]
    assert memory.get_title(loc="left") == "Memory of a device: at most 4.0 of 8.0 GB"


def test_compiled_step_is_shown_beside_the_plan(path, tmp_path, capsys, monkeypatch):
    sites = (Sites("pipe", "collective-permute", 13, 2_000_000),)
    flight = Flight("all-to-all", "F", "body", 8, {"B": 5}, sync=False)
    step = CompiledStep("h200", 2, "pipe 2", 1.0, 2.0, 3.0, 4_000_000_000, 5_000_000_000, 6e12, sites, (flight,))
    asked = []
    monkeypatch.setattr(compiled, "compile_step", lambda config, target: asked.append((config, target)) or step)
    assert run(path, "--compile", "--target", "h200", "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "plan.json").read_text())["compiled"]
    ((config, target),) = asked
    assert target == "h200" and config.mesh.pipe == 2 and config.pipeline.microbatches == 4
    assert found["argument_bytes"] == 4_000_000_000 and found["states"] == {"hidden": 1} and "flights" not in found
    assert "compiled for 2 h200 devices in 6 s: 4.00 GB given, 5.00 GB temporary; 6.000 TFLOP" in shown
    assert "products of the other micro-batch: 1 hidden" in shown
    row = next(line.split() for line in shown.splitlines() if "collective-permute" in line)
    assert row == ["pipe", "collective-permute", "13", "2.000"]
