import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import moejax
from moejax.config import ConfigError, MeshConfig, PipelineConfig
from moejax.train import loop
from moejax.train.guard import NonFiniteError, StopSignal
from moejax.train.runlog import METRICS


def train(config):
    return moejax.train(config, devices=jax.devices()[:1])


def metrics_of(folder):
    with open(folder / "metrics.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_run_folder_has_everything(run_config, change):
    config = change(run_config, "log.sample_tokens", 3)
    result = train(config)
    assert (result.ended, result.step, result.tokens) == ("finished", 6, 6 * 4 * 32)
    lines = metrics_of(result.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    without = {"valid_loss", "valid_bits_per_byte"}
    assert all(set(line) == set(METRICS) - (set() if line["step"] % 3 == 0 else without) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert np.isclose(lines[-1]["valid_loss"], result.valid_loss, rtol=0, atol=0)
    for name in ("config.json", "environment.json", "events.jsonl", "log.txt", "summary.json", "pictures/losses.png"):
        assert (result.folder / name).stat().st_size > 0, name
    assert "a sample after" in (result.folder / "log.txt").read_text()
    assert moejax.load_config(result.folder) == config


def test_stop_and_resume_is_bitwise_equal(run_config, change, tmp_path, monkeypatch):
    whole = train(run_config)

    seen = StopSignal.__enter__

    def stop_at_once(self):
        """The signal comes before the first step, which ends all the same."""
        entered = seen(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return entered

    parted = change(run_config, "out", str(tmp_path / "parted"))
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "__enter__", stop_at_once)
        first = train(parted)
    assert (first.ended, first.step) == ("stopped", 1)
    second = train(parted)
    assert (second.ended, second.step) == ("finished", 6)
    exact = ("step", "tokens", "loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "max_violation")
    for got, want in zip(metrics_of(second.folder), metrics_of(whole.folder), strict=True):
        assert {key: got[key] for key in exact} == {key: want[key] for key in exact}
    assert second.valid_loss == whole.valid_loss


def test_a_finished_run_has_nothing_left_to_do(run_config):
    train(run_config)
    again = train(run_config)
    assert (again.ended, again.step, again.loss) == ("finished", 6, None)
    assert len(metrics_of(again.folder)) == 6


def test_checkpoints_are_written_and_dropped(run_config, change):
    config = change(change(run_config, "checkpoint.every_steps", 2), "checkpoint.keep", 2)
    result = train(config)
    assert sorted(int(path.name) for path in (result.folder / "checkpoints").iterdir()) == [4, 6]


def test_another_model_in_the_same_folder_is_refused(run_config, change):
    train(run_config)
    with pytest.raises(ConfigError, match="this one has a run of another model"):
        train(change(run_config, "model.hidden_size", 40))


def test_steps_that_are_not_finite_end_the_run(run_config, change):
    config = change(change(run_config, "optimizer.peak_lr", 1e30), "schedule.warmup_steps", 0)
    with pytest.raises(NonFiniteError, match=r"grad_norm not finite; the step was not applied"):
        train(config)
    folder = loop.Path(config.folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "non_finite" for event in events) >= config.max_bad_steps
    assert json.loads((folder / "summary.json").read_text())["ended"] == "non_finite"


def test_a_batch_that_grows_is_counted(run_config, change):
    micro = change(run_config, "pipeline.microbatches", 2)
    config = change(
        micro, "schedule", dataclasses.replace(micro.schedule, ramp_start=2, ramp_increment=2, ramp_until=0.25)
    )
    result = train(config)
    tokens = [line["tokens"] for line in metrics_of(result.folder)]
    assert np.diff([0, *tokens]).tolist() == [64, 64, 64, 128, 128, 128]


def test_a_model_that_does_not_fit_in_memory_is_refused(run_config, change):
    with pytest.raises(
        ConfigError, match=r"model='\d.* parameters': wanted a model whose training state, here .* GB, fits"
    ):
        train(change(run_config, "model.dense_width", 10**9))


@pytest.mark.slow
def test_a_run_with_a_pipeline_goes_on_on_one_device(run_config, tmp_path):
    """Three MoE layers on two stages: one place of the stacked parameters is empty."""
    model = dataclasses.replace(run_config.model, num_layers=4)
    pipeline, mesh = PipelineConfig(schedule="zb1p", microbatches=2), MeshConfig(pipe=2, data=1)
    out = tmp_path / "pipeline"
    config = dataclasses.replace(run_config, model=model, mesh=mesh, pipeline=pipeline, steps=2, out=str(out))
    moejax.train(config, devices=jax.devices()[:2])
    shutil.copytree(out, tmp_path / "one")
    moejax.train(dataclasses.replace(config, steps=3), devices=jax.devices()[:2])
    train(dataclasses.replace(config, steps=3, out=str(tmp_path / "one"), mesh=MeshConfig()))
    want, got = (metrics_of(folder) for folder in (out, tmp_path / "one"))
    assert [line["step"] for line in got] == [1, 2, 3]
    for key in ("loss", "mtp_loss", "balance_loss", "grad_norm", "valid_loss"):
        np.testing.assert_allclose(got[-1][key], want[-1][key], rtol=1e-5, err_msg=key)
    tokens = np.arange(20, dtype=np.int32)[None]
    np.testing.assert_allclose(moejax.load(out).logits(tokens), moejax.load(tmp_path / "one").logits(tokens), atol=1e-4)
