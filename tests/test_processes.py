"""Training in several processes, as a user starts it, against one process with one device."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import moejax
from moejax.checkpoint.manager import Checkpoints
from moejax.config import ONE_DEVICE, CheckpointConfig, MeshConfig, OptimizerConfig, PipelineConfig, RunConfig
from moejax.mesh import one_device_mesh
from moejax.train.resume import checkpoint_parts
from moejax.train.state import abstract_state


@pytest.fixture
def config(run_config) -> RunConfig:
    """Three steps of two micro-batches, clipped, each with a checkpoint."""
    return replace(
        run_config,
        steps=3,
        optimizer=OptimizerConfig(peak_lr=1e-2, moments="fp32", clip_norm=0.3, eps=1e-4, ema_decay=0.9),
        pipeline=PipelineConfig(microbatches=2),
        data=replace(run_config.data, batch_size=8),
        checkpoint=CheckpointConfig(every_steps=1),
    )


def moejax_command(*words):
    return [sys.executable, "-m", "moejax", *map(str, words)]


def run(config, folder, *flags):
    """Trains in processes of their own, and returns what each checkpoint has: step -> parts."""
    file = folder.with_suffix(".json")
    file.write_text(replace(config, out=str(folder)).to_json())
    subprocess.run(moejax_command("train", file, *flags), check=True, timeout=600)
    alone = replace(config, mesh=ONE_DEVICE)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        parts = checkpoint_parts(abstract_state(alone, one_device_mesh()))
        return {step: jax.device_get(checkpoints.load(step, parts)) for step in (1, 3)}


def assert_close(got, want, rtol):
    """Every leaf within `rtol` of its largest number."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        atol = rtol * max(float(np.abs(b).max(initial=0)), 1e-12)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "sharding", ["zero1", pytest.param("fsdp", marks=pytest.mark.slow), pytest.param("hsdp", marks=pytest.mark.slow)]
)
def test_two_processes_equal_one_device(config, tmp_path, sharding):
    """Every gradient (Adam's first moment after the first step), the biases, and all parameters after three."""
    want = run(config, tmp_path / "one", "--simulate", "1")
    mesh = ["--mesh.data", "2", "--mesh.expert", "2", "--mesh.sharding", sharding]
    if sharding == "hsdp":
        mesh += ["--mesh.data", "1", "--mesh.replica", "2"]
    got = run(config, tmp_path / "two", "--simulate", "4", "--launch.processes", "2", *mesh)
    # the first moments are (1 - beta1) times the clipped gradients
    assert_close(got[1]["optimizer"]["opt_state"][0].mu, want[1]["optimizer"]["opt_state"][0].mu, rtol=3e-5)
    assert_close(got[3]["model"]["params"], want[3]["model"]["params"], rtol=1e-4)
    assert_close(got[3]["model"]["router_bias"], want[3]["model"]["router_bias"], rtol=0)
    assert_close(got[3]["optimizer"]["ema"], want[3]["optimizer"]["ema"], rtol=1e-4)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*([json.loads(line) for line in part] for part in lines), strict=True):
        for key in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            np.testing.assert_allclose(two[key], one[key], rtol=1e-5, err_msg=key)
        assert two["max_violation"] == one["max_violation"]
    one, two = (
        json.loads((tmp_path / name / "expert_load.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")
    )
    assert two == one and np.any(one["bias"])


LOWERED = """
import sys, jax, numpy as np
from moejax.config import RunConfig
from moejax.data.batches import Batch
from moejax.mesh import make_mesh, resolve, simulate
from moejax.train.state import abstract_state
from moejax.train.step import StepSettings, make_train_step, place

simulate(8)
config = resolve(RunConfig.from_json(open(sys.argv[1]).read()), 8)
mesh = make_mesh(config.mesh)
rows = np.zeros((config.data.batch_size, config.data.sequence_length + 1), np.int32)
batch = place(Batch(rows, rows, rows > 0), mesh)
settings = StepSettings(*[np.float32(1)] * 3)
print(make_train_step(config, mesh).lower(abstract_state(config, mesh), batch, settings).as_text())
"""


def test_every_process_makes_the_same_program(config, tmp_path):
    """Whatever Python's hash seed, with which the order of sets differs: another order of axes is another group."""
    mesh = MeshConfig(pipe=2, replica=2, data=1, expert=2, sharding="hsdp")
    file = tmp_path / "config.json"
    data, pipeline = replace(config.data, batch_size=16), PipelineConfig(schedule="zb1p", microbatches=4)
    file.write_text(replace(config, mesh=mesh, data=data, pipeline=pipeline).to_json())
    command = [sys.executable, "-c", LOWERED, str(file)]
    seeds = [{**os.environ, "PYTHONHASHSEED": str(seed)} for seed in range(4)]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in seeds]
    texts = {process.communicate(timeout=600)[0] for process in running}
    assert len(texts) == 1 and "all_to_all" in texts.pop()


@pytest.mark.slow
def test_training_in_two_processes_stops_resumes_and_equals_one(run_config, change, tmp_path):
    """On the way one file of the newest checkpoint, written by the second process, is damaged."""
    config = replace(run_config, simulate=2, steps=30, checkpoint=CheckpointConfig(every_steps=1))
    whole = moejax.train(
        change(replace(config, simulate=None), "out", str(tmp_path / "whole")), devices=jax.devices()[:2]
    )
    (tmp_path / "config.json").write_text(config.to_json())
    first = subprocess.Popen(moejax_command("train", tmp_path / "config.json", "--launch.processes", 2))
    metrics = Path(config.folder) / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert first.poll() is None
        time.sleep(0.1)
    first.terminate()
    assert first.wait(timeout=300) == 0
    assert json.loads((Path(config.folder) / "summary.json").read_text())["ended"] == "stopped"
    checkpoints = Path(config.folder) / "checkpoints"
    newest = max(int(path.name) for path in checkpoints.iterdir())
    file = max(checkpoints.glob(f"{newest}/optimizer/ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    subprocess.run(moejax_command("train", config.folder), check=True)  # with as many processes as before
    log = (Path(config.folder) / "log.txt").read_text()
    assert f"checkpoint {newest}: damaged: {file.relative_to(checkpoints / str(newest))}: 1 byte shorter" in log
    assert f"resumed at step {newest - 1}/30" in log and (checkpoints / f"{newest}.damaged.1").is_dir()
    losses = [
        [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        for folder in (config.folder, whole.folder)
    ]
    np.testing.assert_allclose(*losses, rtol=30 * 2**-23, atol=0)  # float32; sums of two in either order
