import dataclasses
import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import moejax
from moejax.checkpoint.manager import Checkpoints
from moejax.config import CheckpointConfig, ConfigError, MeshConfig, PipelineConfig
from moejax.train.guard import DamagedError, StopSignal
from moejax.train.ledger import KINDS
from moejax.train.runlog import METRICS
from moejax.train.watchdog import Watchdog

EXACT = ("step", "tokens", "loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "max_violation")


def train(config):
    return moejax.train(config, devices=jax.devices()[:1])


def metrics_of(folder):
    with open(folder / "metrics.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def exact(folder):
    return [{key: line[key] for key in EXACT} for line in metrics_of(folder)]


def events_of(folder, *kinds):
    with open(folder / "events.jsonl", encoding="utf-8") as lines:
        return [event for event in map(json.loads, lines) if not kinds or event["kind"] in kinds]


def checkpoints_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def damage(folder, step):
    """Flips one bit in the middle of a checkpoint's largest file, and returns its name."""
    folder = folder / "checkpoints" / str(step)
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return str(file.relative_to(folder))


_finished = {}  # the run of the fixture, its result and its seconds: it is trained once


@pytest.fixture
def finished(run_config, change, tmp_path):
    """The settings of a finished run of 6 steps, each of which was saved, in a folder of the test's own."""
    if not _finished:
        keep = CheckpointConfig(every_steps=1, keep=1, keep_every=4)
        config = dataclasses.replace(change(run_config, "log.sample_tokens", 3), checkpoint=keep)
        began = time.monotonic()
        _finished.update(config=config, result=train(config), seconds=time.monotonic() - began)
        shutil.copytree(config.folder, f"{config.folder}.copy")
    config = change(_finished["config"], "out", str(tmp_path / "finished"))
    shutil.copytree(f"{_finished['config'].folder}.copy", config.folder)
    return change(config, "log.sample_tokens", 0)


def test_run_folder_has_everything(finished):
    config, result = _finished["config"], _finished["result"]
    assert (result.ended, result.step, result.tokens) == ("finished", 6, 6 * 4 * 32)
    lines = metrics_of(result.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    without = {"valid_loss", "valid_bits_per_byte"}
    assert all(set(line) == set(METRICS) - (set() if line["step"] % 3 == 0 else without) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["valid_loss"] == result.valid_loss
    for name in ("config.json", "environment.json", "events.jsonl", "log.txt", "summary.json", "pictures/losses.png"):
        assert (result.folder / name).stat().st_size > 0, name
    log = (result.folder / "log.txt").read_text()
    assert "a sample after" in log and "goodput" in log
    assert moejax.load_config(result.folder) == config
    assert not list(result.folder.glob("stacks-*"))


def test_checkpoints_are_saved_while_steps_go_on_and_dropped(finished):
    folder = Path(finished.folder)
    assert checkpoints_of(folder) == ["4", "6"]
    saved = events_of(folder, "checkpoint")
    assert [event["step"] for event in saved] == [1, 2, 3, 4, 5, 6]
    assert sorted(step for event in saved for step in event["deleted"]) == [1, 2, 3, 5]
    with Checkpoints(folder / "checkpoints") as checkpoints:
        losses = [checkpoints.load_meta(step)["valid_loss"] for step in (4, 6)]
    assert losses == [metrics_of(folder)[step - 1]["valid_loss"] for step in (3, 6)]  # the newest there was


def test_ledger_sums_to_the_wall_clock(finished):
    ledger = json.loads((Path(finished.folder) / "summary.json").read_text())["time"]
    assert ledger["seconds"].keys() == KINDS.keys()
    assert abs(sum(ledger["seconds"].values()) - ledger["wall_seconds"]) < 0.001 * len(KINDS)  # each is rounded
    steps = sum(line["step_time"] for line in metrics_of(Path(finished.folder)))
    assert steps < ledger["wall_seconds"] <= _finished["seconds"]
    assert all(ledger["seconds"][kind] > 0 for kind in ("steps", "compilation", "validation", "save_stall", "pictures"))
    assert (ledger["attempts"], ledger["lost_steps"], ledger["seconds"]["lost_work"]) == (1, 0, 0)


def test_stop_and_resume_is_bitwise_equal(finished, change, tmp_path, monkeypatch):
    seen = StopSignal.__enter__

    def stop_at_once(self):
        """The signal comes before the first step, which ends all the same."""
        entered = seen(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return entered

    parted = change(finished, "out", str(tmp_path / "parted"))
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "__enter__", stop_at_once)
        first = train(parted)
    assert (first.ended, first.step) == ("stopped", 1)
    second = train(parted)
    assert (second.ended, second.step) == ("finished", 6)
    assert exact(second.folder) == exact(Path(finished.folder))
    assert second.valid_loss == _finished["result"].valid_loss


def test_a_damaged_checkpoint_is_skipped_and_its_steps_done_again(finished, monkeypatch):
    """Beside it lie what a kill in a save leaves, and one in the writing of an event."""
    folder, beats = Path(finished.folder), []
    want, file = exact(folder), damage(folder, 6)
    (folder / "checkpoints" / "5.saving").mkdir()
    with open(folder / "events.jsonl", "a") as events:
        events.write('{"time": 1.0, "ki')
    beat = Watchdog.beat
    monkeypatch.setattr(Watchdog, "beat", lambda self, step: (beats.append(step), beat(self, step)))
    result = train(finished)
    assert (result.ended, result.step, beats) == ("finished", 6, [5, 6])
    assert exact(folder) == want
    assert checkpoints_of(folder) == ["4", "6", "6.damaged.1"]
    (damaged,), (resumed,) = events_of(folder, "damaged"), events_of(folder, "resumed")
    what = damaged["files"][0]
    assert (damaged["step"], damaged["aside"], damaged["count"]) == (6, "6.damaged.1", 1) and what.startswith(file)
    assert resumed["step"] == 4 and resumed["bytes_read"] == resumed["bytes"] > 0
    log = (folder / "log.txt").read_text()
    assert f"WARNING checkpoint 6: damaged: {what}" in log and "kept aside as 6.damaged.1" in log
    assert f"resumed at step 4/6 of {folder}: {resumed['files']} files" in log
    ledger = json.loads((folder / "summary.json").read_text())["time"]
    assert (ledger["attempts"], ledger["lost_steps"]) == (2, 2) and ledger["seconds"]["lost_work"] > 0


def test_no_whole_checkpoint_is_an_error_every_time(finished):
    folder = Path(finished.folder)
    damage(folder, 4)
    file = damage(folder, 6)
    for _ in range(2):
        with pytest.raises(DamagedError, match=rf"no checkpoint in .* is whole, of steps 6, 4; 6 has {file}: content"):
            train(finished)
        assert checkpoints_of(folder) == ["4", "6"]
    with pytest.raises(ConfigError, match="wanted a folder with a checkpoint that is whole"):
        moejax.load(folder)


def test_a_model_is_loaded_from_a_whole_checkpoint(finished, caplog):
    folder = Path(finished.folder)
    file = damage(folder, 6)
    assert moejax.load(folder).generate("route", max_tokens=1, temperature=0.0) is not None
    assert f"checkpoint 6: damaged, skipped: {file}: content differs" in caplog.text
    assert checkpoints_of(folder) == ["4", "6"]
    with pytest.raises(ConfigError, match=rf"checkpoints/6': wanted a checkpoint that is whole \({file}: content"):
        moejax.load(folder / "checkpoints" / "6")


def test_a_full_disk_ends_saves_by_time_but_not_the_run(finished, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moejax.checkpoint.commit.write_manifest", full)
    config = dataclasses.replace(finished, steps=8, checkpoint=CheckpointConfig(every_minutes=1e-9, keep=1))
    with pytest.raises(ConfigError, match="wanted a disk with space left for a checkpoint"):
        train(config)
    folder = Path(config.folder)
    assert len(metrics_of(folder)) == 8 and checkpoints_of(folder) == ["4", "6"]
    failed = events_of(folder, "checkpoint_failed")
    assert [event["step"] for event in failed] == [7, 8] and events_of(folder)[-1]["kind"] == "failed"
    said = (folder / "log.txt").read_text()
    assert all(f"WARNING checkpoint {step} was not saved (wanted a disk with space left" in said for step in (7, 8))


def test_a_finished_run_has_nothing_left_to_do(finished):
    again = train(finished)
    assert (again.ended, again.step, again.loss) == ("finished", 6, None)
    assert again.valid_loss == _finished["result"].valid_loss
    assert exact(again.folder) == exact(_finished["result"].folder)


def test_another_model_in_the_same_folder_is_refused(finished, change):
    other = change(change(finished, "model.hidden_size", 40), "model.attention.num_heads", 1)
    wanted = (
        r"another model \(model.hidden_size is 32 there and 40 here; model.attention.num_heads is 2 there and 1 here"
    )
    with pytest.raises(ConfigError, match=wanted):
        train(other)


def test_a_run_goes_on_with_the_same_model_computed_another_way(finished, change):
    result = train(dataclasses.replace(change(change(finished, "model.remat", "full"), "model.unroll", 2), steps=7))
    assert (result.ended, result.step) == ("finished", 7)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_second_start_takes_the_compiled_programs_of_the_first(run_config, change):
    hits = []
    before = jax.config.jax_compilation_cache_dir
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        folders = []
        for steps in (2, 3):
            jax.clear_caches()
            hits.clear()
            train(change(run_config, "steps", steps))
            folders.append({path.name for path in Path(run_config.folder).parent.glob("compiled/*/jit_step-*")})
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert folders[0] == folders[1]
    assert len({name.removesuffix("-cache").removesuffix("-atime") for name in folders[0]}) == 2  # training, validation
    assert len(hits) >= 2
