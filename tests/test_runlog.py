import io
import json
import logging
import math
import re
import sys

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from moejax.config import ConfigError, LogConfig, RunConfig
from moejax.train import runlog
from moejax.train.console import amount, duration, step_line
from moejax.train.runlog import METRICS, RunLog


@pytest.fixture
def config(tmp_path):
    return RunConfig(steps=10, out=str(tmp_path / "run"), log=LogConfig(console_seconds=0, tensorboard=False))


def open_log(config, **options):
    console = Console(file=io.StringIO(), width=60, **options.pop("console", {}))
    return RunLog(config, total_steps=10, console=console, **options), console.file


def metrics(step, **others):
    return {"step": step, "tokens": step * 100, "loss": 5.0 - step / 10, "step_time": 2.0, **others}


def lines(config, name):
    return [json.loads(line) for line in open(f"{config.folder}/{name}.jsonl")]


def test_run_folder_holds_what_the_documentation_names(config):
    log, _ = open_log(RunConfig(steps=10, out=config.out))
    with log:
        log.event("started", unigram_loss=3.0)
        log.step(metrics(1, max_violation=[0.5, 1.5]))
        log.expert_load(1, [[0.5, 1.5], [1.0, 1.0]])
        log.expert_load(2, [[1.0, 1.0]], [[0.25, -0.25]])
        log.finish("finished", sample="text")
    named = set(re.findall(r"^    ([\w.]+?)/? {2,}", runlog.__doc__, re.MULTILINE))
    assert named == {path.name for path in log.folder.iterdir()}
    assert RunConfig.from_json((log.folder / "config.json").read_text()) == RunConfig(steps=10, out=config.out)
    assert json.loads((log.folder / "environment.json").read_text())["packages"]["jax"]
    assert lines(config, "expert_load") == [
        {"step": 1, "load": [[0.5, 1.5], [1.0, 1.0]]},
        {"step": 2, "load": [[1.0, 1.0]], "bias": [[0.25, -0.25]]},
    ]
    assert [event["kind"] for event in lines(config, "events")] == ["started", "finished"]


def test_metrics_are_on_disk_after_each_step(config):
    log, _ = open_log(config)
    with log:
        for step in (1, 2):
            log.step(metrics(step))
            assert lines(config, "metrics")[-1] == metrics(step)


def test_metric_without_documentation_is_refused(config):
    log, _ = open_log(config)
    with log, pytest.raises(KeyError, match="los"):
        log.step({"step": 1, "los": 1.0})


def test_every_metric_of_the_contract_is_documented():
    contract = """step tokens loss mtp_loss balance_loss grad_norm learning_rate tokens_per_second flops_per_second mfu
        max_violation dead_experts data_wait step_time valid_loss valid_bits_per_byte"""
    assert set(contract.split()) <= METRICS.keys()


def test_resumed_run_has_each_step_once(config):
    for resumed, last in ((0, 6), (4, 8)):
        log, _ = open_log(config, resumed_step=resumed)
        with log:
            for step in range(resumed + 1, last + 1):
                log.step(metrics(step))
                log.expert_load(step, [[1.0]])
        with open(f"{config.folder}/metrics.jsonl", "a") as file:
            file.write('{"step": 9, "lo')  # killed while it wrote
    log, _ = open_log(config, resumed_step=7)
    with log:
        log.step(metrics(8))
    assert [line["step"] for line in lines(config, "metrics")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in lines(config, "expert_load")] == [1, 2, 3, 4, 5, 6, 7]


def test_lines_after_a_roll_back_are_those_of_the_steps_done_again(config):
    log, _ = open_log(config)
    with log:
        for loss in (1.0, 2.0):
            for step in range(3 if loss == 2 else 1, 6):
                log.step(metrics(step, loss=loss))
                log.expert_load(step, [[loss]])
            if loss == 1:
                log.roll_back(2)
    assert [(line["step"], line["loss"]) for line in lines(config, "metrics")] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 2),
    ]
    assert [line["load"] for line in lines(config, "expert_load")] == [[[1]], [[1]], [[2]], [[2]], [[2]]]


def test_numbers_that_are_not_finite_are_valid_json_and_named(config):
    log, _ = open_log(config)
    with log:
        log.step(metrics(3, loss=math.nan, grad_norm=math.inf, max_violation=[1.0, -math.inf]))
    text = (log.folder / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (line["loss"], line["grad_norm"], line["max_violation"]) == (None, None, [1.0, None])
    event = lines(config, "events")[-1]
    assert (event["kind"], event["step"]) == ("non_finite", 3)
    assert event["quantities"] == ["loss", "grad_norm", "max_violation"]


def test_summary_has_the_last_step_and_the_best_validation(config):
    log, _ = open_log(config)
    with log:
        for step, valid in ((1, 3.0), (2, 2.0), (3, 2.5)):
            log.step(metrics(step, valid_loss=valid, valid_bits_per_byte=valid / 2))
    log, _ = open_log(config, resumed_step=3)
    with log:
        log.step(metrics(4))
        log.finish("stopped", signal="SIGTERM")
    summary = json.loads((log.folder / "summary.json").read_text())
    assert (summary["ended"], summary["best_valid_loss"], summary["last"]["step"]) == ("stopped", 2.0, 4)
    assert summary["signal"] == "SIGTERM"
    events = lines(config, "events")
    assert [event["kind"] for event in events] == ["validation"] * 3 + ["stopped"]
    assert events[0]["valid_bits_per_byte"] == 1.5


def test_exception_is_an_event(config):
    log, _ = open_log(config)
    with pytest.raises(ZeroDivisionError), log:
        raise ZeroDivisionError("by zero")
    event = lines(config, "events")[-1]
    assert (event["kind"], event["error"]) == ("failed", "ZeroDivisionError: by zero")


# ----------------------------------------------------------------------------------------------------------- console


def test_console_shows_plain_lines_and_log_txt_has_them_too(config, caplog):
    log, shown = open_log(config)
    with log:
        logging.getLogger("moejax.data").warning("bad line [red]")
        log.step(metrics(4))
    assert shown.getvalue() == "warning: bad line [red]\nstep  4/10  loss 4.6000  ETA 0:00:12\n"
    text = (log.folder / "log.txt").read_text()
    assert not caplog.records  # a handler of the root logger, which would say it twice
    assert "WARNING bad line [red]" in text and "INFO step  4/10  loss 4.6000" in text
    logging.getLogger("moejax").info("after the run")
    assert (log.folder / "log.txt").read_text() == text


def test_console_lines_are_rate_limited_but_for_validations_and_the_last(tmp_path):
    config = RunConfig(steps=10, out=str(tmp_path), log=LogConfig(console_seconds=3600, tensorboard=False))
    log, shown = open_log(config)
    with log:
        for step in range(1, 11):
            log.step(metrics(step, **({"valid_loss": 2.0} if step == 5 else {})))
    assert [line.split("/")[0].split()[-1] for line in shown.getvalue().splitlines()] == ["1", "5", "10"]
    assert len(lines(config, "metrics")) == 10


def test_terminal_shows_a_progress_bar(config):
    log, shown = open_log(config, console={"force_terminal": True})
    with log:
        log.step(metrics(5))
    assert "50%" in shown.getvalue() and "5/10" in shown.getvalue()


def test_step_line():
    line = step_line(
        metrics(20, learning_rate=3e-3, grad_norm=0.84, tokens_per_second=12345.0, mfu=0.21), 300, "0:09:20"
    )
    assert line == "step  20/300  loss 3.0000  lr 3.00e-03  grad 0.84  12.3k tokens/s  MFU 21.0%  ETA 0:09:20"
    assert (amount(950.4), amount(4.56e6), duration(93784)) == ("950", "4.56M", "1 day, 2:03:04")


# ------------------------------------------------------------------------------------- TensorBoard, Weights & Biases


def read_tensorboard(folder):
    """All points, (step, tag) -> value, by the record format: length u64, crc u32, data, crc u32."""
    points = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            points |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            at += 12 + size + 4
    return points


def test_tensorboard_has_every_number(config):
    log, _ = open_log(RunConfig(steps=10, out=config.out))
    with log:
        log.step(metrics(1, max_violation=[0.5, 1.5]))
        log.step(metrics(2))
    points = read_tensorboard(log.folder / "tensorboard")
    assert points[1, "max_violation/layer_1"] == 1.5
    assert points[2, "loss"] == pytest.approx(4.8)
    assert {tag for step, tag in points if step == 2} == {"tokens", "loss", "step_time"}


def test_missing_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = RunConfig(steps=1, out=str(tmp_path), log=LogConfig(wandb="project"))
    with pytest.raises(ConfigError, match=r"log\.wandb='project': wanted the package wandb"):
        open_log(config)


# ----------------------------------------------------------------------------------------------------- disk problems


@pytest.mark.parametrize("name", ["config.json.part", "events.jsonl", "summary.json.part"])
def test_full_disk_is_one_line(name, config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"^out='.*run': wanted a disk with space left$"):
        log, _ = open_log(config)
        with log:
            log.step(metrics(1))
            log.finish("finished")


def test_full_disk_in_the_middle_is_borne_and_its_lines_come_later(config, tmp_path):
    log, shown = open_log(config)
    with log, open("/dev/full", "ab", buffering=0) as full:
        log.step(metrics(1))
        disk, log._files["metrics"] = log._files["metrics"], full
        log.step(metrics(2))
        log.step(metrics(3))
        assert shown.getvalue().count("warning: out=") == 1 and "wanted a disk with space left" in shown.getvalue()
        assert len(lines(config, "metrics")) == 1
        log._files["metrics"] = disk
        log.step(metrics(4))
        assert [line["step"] for line in lines(config, "metrics")] == [1, 2, 3, 4]


def test_event_that_was_cut_off_goes_before_the_next(config):
    for kind in ("started", "resumed"):
        log, _ = open_log(config)
        with log:
            log.event(kind)
        with open(f"{config.folder}/events.jsonl", "ab") as file:
            file.write(b'{"time": 1.0, "kind": "val\xff')  # killed while it wrote
    log, _ = open_log(config)
    with log:
        log.finish("finished")
    assert [event["kind"] for event in lines(config, "events")] == ["started", "resumed", "finished"]


def test_full_disk_under_the_log_file_leaves_the_run_alone(config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").symlink_to("/dev/full")
    log, shown = open_log(config)
    with log:
        log.step(metrics(1))
    assert "step  1/10" in shown.getvalue() and capsys.readouterr().err == ""


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^out='.*': wanted a folder that can be written"):
        open_log(RunConfig(steps=1, out=str(tmp_path / "file" / "run")))


def test_run_that_has_said_how_it_ended_is_not_failed_too(config):
    log, _ = open_log(config)
    with pytest.raises(ArithmeticError), log:
        log.finish("non_finite")
        raise ArithmeticError
    assert [event["kind"] for event in lines(config, "events")] == ["non_finite"]
