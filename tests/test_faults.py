"""Faults that are put into real runs: numbers that are not finite, at once or again, and spikes of the loss."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import moejax
from moejax.checkpoint.commit import read_meta
from moejax.config import CheckpointConfig, ConfigError, FaultConfig
from moejax.train.faults import Faults
from moejax.train.guard import MachineFaultError, NonFiniteError, SpikeError
from moejax.train.run import Run

EXACT = ("step", "tokens", "loss", "grad_norm", "max_violation")


def lines(config, name):
    with open(Path(config.folder) / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def events(config, *kinds):
    return [event for event in lines(config, "events") if event["kind"] in kinds]


def exact(config):
    return [{key: line[key] for key in EXACT} for line in lines(config, "metrics")]


def train(config):
    return moejax.train(config, devices=jax.devices()[:1])


@pytest.fixture
def config(run_config, tmp_path):
    """A run of 6 steps that saves every second step."""
    checkpoint = CheckpointConfig(every_steps=2, keep_best=False)
    log = dataclasses.replace(run_config.log, valid_every=100, pictures_every=100)
    schedule = dataclasses.replace(run_config.schedule, tokens=1000)  # the same for runs of other lengths
    return dataclasses.replace(run_config, checkpoint=checkpoint, log=log, schedule=schedule)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """What the run's steps are without any fault: filled in by the first test that asks."""
    return {}


@pytest.fixture
def right(config, untouched, tmp_path):
    if not untouched:
        clean = dataclasses.replace(config, out=str(tmp_path / "untouched"), steps=9)
        train(clean)
        untouched["lines"] = exact(clean)
        untouched["data"] = {
            step: read_meta(Path(clean.folder) / "checkpoints" / str(step))["data"] for step in (6, 8, 9)
        }
    return untouched


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(is_bad)`: steps for which it is true get a weight that is not a number; `is_bad(call, step, batch)`."""
    real, calls = Run._step, []

    def spoiled(is_bad, change=lambda metrics: metrics):
        def step(self, plan, batch):
            calls.append(plan.step)
            bad = is_bad(len(calls), plan.step, batch)
            metrics = real(self, dataclasses.replace(plan, mtp_weight=math.nan) if bad else plan, batch)
            return change(metrics) if bad else metrics

        monkeypatch.setattr(Run, "_step", step)
        return calls

    return spoiled


def with_faults(config, **settings):
    return dataclasses.replace(config, faults=FaultConfig(**settings))


# ------------------------------------------------------------------------------------------- faults of the machine


def test_a_fault_of_the_machine_is_repeated_and_changes_nothing(config, right, spoil):
    calls = spoil(lambda call, step, batch: call == 4)
    result = train(config)
    assert calls == [1, 2, 3, 4, 4, 5, 6]
    assert exact(config) == right["lines"][:6]
    (event,) = events(config, "machine_fault")
    assert (event["step"], event["quantities"]) == (4, ["grad_norm"])
    assert result.ended == "finished"
    time = json.loads((result.folder / "summary.json").read_text())["time"]
    assert time["seconds"]["lost_work"] > 0


def test_many_faults_of_the_machine_end_the_run_with_a_good_state(config, right, spoil, monkeypatch):
    config = with_faults(config, max_machine_faults=2)
    spoil(lambda call, step, batch: call in (1, 3))  # the first times of steps 1 and 2
    with pytest.raises(MachineFaultError, match=r"step 2: grad_norm not finite, and finite when repeated.*newest.* 2 "):
        train(config)
    spoil(lambda call, step, batch: False)
    train(config)
    assert exact(config) == right["lines"][:6]


def test_processes_that_disagree_go_back_to_a_checkpoint(config, right, monkeypatch):
    steps = []

    def another_process(value):
        if isinstance(value, tuple) and len(value) == 4 and value[-1] is True:
            steps.append(value)
            return [value, (*value[:3], False)] if len(steps) == 4 else [value]
        return [value]

    monkeypatch.setattr(sys.modules[Run.__module__], "everyones", another_process)
    config = with_faults(config, skip_batches=False)
    train(config)
    assert exact(config) == right["lines"][:6]
    (event,) = events(config, "rolled_back")
    assert (event["from_step"], event["step"]) == (4, 2)


# --------------------------------------------------------------------------------------------- faults of the model


def test_bad_batches_are_left_out_after_going_back(config, right, spoil):
    seen = []

    def is_bad(call, step, batch):
        tokens = np.asarray(batch.tokens)
        if call in (3, 5):  # for the first time in steps 3 and 4, and each of them again
            seen.append(tokens)
        return any(np.array_equal(tokens, other) for other in seen)

    calls = spoil(is_bad)
    config = with_faults(config, max_bad_steps=2)
    result = train(config)
    assert calls == [1, 2, 3, 3, 4, 4, 3, 4, 5, 6]
    (event,) = events(config, "rolled_back")
    assert (event["from_step"], event["step"], event["skipped"]) == (4, 2, True)
    assert [line["step"] for line in lines(config, "metrics")] == [1, 2, 3, 4, 5, 6]
    assert exact(config)[:2] == right["lines"][:2]
    assert [line["tokens"] for line in exact(config)] == [line["tokens"] for line in right["lines"][:6]]
    assert read_meta(result.folder / "checkpoints" / "6")["data"] == right["data"][8]  # two batches further
    assert result.tokens == right["lines"][5]["tokens"]


def test_a_state_that_was_spoilt_for_once_comes_right_again(config, right, spoil):
    spoil(lambda call, step, batch: 4 <= call <= 7)  # steps 4 and 5, each of them twice
    config = with_faults(config, max_bad_steps=2, skip_batches=False)
    train(config)
    assert exact(config) == right["lines"][:6]
    (event,) = events(config, "rolled_back")
    assert (event["from_step"], event["step"], event["skipped"]) == (5, 2, False)
    assert json.loads((Path(config.folder) / "summary.json").read_text())["time"]["lost_steps"] == 3


def test_a_fault_that_stays_ends_the_run(config, right, spoil):
    spoil(lambda call, step, batch: step >= 4)
    config = with_faults(config, max_bad_steps=2, roll_backs=1)
    with pytest.raises(NonFiniteError, match=r"steps 4 to 5: grad_norm not finite, also when repeated.*newest.* is 5 "):
        train(config)
    assert [event["step"] for event in events(config, "rolled_back")] == [2]
    summary = json.loads((Path(config.folder) / "summary.json").read_text())
    assert summary["ended"] == "non_finite"
    assert summary["fault"].startswith("steps 4 to 5")


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(config, spoil):
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(), optimizer=config.optimizer)
    spoil(lambda call, step, batch: True)
    with pytest.raises(NonFiniteError, match="steps 1 to 3: grad_norm not finite"):
        train(config)
    assert not events(config, "rolled_back")


def test_a_model_that_grows_without_bound_ends_the_run(run_config, change):
    config = change(change(run_config, "optimizer.peak_lr", 1e30), "schedule.warmup_steps", 0)
    with pytest.raises(NonFiniteError, match="grad_norm not finite, also when repeated; they were not applied"):
        train(config)
    assert len(events(config, "non_finite")) >= config.faults.max_bad_steps


# --------------------------------------------------------------------------------------------------------- spikes


def spike(metrics):
    return dataclasses.replace(metrics, loss=np.float32(100), grad_norm=np.float32(1), finite=np.True_)


@pytest.mark.parametrize("on_spike", ["warn", "roll_back"])
def test_a_spike_is_warned_of_or_rolled_back(on_spike, config, right, spoil):
    spoil(lambda call, step, batch: call == 5, spike)
    config = with_faults(config, on_spike=on_spike, spike_window=3, skip_batches=False)
    train(config)
    (event,) = events(config, "spike")
    assert (event["step"], event["loss"]) == (5, 100)
    assert event["z"] > 6
    losses = [line["loss"] for line in right["lines"][:6]]
    if on_spike == "warn":
        assert not events(config, "rolled_back")
        assert [line["loss"] for line in exact(config)][:4] == losses[:4]
    else:
        assert [event["step"] for event in events(config, "rolled_back")] == [4]
        assert [line["loss"] for line in exact(config)] == losses


def test_a_spike_without_a_checkpoint_before_it_ends_the_run_and_is_not_saved(config, spoil):
    config = dataclasses.replace(config, checkpoint=CheckpointConfig())
    spoil(lambda call, step, batch: call == 5, spike)
    with pytest.raises(SpikeError, match=r"loss 100.0000 is .* standard deviations above .* there is no checkpoint"):
        train(with_faults(config, on_spike="roll_back", spike_window=3))
    assert not (Path(config.folder) / "checkpoints").exists()


def judged(losses, **settings):
    """The steps at which a spike was seen, from 1."""
    found = []
    faults = Faults(FaultConfig(**settings), lambda kind, **fields: found.append(fields["step"]))
    for step, loss in enumerate(losses, 1):
        assert faults.judge(step, loss, [], []) is None
    return found


def test_spikes_among_noise():
    noise = np.random.default_rng(0).normal(0, 0.05, 3000)
    falling = 2 + 8 * np.exp(-np.arange(3000) / 300) + noise
    assert judged(falling) == []
    falling[[5, 1500, 2000]] += 1  # the first is too early to tell
    assert judged(falling) == [1501, 2001]
    assert judged(falling, spike_z=None) == []


def test_a_loss_that_stays_high_is_a_spike_until_it_is_usual():
    found = judged([*np.random.default_rng(0).normal(3, 0.01, 100), *[4.0] * 200])
    assert found[0] == 101
    assert 0 < len(found) < 100


def test_noise_of_rounding_is_no_spike():
    assert judged([3.0] * 50 + [3.0001] * 50) == []


@pytest.mark.parametrize("setting", ["max_bad_steps", "max_machine_faults", "spike_z", "spike_window", "roll_backs"])
def test_settings_that_make_no_sense(setting):
    with pytest.raises(ConfigError, match=f"faults.{setting}=-1"):
        FaultConfig(**{setting: -1})
