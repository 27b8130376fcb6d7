"""The training step on every mesh against one device: losses, every gradient, the biases and the parameters.

Adam's first moment after one step is (1 - beta1) times the clipped gradient of every parameter. Float32 sums of a few
hundred numbers in another order differ by a few 1e-6 of the largest; the bounds are 10 times that. Three optimizer
steps are followed with an epsilon of Adam's that is no smaller than the gradients' noise, as a step of a parameter
whose gradient is 0 would otherwise have a random sign.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import ONE_DEVICE, MeshConfig, OptimizerConfig, PipelineConfig, RunConfig
from moejax.data.batches import Batch
from moejax.mesh import BATCH_AXES, make_mesh, one_device_mesh, resolve
from moejax.model import prefetch
from moejax.ops import grouped, plain_attention
from moejax.plan.collectives import collectives
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
    return [batch(np.random.default_rng(step), (ROWS, 33)) for step in range(steps)]


def batch(rng, shape):
    documents = np.cumsum(rng.random(shape) < 0.1, axis=1, dtype=np.int32)
    return Batch(rng.integers(0, 264, shape, dtype=np.int32), documents, rng.random(shape) < 0.9)


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


def assert_same_as_one_device(config, mesh_config, routing, want=None):
    metrics, moments, state = trained(config, mesh_config, routing)
    want_metrics, want_moments, want_state = want or reference(config, routing)
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


@pytest.mark.slow
def test_layers_in_a_loop_equal_one_device(config, change):
    """The models of the other tests have so few layers that they are not scanned with FSDP."""
    config = change(config, "model.num_layers", config.model.num_dense_layers + prefetch.UNROLLED + 1)
    assert_same_as_one_device(config, MeshConfig(data=2, expert=4, sharding="fsdp"), "skewed")


def test_layers_unrolled_and_attention_row_by_row_equal_one_device(config, change, monkeypatch):
    """One device has the layers in a loop, attention in one block and all rows at once, and large blocks of experts."""
    want = reference(config, "skewed")
    monkeypatch.setattr(plain_attention, "_SCORES", 1)
    monkeypatch.setattr(grouped, "_LARGE", 16)
    monkeypatch.setattr(grouped, "_SMALL", 4)
    config = change(change(config, "model.unroll", 9), "model.attention.block", 5)
    assert_same_as_one_device(config, MeshConfig(data=2, expert=2), "skewed", want)


# ------------------------------------------------------------------------------------------------- the compiled program


def abstract_step(config, mesh_config):
    """The step and the shapes of its arguments."""
    config = resolve(dataclasses.replace(config, mesh=mesh_config), mesh_config.batch_shards)
    mesh = make_mesh(config.mesh, jax.devices()[: mesh_config.batch_shards])
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(BATCH_AXES))), batches(1)[0]
    )
    return train_step(config, mesh), (abstract_state(config, mesh), batch, SETTINGS)


@functools.cache
def compiled_step(config, mesh_config):
    step, arguments = abstract_step(config, mesh_config)
    return step.lower(*arguments).compile()


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_reductions_happen_once_per_step(config, sharding):
    """In the loop over micro-batches there is no all-reduce, and with ZeRO-1 no gradient of a gathered weight."""
    mesh = MeshConfig(data=2, expert=4) if sharding != "hsdp" else MeshConfig(replica=2, data=2, expert=2)
    found = collectives(compiled_step(config, dataclasses.replace(mesh, sharding=sharding)).as_text())
    assert any(c.looped for c in found)
    assert not [c for c in found if c.kind == "all-reduce" and c.looped]
    looped = {c.dims for c in found if c.kind == "reduce-scatter" and c.looped}
    head_chunk = ((32, 12),)  # 100 / 8 columns of the head: it is never whole, so its gradient is not either
    assert looped == {head_chunk} if sharding == "zero1" else head_chunk not in looped or len(looped) > 1


def test_expert_weights_stay_with_their_experts(config):
    """ZeRO-1 gathers a device's experts from the devices that share them, before the loop, and never all experts."""
    found = collectives(compiled_step(config, MeshConfig(data=2, expert=4)).as_text())
    gathers = [c for c in found if c.kind == "all-gather"]
    own = [c for c in gathers if c.dims[0][-3:] in ((2, 32, 32), (2, 16, 32)) and len(c.dims[0]) == 4]
    assert len(own) == 4 and not any(c.looped for c in own)  # two matrices of the MoE layers, two of the MTP module
    assert all(set(c.groups) == {(0, 4), (1, 5), (2, 6), (3, 7)} for c in own)
    assert not [c for c in gathers if 8 in c.dims[0][:-2]]
    alone = collectives(compiled_step(config, MeshConfig(data=1, expert=8)).as_text())
    assert not [c for c in alone if c.kind == "all-gather" and len(c.dims[0]) == 4]


def test_embedding_head_and_logits_are_never_whole(config):
    """Of arrays with a dim of the vocabulary, 264, there are only 4 columns or rows: one of 8 devices' share."""
    text = compiled_step(config, MeshConfig(data=2, expert=4)).as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    assert (264, 4) in shapes and (32, 33) in shapes  # the embedding's columns and the head's
    assert all(np.prod(shape) <= 264 * 4 for shape in shapes if 264 in shape)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_training_state_lies_in_shards(config, sharding):
    mesh_config = MeshConfig(replica=2, data=2, expert=2, sharding=sharding)
    _, (state, *_) = abstract_step(config, mesh_config)
    shards = {"zero1": 8, "fsdp": 8, "hsdp": 4}[sharding]
    for part in (state.params, state.opt_state[0].mu, state.opt_state[0].nu, state.ema):
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            axes = {axis for entry in leaf.sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
            assert axes - {None} == set(mesh_config.shard_axes), jax.tree_util.keystr(path)
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * shards == leaf.size
    experts = state.params["moe_blocks"]["ffn"]["gate_up_EDG"].get_value().sharding.spec
    assert experts == P(None, "expert", ("replica", "data") if sharding != "hsdp" else "data", None)
    given = jax.tree.leaves(compiled_step(config, mesh_config).input_shardings[0][0])
    for leaf, used in zip(jax.tree.leaves(state), given, strict=True):
        assert used.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_state_is_drawn_alike_on_every_mesh(config):
    want = first_state(config.model, config.optimizer)
    config = resolve(dataclasses.replace(config, mesh=MeshConfig(replica=2, data=2, expert=2)), 8)
    state = new_state(config, make_mesh(config.mesh))
    placed = abstract_state(config, make_mesh(config.mesh))
    for got, like, leaf in zip(*map(jax.tree.leaves, (state, want, placed)), strict=True):
        np.testing.assert_array_equal(got, like)
        assert got.sharding == leaf.sharding


def test_fsdp_gathers_a_layer_while_the_one_before_computes(config, change):
    """In the loops over layers what is gathered is handed to the next round, forward and backward."""
    layers = prefetch.UNROLLED + 1
    config = change(change(config, "model.num_layers", 2 * layers), "model.num_dense_layers", layers)
    step, arguments = abstract_step(config, MeshConfig(data=8, sharding="fsdp"))
    bodies = [body for body in scan_bodies(step.trace(*arguments).jaxpr.jaxpr) if gathers_weights(body)]
    of_layers = [
        body
        for body in bodies
        if not any(eqn.primitive.name == "scan" and gathers_weights(inner_jaxpr(eqn)) for eqn in body.eqns)
    ]
    assert len(of_layers) == 4  # dense and MoE layers, forward and backward; another is the one over micro-batches
    for body in of_layers:
        read = {id(v) for eqn in body.eqns for v in eqn.invars}
        handed_on = {id(v) for v in body.outvars}
        for eqn in body.eqns:
            if eqn.primitive.name == "all_gather":
                assert id(eqn.outvars[0]) in handed_on and id(eqn.outvars[0]) not in read


def inner_jaxpr(eqn):
    return eqn.params["jaxpr"].jaxpr


def gathers_weights(body):
    return sum(eqn.primitive.name == "all_gather" for eqn in body.eqns) > 5


def scan_bodies(jaxpr):
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                if eqn.primitive.name == "scan":
                    yield inner
                yield from scan_bodies(inner)


def test_gradients_may_travel_in_bf16(config):
    """BF16 keeps 8 bits; a sum of 8 rounded numbers is off by at most a few times 2^-9 of the largest."""
    mesh = MeshConfig(data=8, sharding="fsdp", gradient_dtype="bf16")
    _, moments, _ = trained(config, mesh, "balanced", steps=1)
    _, want, _ = reference(config, "balanced")
    assert_close(moments, want, rtol=2e-2)
    with pytest.raises(AssertionError):
        assert_close(moments, want, rtol=1e-4)
