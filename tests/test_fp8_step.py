"""The training step in FP8 on meshes and over a pipeline against one device: losses and every gradient.

Rows of activations and gradients are quantised by themselves, so that they are the same on every mesh. The gradient of
a weight is not: 128 tokens share their scales, and which ones depends on where tokens are. So each gradient is compared
with that of a single device whose micro-batches have the tokens that stood together on the mesh: those of one device
for a dense layer, those of all devices that exchange tokens for the routed experts.

Activations are float32 here, so that what is left are float32 sums in another order (some 1e-6 of them), and the few
numbers that these push over the middle between two E4M3 numbers, a step of up to 1/8 of the number: one in a thousand
of a small array is 0.4 % of its norm. The bound of norms is 2 %; FP8 itself moves gradients by more, as a test says.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_pipeline_step as on_pipelines
import test_sharded_step as on_meshes

from moejax.config import ONE_DEVICE, MeshConfig, OptimizerConfig, PipelineConfig
from moejax.ops.linear import FLOATS

SMALL = 0.02


@pytest.fixture(autouse=True)
def float32_activations(monkeypatch):
    monkeypatch.setitem(FLOATS, "fp8", jnp.float32)


@pytest.fixture
def config(run_config):
    """Without clipping, which would scale a gradient by those of all others."""
    data = dataclasses.replace(run_config.data, train=(), batch_size=on_meshes.ROWS, mask_documents=True)
    optimizer = OptimizerConfig(peak_lr=1e-2, moments="fp32", clip_norm=1e9, eps=1e-4)
    return dataclasses.replace(run_config, out=None, precision="fp8", data=data, optimizer=optimizer)


def trained(config, mesh, routing, microbatches):
    """Metrics and Adam's first moment after one step."""
    config = dataclasses.replace(config, pipeline=PipelineConfig(microbatches=microbatches))
    metrics, moments, _ = on_meshes.trained(config, mesh, routing, steps=1)
    return metrics[0], moments


@functools.cache
def one_device(config, routing, microbatches):
    return trained(config, ONE_DEVICE, routing, microbatches)


def is_routed(path):
    return any(name in path for name in ("ffn']['gate_up_EDG", "ffn']['down_EFD"))


def distances(got, want):
    """Of each leaf the norm of the difference over the norm, where that is not 0."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    return {jax.tree_util.keystr(path): np.linalg.norm(a - b) / np.linalg.norm(b) for (path, a), b in pairs if b.any()}


def assert_small(found, bound=SMALL):
    assert found and max(found.values()) < bound, {name: value for name, value in found.items() if value >= bound}
    assert bound > SMALL or np.median(list(found.values())) < SMALL / 4, found  # most have no such number


def assert_same_losses(got, want):
    np.testing.assert_array_equal(got.counts, want.counts)
    for name in ("loss", "mtp_loss", "balance_loss"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, err_msg=name)


def test_fp8_moves_gradients_by_more_than_the_bound(config):
    exact = one_device(dataclasses.replace(config, precision="fp32"), "balanced", 8)[1]
    assert np.median(list(distances(one_device(config, "balanced", 8)[1], exact).values())) > 1.5 * SMALL


MESHES = {
    "data 8": (MeshConfig(data=8), "skewed"),
    "expert 8": (MeshConfig(data=1, expert=8), "balanced"),
    "expert 8 on 2 nodes, rounds": (MeshConfig(data=1, expert=8, expert_nodes=2), "two groups and the rest empty"),
    "replica 2 x data 2 x expert 2": (MeshConfig(replica=2, data=2, expert=2, sharding="hsdp"), "balanced"),
}


@pytest.mark.parametrize(
    ("mesh", "routing"),
    [pytest.param(*MESHES[name], id=name, marks=pytest.mark.slow if "8 on" in name else ()) for name in MESHES],
)
def test_a_step_on_a_mesh_is_that_of_one_device(config, mesh, routing):
    """In rounds an expert's tokens come in parts; then the tiles differ, and gradients by the noise of E4M3 numbers."""
    metrics, moments = trained(config, mesh, routing, 1)
    exchanging, alone = (one_device(config, routing, n) for n in (mesh.batch_shards // mesh.expert, 8))
    assert_same_losses(metrics, exchanging[0])
    assert_same_losses(metrics, alone[0])
    noise = 0.06 if metrics.exchange_rounds > 1 else SMALL
    assert_small({name: d for name, d in distances(moments, exchanging[1]).items() if is_routed(name)}, noise)
    assert_small({name: d for name, d in distances(moments, alone[1]).items() if not is_routed(name)})


PIPELINES = {
    "dualpipe": MeshConfig(pipe=2, data=1),
    "dualpipe_v": MeshConfig(pipe=2, data=1, expert=2),
}


@pytest.mark.parametrize("schedule", ["dualpipe", pytest.param("dualpipe_v", marks=pytest.mark.slow)])
def test_a_step_over_a_pipeline_is_that_of_one_device(config, schedule):
    mesh, pipeline = PIPELINES[schedule], PipelineConfig(schedule=schedule, microbatches=4)
    model = dataclasses.replace(config.model, num_layers=5, hidden_size=16)
    config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, batch_size=32))

    def run(mesh, pipeline):
        metrics, moments, *_, resolved = on_pipelines.trained(config, mesh, pipeline, "skewed", steps=1)
        return metrics[0], moments, resolved

    metrics, moments, resolved = run(mesh, pipeline)
    exchanging, alone = (run(ONE_DEVICE, PipelineConfig(microbatches=4 * n)) for n in (1, mesh.expert))
    assert_same_losses(metrics, alone[0])
    for want, routed in ((exchanging, True), (alone, False)):
        found = distances(moments, on_pipelines.reordered(resolved, want[1]))
        bound = 0.06 if routed and mesh.expert > 1 else SMALL  # one device has other rows in a micro-batch
        assert_small({name: d for name, d in found.items() if is_routed(name) == routed}, bound)
