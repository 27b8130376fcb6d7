"""The training step on every mesh against one device: losses, every gradient, the biases and the parameters.

Adam's first moment after one step is (1 - beta1) times the clipped gradient of every parameter. Float32 sums of a few
hundred numbers in another order differ by a few 1e-6 of the largest; the bounds are 10 times that. Three optimizer
steps are followed with an epsilon of Adam's that is no smaller than the gradients' noise, as a step of a parameter
whose gradient is 0 would otherwise have a random sign.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moejax.config import ONE_DEVICE, MeshConfig, OptimizerConfig, PipelineConfig, RunConfig
from moejax.data.batches import Batch
from moejax.mesh import make_mesh, one_device_mesh, resolve
from moejax.train.state import abstract_state, new_state
from moejax.train.step import StepSettings, make_train_step, place

SETTINGS = StepSettings(learning_rate=np.float32(1e-2), bias_update_speed=np.float32(0.01), mtp_weight=np.float32(0.3))
ROWS = 16

# Every token's choice is moved by biases of the experts: 8 experts in 4 groups, of which a token uses 2 in 2
ROUTINGS = {
    "balanced": np.zeros(8),
    "skewed": np.asarray([0.6, 0.3, 0, 0, 0, 0.2, 0, 0]),
    "all on two experts": np.asarray([100.0, 100, 0, 0, 0, 0, 0, 0]),
    "two groups and the rest empty": np.asarray([100.0, 0, 0, 0, 0, 0, 100, 0]),
}


@functools.cache
def batches(steps):
    rng = np.random.default_rng(0)
    shape = (ROWS, 33)
    documents = [np.cumsum(rng.random(shape) < 0.1, axis=1).astype(np.int32) for _ in range(steps)]
    return [Batch(rng.integers(0, 264, shape, dtype=np.int32), ids, rng.random(shape) < 0.9) for ids in documents]


@pytest.fixture
def config(run_config, change):
    config = change(change(run_config, "data.batch_size", ROWS), "data.mask_documents", True)
    optimizer = OptimizerConfig(peak_lr=1e-2, moments="fp32", clip_norm=0.3, eps=1e-4, ema_decay=0.9)
    # without the paths of this test's files equal settings are equal, and steps are compiled once
    data = dataclasses.replace(config.data, train=())
    pipeline = PipelineConfig(microbatches=2)
    return dataclasses.replace(config, out=None, data=data, optimizer=optimizer, pipeline=pipeline)


def trained(config, mesh_config, routing, steps=3):
    """Metrics of each step, Adam's first moment after the first, and the state after the last."""
    devices = mesh_config.batch_shards
    config = resolve(dataclasses.replace(config, mesh=mesh_config), devices)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    biases = ROUTINGS[routing].astype(np.float32)
    start = first_state(config.model, config.optimizer)
    start = dataclasses.replace(
        start, router_bias=jax.tree.map(lambda b: np.broadcast_to(biases, b.shape), start.router_bias)
    )
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start, abstract_state(config, mesh))
    step = train_step(config, mesh)
    metrics, moments = [], None
    for batch in batches(steps):
        state, measured = step(state, place(batch, mesh), SETTINGS)
        metrics.append(jax.device_get(measured))
        moments = jax.device_get(state.opt_state[0].mu) if moments is None else moments
    return metrics, moments, state


@functools.cache
def train_step(config, mesh):
    return make_train_step(config, mesh)


@functools.cache
def first_state(model, optimizer):
    return jax.device_get(new_state(RunConfig(steps=1, model=model, optimizer=optimizer), one_device_mesh()))


@functools.cache
def reference(config, routing):
    metrics, moments, state = trained(config, ONE_DEVICE, routing)
    return metrics, moments, jax.device_get(state)


def assert_close(got, want, rtol):
    """Every leaf within `rtol` of its largest number."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        atol = rtol * max(float(np.abs(b).max(initial=0)), 1e-12)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def assert_same_as_one_device(config, mesh_config, routing):
    metrics, moments, state = trained(config, mesh_config, routing)
    want_metrics, want_moments, want_state = reference(config, routing)
    for got, want in zip(metrics, want_metrics, strict=True):
        np.testing.assert_array_equal(got.counts, want.counts)
        for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, err_msg=name)
        assert want.grad_norm > config.optimizer.clip_norm  # clipping acts
    assert_close(moments, want_moments, rtol=3e-5)
    got = jax.device_get(state)
    assert_close(got.router_bias, want_state.router_bias, rtol=0)
    assert_close(got.params, want_state.params, rtol=1e-4)
    assert_close(got.ema, want_state.ema, rtol=1e-4)
    for bias in jax.tree.leaves(state.router_bias):  # all devices have the same bits
        copies = [np.asarray(shard.data).tobytes() for shard in bias.addressable_shards]
        assert len(copies) == mesh_config.batch_shards and len(set(copies)) == 1


MESHES = {
    "data 8": MeshConfig(data=8),
    "expert 8": MeshConfig(data=1, expert=8),
    "expert 8 on 2 nodes": MeshConfig(data=1, expert=8, expert_nodes=2),
    "data 2 x expert 4": MeshConfig(data=2, expert=4),
    "data 2 x expert 4 on 2 nodes": MeshConfig(data=2, expert=4, expert_nodes=2),
    "replica 2 x data 2 x expert 2": MeshConfig(replica=2, data=2, expert=2),
}
SHARDINGS = ("zero1", "fsdp", "hsdp")
# each mesh, each sharding and each routing once; the rest is slow
FIRST = {
    ("data 8", "zero1", "balanced"),
    ("expert 8", "zero1", "skewed"),
    ("expert 8", "zero1", "all on two experts"),
    ("expert 8 on 2 nodes", "fsdp", "two groups and the rest empty"),
    ("data 2 x expert 4", "fsdp", "balanced"),
    ("data 2 x expert 4 on 2 nodes", "zero1", "all on two experts"),
    ("replica 2 x data 2 x expert 2", "hsdp", "skewed"),
    ("replica 2 x data 2 x expert 2", "zero1", "balanced"),
}


def cases():
    for mesh in MESHES:
        for sharding in SHARDINGS:
            for routing in ROUTINGS:
                marks = () if (mesh, sharding, routing) in FIRST else pytest.mark.slow
                yield pytest.param(mesh, sharding, routing, marks=marks, id=f"{mesh}, {sharding}, {routing}")


@pytest.mark.parametrize(("mesh", "sharding", "routing"), list(cases()))
def test_step_equals_one_device(config, mesh, sharding, routing):
    assert_same_as_one_device(config, dataclasses.replace(MESHES[mesh], sharding=sharding), routing)
