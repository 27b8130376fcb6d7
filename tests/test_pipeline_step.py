"""The training step over a pipeline against one device: losses, every gradient, the biases and the parameters.

As in test_sharded_step.py, whose bounds and batches these are: Adam's first moment after one step is (1 - beta1) times
the clipped gradient of every parameter.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_sharded_step import ROUTINGS, SETTINGS, assert_close, batch

from moejax.config import ONE_DEVICE, ConfigError, MeshConfig, OptimizerConfig, PipelineConfig, RunConfig
from moejax.mesh import make_mesh, one_device_mesh, resolve
from moejax.pipeline.layout import lay_out
from moejax.pipeline.stages import require_pipeline
from moejax.train.state import abstract_state, new_state
from moejax.train.step import make_eval_step, make_train_step, place

ROWS = 32


@functools.cache
def batches():
    return [batch(np.random.default_rng(step), (ROWS, 33)) for step in range(3)]


@pytest.fixture
def config(run_config, change):
    """Ten layers: one dense, nine MoE layers that no pipeline divides, and an MTP module."""
    model = dataclasses.replace(run_config.model, num_layers=10, hidden_size=16, loss_chunk=100)
    data = dataclasses.replace(run_config.data, train=(), batch_size=ROWS, mask_documents=True)
    optimizer = OptimizerConfig(peak_lr=1e-2, moments="fp32", clip_norm=0.3, eps=1e-4, ema_decay=0.9)
    return dataclasses.replace(run_config, out=None, model=model, data=data, optimizer=optimizer)


@functools.cache
def first_state(model, optimizer):
    """The state before the first step, its layers in their own order."""
    return jax.device_get(new_state(RunConfig(steps=1, model=model, optimizer=optimizer), one_device_mesh()))


def reordered(config, state):
    """The state with its MoE layers in the order of the ranks, and zeros in the places that have none."""
    slots = np.asarray(lay_out(config).layer_of_slot)

    def own_order(path, x):
        if "moe_blocks" not in jax.tree_util.keystr(path):
            return x
        return np.where((slots < 0).reshape(-1, *[1] * (x.ndim - 1)), 0, x[slots])

    return jax.tree_util.tree_map_with_path(own_order, state)


def trained(config, mesh_config, pipeline, routing, steps=3):
    """Metrics of each step, Adam's first moment after the first, and the state after the last."""
    devices = mesh_config.pipe * mesh_config.batch_shards
    config = resolve(dataclasses.replace(config, mesh=mesh_config, pipeline=pipeline), devices)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    start = first_state(config.model, config.optimizer)
    biases = ROUTINGS[routing].astype(np.float32)
    biased = jax.tree.map(lambda b: np.broadcast_to(biases, b.shape), start.router_bias)
    start = dataclasses.replace(start, router_bias=biased)
    start = reordered(config, start) if mesh_config.pipe > 1 else start
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start, abstract_state(config, mesh))
    step, evaluate = make_train_step(config, mesh), make_eval_step(config, mesh)
    metrics, moments = [], None
    for rows in batches()[:steps]:
        state, measured = step(state, place(rows, mesh), SETTINGS)
        metrics.append(jax.device_get(measured))
        moments = jax.device_get(state.opt_state[0].mu) if moments is None else moments
    return metrics, moments, state, jax.device_get(evaluate(state, place(batches()[0], mesh))), config


@functools.cache
def reference(config, routing):
    metrics, moments, state, evaluated, _ = trained(config, ONE_DEVICE, PipelineConfig(microbatches=4), routing)
    return metrics, moments, jax.device_get(state), evaluated


def assert_same_as_one_device(config, mesh_config, pipeline, routing):
    metrics, moments, state, evaluated, resolved = trained(config, mesh_config, pipeline, routing)
    want_metrics, want_moments, want_state, want_evaluated = reference(config, routing)
    for got, want in zip(metrics, want_metrics, strict=True):
        np.testing.assert_array_equal(got.counts, want.counts)
        for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, err_msg=name)
        assert want.grad_norm > config.optimizer.clip_norm  # clipping acts
        few_slots = mesh_config.expert > 2 and routing == "all on two experts"  # two devices have slots for all tokens
        assert not few_slots or got.exchange_rounds > 1
    assert_close(moments, reordered(resolved, want_moments), rtol=3e-5)
    got, want = jax.device_get(state), reordered(resolved, want_state)
    assert_close(got.router_bias, want.router_bias, rtol=0)
    assert_close(got.params, want.params, rtol=1e-4)
    assert_close(got.ema, want.ema, rtol=1e-4)
    np.testing.assert_allclose(evaluated, want_evaluated, rtol=1e-5)


MESHES = {
    "pipe 2": MeshConfig(pipe=2, data=1),
    "pipe 2 x data 2 x expert 2": MeshConfig(pipe=2, data=2, expert=2),
    "pipe 4 x expert 2": MeshConfig(pipe=4, data=1, expert=2),
    "pipe 8": MeshConfig(pipe=8, data=1),
}
FAST = [
    ("pipe 2 x data 2 x expert 2", "dualpipe", None, "zero1", "skewed"),
]
SLOW = [
    ("pipe 2", "zb1p", None, "zero1", "balanced"),
    ("pipe 2", "gpipe", None, "hsdp", "skewed"),
    ("pipe 2", "one_f_one_b", 8, "zero1", "skewed"),
    ("pipe 2", "dualpipe_v", None, "zero1", "skewed"),
    ("pipe 2 x data 2 x expert 2", "dualpipe_v", 8, "hsdp", "all on two experts"),
    ("pipe 4 x expert 2", "dualpipe", None, "fsdp", "all on two experts"),
    ("pipe 4 x expert 2", "dualpipe", 16, "hsdp", "skewed"),
    ("pipe 4 x expert 2", "one_f_one_b", 8, "fsdp", "skewed"),
    ("pipe 4 x expert 2", "zb1p", 16, "hsdp", "two groups and the rest empty"),
    ("pipe 8", "dualpipe", None, "zero1", "balanced"),
    ("pipe 8", "dualpipe", 32, "fsdp", "skewed"),
    ("pipe 8", "zb1p", 16, "zero1", "skewed"),
]


def test_no_array_that_enters_the_stages_is_empty(config):
    """XLA of jax 0.11 dies of one. Of so few micro-batches no joined cell ends with a transfer."""
    config = resolve(dataclasses.replace(config, mesh=MESHES["pipe 2"], pipeline=PipelineConfig()), 2)
    mesh = make_mesh(config.mesh, jax.devices()[:2])
    traced = make_train_step(config, mesh).trace(abstract_state(config, mesh), place(batches()[0], mesh), SETTINGS)
    (stages,) = (eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "shard_map")
    assert min(var.aval.size for var in stages.invars) > 0


def cases():
    for case in FAST + SLOW:
        words = [str(part) for part in case if part is not None]
        yield pytest.param(*case, id=", ".join(words), marks=pytest.mark.slow if case in SLOW else ())


@pytest.mark.parametrize(("mesh", "schedule", "microbatches", "sharding", "routing"), list(cases()))
def test_pipeline_equals_one_device(config, mesh, schedule, microbatches, sharding, routing):
    mesh_config = dataclasses.replace(MESHES[mesh], sharding=sharding)
    pipeline = PipelineConfig(schedule=schedule, microbatches=microbatches)
    assert_same_as_one_device(config, mesh_config, pipeline, routing)


@pytest.mark.slow
def test_bf16_is_as_near_to_fp32_as_on_one_device(config):
    """Of every parameter's gradient: the distance to FP32, of the pipeline and of one device, relative to its norm."""
    rounded = dataclasses.replace(config, precision="bf16")
    exact = trained(config, ONE_DEVICE, PipelineConfig(microbatches=4), "balanced", steps=1)[1]
    one = trained(rounded, ONE_DEVICE, PipelineConfig(microbatches=4), "balanced", steps=1)[1]
    *_, resolved = found = trained(rounded, MESHES["pipe 2"], PipelineConfig(schedule="dualpipe"), "balanced", steps=1)

    def distances(moments, want):
        pairs = zip(jax.tree.leaves(moments), jax.tree.leaves(want), strict=True)
        return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])

    of_one, of_pipeline = distances(one, exact), distances(found[1], reordered(resolved, exact))
    assert (of_one > 1e-4).all()  # it is rounded
    assert (of_pipeline < 2 * of_one + 1e-3).all()


@pytest.mark.parametrize(
    ("mesh", "pipeline", "line"),
    [
        (
            MeshConfig(pipe=3, data=1),
            PipelineConfig(microbatches=8),
            "mesh.pipe=3: wanted an even number; the nearest: 2",
        ),
        (
            MeshConfig(pipe=4, data=1),
            PipelineConfig(microbatches=4),
            "pipeline.microbatches=4: wanted an even number, at least",
        ),
        (
            MeshConfig(pipe=8, data=1),
            PipelineConfig(schedule="dualpipe_v", microbatches=16),
            "mesh.pipe=8: wanted at most 5: 16 stages are more than the 11 layers",
        ),
    ],
    ids=["odd stages", "too few micro-batches", "more stages than layers"],
)
def test_a_pipeline_that_does_not_fit_is_one_line(config, mesh, pipeline, line):
    with pytest.raises(ConfigError, match=line):
        require_pipeline(dataclasses.replace(config, mesh=mesh, pipeline=pipeline), [ROWS])
