import json
import os

import numpy as np
import pytest
from runs_on_disk import EXPERTS, LAYERS, events, line, record, write_lines, write_run

from moejax.config import ConfigError
from moejax.report.records import LOADS, read_runs
from moejax.train.ledger import Ledger, written_summary


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def only(folder):
    return read_runs([folder])[0]


def test_records_are_the_numbers_of_the_files(folder):
    run = only(folder)
    assert run.step.tolist() == list(range(1, 41)) and run.missing == [] and run.ended == "finished"
    np.testing.assert_array_equal(run.column("loss"), [2 + 3 / step for step in range(1, 41)])
    assert np.flatnonzero(np.isfinite(run.column("valid_loss"))).tolist() == [9, 19, 29, 39]
    assert run.by_layer("max_violation").shape == (40, LAYERS)
    assert run.loads.step.tolist() == [10, 20, 30, 40]
    np.testing.assert_array_equal(run.loads.load[-1], record(40)["load"])
    np.testing.assert_array_equal(run.loads.bias[-1], np.float32(record(40)["bias"]))


def test_time_is_that_of_the_ledger_after_its_last_line(folder):
    """40 kept steps of 0.1 s, 4 of which were done twice; 60 s between the attempts."""
    time = only(folder).time
    assert time["attempts"] == 2 and time["lost_steps"] == 4
    want = {"steps": 4.0, "lost_work": 0.4, "restart": 60.0, "compilation": 45.6}
    assert {kind: pytest.approx(seconds) for kind, seconds in time["seconds"].items() if seconds} == want
    assert time["wall_seconds"] == pytest.approx(110.0)


def test_summary_of_a_ledger_is_what_its_own_process_says(tmp_path):
    now, path = [1e9], tmp_path / "events.jsonl"
    assert written_summary(path) is None

    def write(kind, **fields):
        with open(path, "a") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")

    ledger = Ledger(path, began=1e9, clock=lambda: now[0])
    ledger.resume(0, write)
    with ledger.step(1):
        now[0] += 3
    ledger.note()
    assert written_summary(path) == ledger.summary()


@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", "metrics.jsonl", "expert_load.jsonl", "events.jsonl"]
)
def test_a_file_that_is_missing_is_named(name, folder):
    (folder / name).unlink()
    assert [said.split()[0] for said in only(folder).missing] == [name]


@pytest.mark.parametrize(
    "tail", [b'{"step": 41, "lo', b'{"step": 41, "loss": "\xff', b""], ids=["half", "no UTF-8", "none"]
)
def test_a_line_that_is_being_written_is_left_out(tail, folder):
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(tail)
    run = only(folder)
    assert run.step[-1] == 40 and run.missing == (["metrics.jsonl: the last line is cut off"] if tail else [])


def test_lines_that_cannot_be_read_are_counted_and_others_kept(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "lo{"step": 42}\n[1, 2]\n')
        file.write(json.dumps(line(43) | {"loss": None, "grad_norm": "much", "max_violation": [None, 1.0, 2.0]}) + "\n")
    run = only(folder)
    assert run.missing == ["metrics.jsonl: 2 lines cannot be read"] and run.step[-1] == 43
    assert np.isnan([run.column("loss")[-1], run.column("grad_norm")[-1], run.by_layer("max_violation")[-1, 0]]).all()


def test_without_an_end_a_run_has_not_ended(folder):
    write_lines(folder / "events.jsonl", events()[:-1])
    assert only(folder).ended is None
    write_lines(folder / "events.jsonl", [*events(), {"time": 2e9, "kind": "resumed", "step": 40}])
    assert only(folder).ended is None
    bad_step = {"time": 2e9, "kind": "non_finite", "step": 40, "quantities": ["loss"]}
    write_lines(folder / "events.jsonl", [*events()[:-1], bad_step])
    assert only(folder).ended is None
    write_lines(folder / "events.jsonl", [*events()[:-1], bad_step, {"time": 2e9, "kind": "non_finite", "step": 40}])
    assert only(folder).ended == "non_finite"


def test_settings_of_another_version_are_kept_as_they_are(folder):
    settings = json.loads((folder / "config.json").read_text()) | {"from_the_future": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    run = only(folder)
    assert run.config is None and run.settings["from_the_future"] == 1
    assert len(run.missing) == 1 and "from_the_future" in run.missing[0]


def test_loads_of_an_older_run_have_no_bias(folder):
    write_lines(folder / "expert_load.jsonl", [{"step": 10, "load": record(10)["load"]}])
    run = only(folder)
    assert run.loads.load.shape == (1, LAYERS, EXPERTS) and run.loads.bias is None
    assert len(run.missing) == 1 and "bias" in run.missing[0]


def test_of_many_loads_some_are_read_the_first_and_the_last_among_them(folder):
    write_lines(folder / "expert_load.jsonl", [record(step) for step in range(1, 1001)])
    steps = only(folder).loads.step
    assert len(steps) == LOADS and steps[0] == 1 and steps[-1] == 1000 and np.diff(steps).max() <= 3


def test_names_tell_runs_apart(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a/run", "b/run", "other")]
    names = [run.name for run in read_runs([*folders, folders[2]])]
    assert names == [os.path.join("a", "run"), os.path.join("b", "run"), "other", "other (2)"]


def test_a_folder_without_a_run_is_one_line(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"^RUN='.*': wanted a run folder, with at least one of config.json"):
            read_runs([place])
