"""The checkpoint on a faster disk: taken up after a crash where it is newer than the durable one."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

import moejax
from moejax.config import CheckpointConfig, ConfigError
from moejax.train.run import Run


def train(config):
    return moejax.train(config, devices=jax.devices()[:1])


def losses(config):
    with open(Path(config.folder) / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["loss"] for line in file]


def events(config, kind):
    with open(Path(config.folder) / "events.jsonl", encoding="utf-8") as file:
        return [event for event in map(json.loads, file) if event["kind"] == kind]


def local_folder(config):
    return (Path(config.folder) / "checkpoints.local").resolve()


@pytest.fixture
def config(run_config, tmp_path):
    """Saved locally after every step, durably after every second."""
    often = CheckpointConfig(every_steps=2, local=str(tmp_path / "fast"), local_minutes=1e-9)
    return dataclasses.replace(run_config, checkpoint=often)


@pytest.fixture
def crashed(config, monkeypatch):
    """A run that crashed in step 4, when a durable checkpoint of step 2 and a local one of step 3 were there."""
    real = Run._step

    def step(self, plan, batch):
        self.saver.settle()
        if plan.step == 4:
            raise RuntimeError("a crash")
        return real(self, plan, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", step)
        with pytest.raises(RuntimeError, match="a crash"):
            train(config)
    assert [path.name for path in local_folder(config).iterdir()] == ["3"]
    assert [path.name for path in (Path(config.folder) / "checkpoints").iterdir()] == ["2"]
    return config


def test_a_run_goes_on_from_the_local_checkpoint_where_it_is_newer(crashed, config, tmp_path):
    steady = dataclasses.replace(config, out=str(tmp_path / "steady"), checkpoint=CheckpointConfig())
    train(steady)
    train(crashed)
    assert events(crashed, "resumed")[0]["step"] == 3
    assert losses(crashed) == losses(steady)
    assert not local_folder(crashed).exists()  # once the run has ended
    assert sorted(path.name for path in (Path(config.folder) / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_a_damaged_local_checkpoint_leaves_the_durable_one(crashed):
    (local_folder(crashed) / "3" / "meta" / "data.json").write_text("{}")
    train(crashed)
    assert events(crashed, "resumed")[0]["step"] == 2
    assert [(event["step"], event["aside"]) for event in events(crashed, "damaged")] == [(3, "3.damaged.1")]
    assert len(losses(crashed)) == 6


def test_a_damaged_durable_checkpoint_is_saved_again_where_only_a_local_one_is_whole(crashed, monkeypatch):
    durable = Path(crashed.folder) / "checkpoints"
    shutil.copytree(durable / "2", durable / "4")  # newer than the local one, and damaged
    for step in ("2", "4"):
        (durable / step / "meta" / "data.json").write_text("{}")
    train(crashed)
    assert events(crashed, "resumed")[0]["step"] == 3
    assert sorted(path.name for path in durable.iterdir()) == ["2.damaged.1", "4", "4.damaged.1", "6"]


def test_a_local_checkpoint_of_a_run_folder_that_was_deleted_is_not_taken_up(crashed):
    before = local_folder(crashed)
    shutil.rmtree(crashed.folder)
    train(crashed)
    assert not events(crashed, "resumed")
    assert before.exists()
    assert len(losses(crashed)) == 6


def test_without_the_local_disk_the_durable_one_serves(crashed):
    shutil.rmtree(local_folder(crashed))
    train(crashed)
    assert events(crashed, "resumed")[0]["step"] == 2


def test_a_folder_that_cannot_be_written_is_one_line(config, tmp_path):
    (tmp_path / "fast").write_text("a file")
    with pytest.raises(ConfigError, match=r"checkpoint.local='.*fast': wanted a folder that can be written"):
        train(config)
