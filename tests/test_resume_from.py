"""Runs that start with the weights of another run: fine-tuning, and the published stages of long context."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import moejax
from moejax.config import ConfigError, MeshConfig, OptimizerConfig, RunConfig, YarnConfig
from moejax.train.loop import train

TOKENS = np.arange(20, dtype=np.int32)[None]
STILL = 1e-30  # a learning rate that moves no weight


def trained(config, devices=1):
    train(config, devices=jax.devices()[:devices])
    return Path(config.out)


@pytest.fixture
def first(run_config, tmp_path):
    """The settings of a run of three steps, which is done."""
    config = dataclasses.replace(run_config, out=str(tmp_path / "first"), steps=3)
    trained(config)
    return config


def test_weights_and_biases_are_those_of_the_other_run(first, tmp_path):
    model = moejax.load(first.out)
    still = dataclasses.replace(first.optimizer, peak_lr=STILL, weight_decay=0.0)
    schedule = dataclasses.replace(
        first.schedule,
        warmup_steps=0,
        bias_update_speed=(dataclasses.replace(first.schedule.bias_update_speed[0], until=1.0, value=0.0),),
    )
    data = dataclasses.replace(first.data, batch_size=8)
    mesh = MeshConfig(pipe=2, data=1)
    second = dataclasses.replace(
        first,
        out=str(tmp_path / "second"),
        steps=1,
        seed=7,
        resume_from=first.out,
        mesh=mesh,
        optimizer=still,
        schedule=schedule,
        data=data,
    )
    found = moejax.load(trained(second, devices=2))
    np.testing.assert_allclose(found.logits(TOKENS), model.logits(TOKENS), rtol=1e-6, atol=1e-6)
    lines = (Path(second.out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
    assert "started with the weights of step 3" in (Path(second.out) / "log.txt").read_text()


@pytest.mark.parametrize("with_moments", [False, True], ids=["anew", "with moments"])
def test_moments_come_along_if_asked_for(first, tmp_path, with_moments):
    second = dataclasses.replace(
        first,
        out=str(tmp_path / "second"),
        steps=1,
        resume_from=f"{first.out}/checkpoints/3",
        resume_optimizer=with_moments,
    )
    trained(second)
    file = Path(second.out) / "checkpoints" / "1"
    assert _adam_steps(file) == (4 if with_moments else 1)


def _adam_steps(folder):
    from orbax.checkpoint import v1 as ocp

    from moejax.checkpoint.commit import orbax_settings

    with orbax_settings():
        tree = ocp.load_checkpointables(folder, {"optimizer": None})["optimizer"]
    counts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "count" in jax.tree_util.keystr(path)]
    assert counts
    return int(counts[0])


def test_stages_of_long_context_follow_each_other(first, tmp_path):
    before = first.out
    for stage, length in (("deepseek_v3_32k", 64), ("deepseek_v3_128k", 128)):
        published = moejax.load_config(f"configs/{stage}.py")
        assert published.model.attention.yarn == YarnConfig() and published.optimizer == OptimizerConfig(peak_lr=7.3e-6)
        yarn = YarnConfig(factor=4.0, original_length=first.data.sequence_length)
        attention = dataclasses.replace(first.model.attention, yarn=yarn)
        config = dataclasses.replace(
            published,
            out=str(tmp_path / stage),
            steps=2,
            precision="fp32",
            model=dataclasses.replace(first.model, attention=attention),
            data=dataclasses.replace(first.data, sequence_length=length),
            log=first.log,
            resume_from=before,
        )
        before = str(trained(config))
        summary = json.loads((Path(before) / "summary.json").read_text())
        assert summary["ended"] == "finished" and summary["last"]["learning_rate"] == 7.3e-6


@pytest.mark.parametrize(
    ("folder", "line"),
    [("nowhere", "resume_from='nowhere': wanted a run folder, or one of its checkpoints/<step>"), (None, "model")],
    ids=["nothing there", "another model"],
)
def test_what_cannot_be_started_from_is_one_line(first, tmp_path, change, folder, line):
    config = dataclasses.replace(first, out=str(tmp_path / "second"), resume_from=folder or first.out)
    if folder is None:
        config = change(config, "model.hidden_size", 64)
    with pytest.raises(ConfigError, match=line):
        trained(config)


def test_a_copy_of_a_checkpoint_says_itself_what_it_is(first, tmp_path):
    copy = tmp_path / "elsewhere" / "3"
    shutil.copytree(Path(first.out) / "checkpoints" / "3", copy)
    want = moejax.load(first.out).logits(TOKENS)
    shutil.rmtree(first.out)
    np.testing.assert_array_equal(moejax.load(copy).logits(TOKENS), want)
    second = dataclasses.replace(first, out=str(tmp_path / "second"), resume_from=str(copy), steps=1)
    trained(second)
    assert f"started with the weights of step 3 of {copy.parent}" in (Path(second.out) / "log.txt").read_text()
    meta = json.loads((copy / "meta" / "data.json").read_text())
    assert RunConfig.from_json(json.dumps(meta["config"])).model == first.model
    assert meta["versions"]["jax"] == jax.__version__
