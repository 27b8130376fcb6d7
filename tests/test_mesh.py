"""Meshes: which can be made, and the one line for each that cannot."""

import dataclasses
import os

import jax
import pytest

from moejax.config import ConfigError, DataConfig, MeshConfig, PipelineConfig, RunConfig
from moejax.mesh import AXES, batch_part, make_mesh, resolve, simulate


@pytest.fixture
def resolved(run_config, change):
    """`resolved(devices, expert=4, ...)`: the mesh of a run that these settings ask for."""

    def made(devices, batch_size=8, **lengths):
        config = change(run_config, "data.batch_size", batch_size)
        return resolve(dataclasses.replace(config, mesh=MeshConfig(**lengths)), devices).mesh

    return made


def lengths(mesh):
    return tuple(getattr(mesh, axis) for axis in AXES)


def test_one_length_is_whatever_is_left(resolved):
    assert lengths(resolved(8)) == (1, 1, 8, 1)
    assert lengths(resolved(8, expert=4)) == (1, 1, 2, 4)
    assert lengths(resolved(8, data=2, expert=-1)) == (1, 1, 2, 4)
    assert lengths(resolved(8, replica=-1, data=1, expert=2)) == (1, 4, 1, 2)
    assert lengths(resolved(1)) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("devices", "asked", "line"),
    [
        (8, {"data": 4, "expert": 4}, r"mesh=16: wanted .*mesh.data=4 x mesh.expert=4 to be the 8 devices there are"),
        (8, {"expert": 3}, r"mesh.data=-1: wanted the other lengths to divide the 8 devices: .*mesh.expert=3"),
        (4, {"data": 1, "expert": 16}, r"mesh=16: wanted .* to be the 4 devices"),
        (16, {"data": 1, "expert": 16, "batch_size": 16}, r"num_experts=8: wanted a multiple of mesh.expert=16"),
        (8, {"batch_size": 12}, r"data.batch_size=12: wanted a multiple of 8, mesh.replica=1 x mesh.data=8"),
        (16, {"data": 16}, r"model.vocab_size=264: wanted a multiple of the 16 shards .*hsdp leaves"),
        (2, {"pipe": 2, "data": 1, "batch_size": 2}, r"pipeline.microbatches=4: wanted a divisor of data.batch_size=2"),
    ],
    ids=[
        "too few devices",
        "not a divisor",
        "far too few",
        "experts",
        "batch",
        "a dim of the model",
        "pipe",
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(resolved, devices, asked, line):
    with pytest.raises(ConfigError, match=line) as error:
        resolved(devices, **asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"data": 0}, r"mesh.data=0: wanted a number above 0, or -1"),
        ({"data": -1, "expert": -1}, r"mesh.expert=-1: wanted -1 once, not also for \['data'\]"),
        ({"expert": 4, "expert_nodes": 3}, r"mesh.expert_nodes=3: wanted a divisor of mesh.expert=4"),
        ({"exchange_slack": 0.0}, r"mesh.exchange_slack=0.0: wanted a number above 0"),
    ],
    ids=["zero", "-1 twice", "nodes", "slack"],
)
def test_a_mesh_that_cannot_be_is_one_line(asked, line):
    with pytest.raises(ConfigError, match=line):
        MeshConfig(**asked)


def test_hsdp_asks_less_of_the_model_than_fsdp(resolved):
    assert resolved(16, batch_size=16, replica=2, data=8, sharding="hsdp").state_shards == 8
    with pytest.raises(ConfigError, match=r"shards of mesh.replica=2 x mesh.data=8"):
        resolved(16, batch_size=16, replica=2, data=8, sharding="fsdp")


def test_one_process_holds_the_whole_batch():
    assert batch_part(make_mesh(MeshConfig(data=2, expert=4))) == (0, 1)


def test_simulate_after_jax_has_started_is_one_line():
    simulate(len(jax.devices()))  # what there is already
    with pytest.raises(ConfigError, match=r"simulate=3: wanted to be set before JAX starts; it has 8 cpu devices"):
        simulate(3)


def test_simulated_devices_are_asked_for_once(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--of_the_user=1")
    for _ in range(2):
        simulate(len(jax.devices()))
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=1200"
    assert os.environ["XLA_FLAGS"] == f"--of_the_user=1 {patience}"
    simulate(len(jax.devices()), quick=True)
    assert os.environ["XLA_FLAGS"] == f"--of_the_user=1 {patience} --xla_backend_optimization_level=0"


@pytest.mark.parametrize(
    ("schedule", "pipe", "batch_size", "want"),
    [("dualpipe", 2, 6, 6), ("dualpipe", 2, 10, 10), ("dualpipe", 4, 20, 10), ("zb1p", 3, 20, 4), ("gpipe", 1, 7, 1)],
)
def test_microbatches_are_as_few_as_the_schedule_needs_and_the_batch_divides_into(schedule, pipe, batch_size, want):
    config = RunConfig(
        steps=1,
        mesh=MeshConfig(pipe=pipe, data=1),
        pipeline=PipelineConfig(schedule=schedule),
        data=DataConfig(batch_size=batch_size, virtual_shards=1),
    )
    assert resolve(config, pipe).pipeline.microbatches == want
