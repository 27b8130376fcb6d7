"""Runs whose checkpoints are copied to another place, and that go on from there."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

from moejax.checkpoint.remote import remote_steps
from moejax.config import CheckpointConfig, ConfigError
from moejax.train.loop import train


def losses(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def events(folder, kind):
    lines = (Path(folder) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def test_a_run_goes_on_from_its_copies(run_config, tmp_path):
    remote = tmp_path / "bucket"
    checkpoint = CheckpointConfig(every_steps=2, remote=f"file://{remote}", remote_keep=2)
    config = dataclasses.replace(run_config, out=str(tmp_path / "first"), checkpoint=checkpoint)
    train(config, devices=jax.devices()[:1])
    assert remote_steps(checkpoint.remote)[-1] == 6 and len(remote_steps(checkpoint.remote)) <= 2
    assert events(config.folder, "uploaded")[-1]["step"] == 6
    want = losses(config.folder)

    shutil.rmtree(Path(config.folder) / "checkpoints")  # the machine's disk is gone
    (file, *_) = sorted((remote / "6" / "model" / "d").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    train(config, devices=jax.devices()[:1])
    (resumed,) = events(config.folder, "resumed")
    assert resumed["step"] in (2, 4)  # the newest copy is damaged
    assert losses(config.folder) == want
    assert "fetched from file://" in (Path(config.folder) / "log.txt").read_text()
    assert len(list((Path(config.folder) / "checkpoints").glob("6.damaged.*"))) == 1


def test_an_address_that_cannot_be_used_is_one_line(run_config):
    checkpoint = CheckpointConfig(remote="nowhere://bucket/run")
    with pytest.raises(ConfigError, match=r"checkpoint.remote='nowhere://bucket/run': wanted"):
        train(dataclasses.replace(run_config, checkpoint=checkpoint), devices=jax.devices()[:1])
