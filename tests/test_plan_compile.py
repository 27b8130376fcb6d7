"""Training steps compiled for devices that do not exist, and what is read from them."""

import dataclasses
import importlib.util
from collections import Counter

import pytest

from moejax.config import ConfigError, MeshConfig, PipelineConfig
from moejax.mesh import resolve
from moejax.plan.arrays import state_arrays
from moejax.plan.collectives import Collective
from moejax.plan.compile import axes_of, compile_step, sites
from moejax.plan.traffic import passes

MESH = MeshConfig(pipe=2, replica=1, data=2, expert=2)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (((0, 1), (2, 3), (4, 5), (6, 7)), "expert"),
        (((0, 2), (1, 3), (4, 6), (5, 7)), "data"),
        (((0, 1, 2, 3), (4, 5, 6, 7)), "data x expert"),
        (((0, 1, 2, 3, 4, 5, 6, 7),), "pipe x data x expert"),
        (((0, 4), (4, 0), (1, 5), (5, 1)), "pipe"),
        (((0,), (1,)), ""),
    ],
    ids=["last axis", "middle axis", "two axes", "all axes", "pairs of a permute", "each with itself"],
)
def test_groups_of_devices_are_named_by_their_axes(groups, axes):
    kind = "collective-permute" if axes == "pipe" else "all-reduce"
    assert axes_of(Collective(kind, ((4,),), 16, groups, False), MESH) == axes


def test_like_collectives_are_added_up():
    along, alone = ((0, 1), (2, 3), (4, 5), (6, 7)), tuple((device,) for device in range(8))
    found = [Collective("all-to-all", ((4,),), size, along, True) for size in (16, 32)]
    found.append(Collective("all-reduce", ((4,),), 16, alone, True))
    (only,) = sites(found, MESH)
    assert dataclasses.astuple(only) == ("expert", "all-to-all", 2, 48)


def test_step_is_compiled_for_simulated_devices(run_config, change):
    mesh = MeshConfig(data=2, expert=2, exchange_slack=8.0)
    config = change(change(run_config, "mesh", mesh), "data.sequence_length", 64)
    compiled = compile_step(config)
    assert (compiled.target, compiled.devices, compiled.mesh) == ("cpu", 4, "data 2 x expert 2")
    assert compiled.flops > 0
    state = sum(row.bytes_per_device for row in state_arrays(config))
    batch = config.data.batch_size // 4 * 65 * 5
    assert compiled.argument_bytes == state + batch + 3 * 4  # and the three numbers of the step's settings
    assert compiled.temporary_bytes > 0
    assert compiled.flights == ()
    # what is estimated to be sent over an axis, and nothing else
    assert {(s.axis, s.kind) for s in compiled.sites} == {(t.axis, t.kind) for t in passes(resolve(config, 4))}


def test_mesh_that_does_not_divide_is_refused_before_anything_is_compiled(run_config, change):
    config = change(run_config, "mesh", MeshConfig(data=1, expert=3))
    with pytest.raises(ConfigError, match=r"model\.moe\.num_experts=8: wanted a multiple of mesh\.expert=3"):
        compile_step(config)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="JAX's plugin for CUDA is there")
def test_h200s_without_the_plugin_give_one_line(run_config):
    with pytest.raises(ConfigError, match=r"^target='h200': wanted cpu, .*moejax\[hopper\]") as error:
        compile_step(run_config, "h200")
    assert "\n" not in str(error.value)


@pytest.mark.hopper
def test_pipeline_for_h200s_exchanges_what_is_estimated_behind_products(run_config, change, no_cache):
    """DualPipe on 32 devices in two hops: XLA for GPUs leaves BF16 as it is, so that sizes compare exactly."""
    mesh = MeshConfig(pipe=4, data=2, expert=4, expert_nodes=2)
    pipeline = PipelineConfig(microbatches=8, layers=(2, 2, 2, 2))
    model = dataclasses.replace(run_config.model, num_layers=9, hidden_size=128)
    data = dataclasses.replace(run_config.data, train=(), sequence_length=256, batch_size=64)
    config = dataclasses.replace(
        run_config, mesh=mesh, pipeline=pipeline, model=model, data=data, precision="bf16", out=None
    )
    compiled = compile_step(config, "h200")
    config = resolve(config, 32)
    assert {(s.axis, s.kind) for s in compiled.sites} >= {("pipe", "collective-permute"), ("expert", "all-to-all")}
    exchanged = {t.bytes for t in passes(config) if t.kind == "all-to-all"}
    assert {f.bytes for f in compiled.flights if f.kind == "all-to-all"} == exchanged
    states = Counter(f.state for f in compiled.flights if f.kind == "all-to-all")
    assert states["hidden"] >= 2 * 6, states  # three arrays in each of two hops, of both sides of a joined cell
