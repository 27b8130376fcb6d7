"""What a run and its results show in a notebook. A real kernel is driven where the extra `notebooks` is installed."""

import dataclasses
import importlib.util
import logging
import os
import sys
from types import SimpleNamespace

import pytest

import moejax
from moejax.config import ConfigError
from moejax.train.console import StepLines, logger
from moejax.train.guard import SpikeError
from moejax.train.notebook import CellHandler, in_notebook

PNG = b"\x89PNG\r\n\x1a\n"
RESULT = "moejax.RunResult(pathlib.Path('runs/<x>'), 'stopped', 3, 1200, 2.5, None)"


class Output:
    """An output of a cell: what is shown in it now."""

    def __init__(self, data):
        self.data = data

    def update(self, data, **options):
        self.data = data


@pytest.fixture
def cell(monkeypatch):
    """The outputs of the cell that runs, in their order."""
    outputs = []

    def display(data, *, raw, display_id, metadata=None):
        outputs.append(Output(data))
        return outputs[-1]

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    return outputs


@pytest.fixture
def handler(cell):
    handler = CellHandler(total_steps=4)
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.propagate = before


def text(output):
    return output.data["text/plain"].splitlines()


def test_line_of_a_step_gives_way_to_the_next_and_others_stay(cell, handler):
    lines = StepLines(total_steps=4, seconds=0)
    logger.info("two <experts>")
    for step in (1, 2):
        handler.progress(step, lines.show({"step": step, "loss": 3.0, "step_time": 1.0}))
    lines.show({"step": 3, "loss": 2.5, "step_time": 1.0, "valid_loss": 2.75})
    logger.warning("a spike")
    assert len(cell) == 1
    shown = [line.split("  ")[:2] for line in text(cell[0])[1:]]
    assert shown == [["two <experts>"], ["step 3/4", "loss 2.5000"], ["warning: a spike"], ["step 2/4", "loss 3.0000"]]
    assert "two &lt;experts&gt;" in cell[0].data["text/html"]
    handler.close()
    assert [line.split("  ")[0] for line in text(cell[0])[1:]] == ["two <experts>", "step 3/4", "warning: a spike"]


def test_newer_picture_takes_the_place_of_the_older(cell, handler, tmp_path):
    names = ("losses", "expert_load", "speed")
    for content in (b"1", b"2"):
        paths = [tmp_path / f"{name}.png" for name in names]
        for path in paths:
            path.write_bytes(PNG + content)
        handler.pictures(paths)
    assert [output.data["text/plain"] for output in cell[1:]] == ["losses", "expert_load"]
    assert len({output.data["image/png"] for output in cell[1:]}) == 1


def test_pictures_can_be_left_out(cell, tmp_path):
    (tmp_path / "losses.png").write_bytes(PNG)
    CellHandler(total_steps=4, pictures=False).pictures([tmp_path / "losses.png"])
    assert len(cell) == 1


def test_notebook_is_one_with_a_kernel(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert not in_notebook()


@pytest.mark.parametrize("error", [ConfigError("steps", 0, "a number above 0"), SpikeError("loss 9 at step 3")])
def test_what_a_user_can_get_wrong_is_one_line(error):
    assert error._render_traceback_() == [f"moejax: {error}"]


def test_programs_are_short_in_words():
    program = moejax.schedule.dualpipe(8, 20)
    assert len(repr(program)) < 100 and len(repr(moejax.timeline(program))) < 200


def test_timeline_takes_costs_by_name():
    program = moejax.schedule.one_f_one_b(4, 8)
    assert moejax.timeline(program, F=2, I=1, W=1).makespan == 8 * 4 + 3 * 4  # (micro-batches + stages - 1) * (F + B)
    with pytest.raises(ConfigError, match=r"costs=.G.: wanted one of"):
        moejax.timeline(program, G=1)


def test_schedules_are_compared_with_table_2():
    rows = {row["name"]: row for row in moejax.compare_schedules(8, 20)}
    assert rows["dualpipe"]["bubble"] == (8 / 2 - 1) * (3 + 2 - 3)
    assert rows["one_f_one_b"]["bubble"] == (8 - 1) * (1 + 2)


# ------------------------------------------------------------------------------------------------------------- kernel


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """`ask(code)`: what a Jupyter kernel with one device shows; with `when` it is interrupted when it shows that."""
    if importlib.util.find_spec("ipykernel") is None:
        pytest.fail("the marker kernel takes the extra notebooks")
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    folder = tmp_path_factory.mktemp("kernel")
    manager.start_kernel(cwd=str(folder), env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)

    def ask(code, when=None):
        shown, interrupted = [], False
        message = client.execute(code)
        while True:
            found = client.get_iopub_msg(timeout=300)
            if found["parent_header"].get("msg_id") != message:
                continue
            kind, content = found["msg_type"], found["content"]
            shown.append((kind, content))
            if when and not interrupted and kind == "update_display_data" and when in str(content["data"]):
                manager.interrupt_kernel()
                interrupted = True
            if kind == "status" and content["execution_state"] == "idle":
                return shown

    yield ask
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def texts(shown):
    return ["".join(c.get("text", "")) or c.get("data", {}).get("text/plain", "") for _, c in shown]


@pytest.mark.kernel
def test_interrupted_run_returns_with_a_checkpoint_and_the_same_call_goes_on(kernel, run_config, tmp_path):
    config = dataclasses.replace(run_config, steps=400, out=str(tmp_path / "run"))
    (tmp_path / "config.json").write_text(config.to_json())
    kernel(f"import moejax; config = moejax.load_config({str(tmp_path / 'config.json')!r})")
    shown = kernel("result = moejax.train(config); print(result.ended, result.step)", when="step   3/400")  # validated
    assert {kind for kind, _ in shown} >= {"display_data", "update_display_data"}
    ended, step = texts(shown)[-2].split()
    assert ended == "stopped" and 3 <= int(step) < 400
    assert (tmp_path / "run" / "checkpoints" / step).is_dir()
    validated = 3 * (int(step) // 3 + 2)
    again = kernel("result = moejax.train(config); print(result.ended, result.step)", when=f"step {validated:3}/400")
    ended, later = texts(again)[-2].split()
    assert ended == "stopped" and int(later) >= validated
    assert any(f"resumed at step {step}" in text for text in texts(again))
    pictures = [content for kind, content in again if kind == "display_data" and "image/png" in content["data"]]
    assert len(pictures) == 2  # losses and expert load


@pytest.mark.kernel
def test_results_show_themselves(kernel):
    kernel("import moejax, pathlib")
    data = [content["data"] for kind, content in kernel("moejax.schedule.dualpipe(8, 20)") if kind == "execute_result"]
    assert "image/png" in data[0]
    html = [content["data"] for kind, content in kernel(RESULT) if kind == "execute_result"]
    assert html[0]["text/html"] == "<b>stopped</b> at step 3, 1,200 tokens; loss 2.5000; <code>runs/&lt;x&gt;</code>"


@pytest.mark.kernel
def test_devices_that_come_too_late_are_one_line(kernel):
    errors = [
        content for kind, content in kernel("import jax, moejax; jax.devices(); moejax.simulate(3)") if kind == "error"
    ]
    assert len(errors[0]["traceback"]) == 1
    assert "simulate=3: wanted to be set before JAX starts" in errors[0]["traceback"][0]
    assert "kernel, again" in errors[0]["traceback"][0]
