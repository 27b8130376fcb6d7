import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.data.batches import Batch
from moejax.mesh import one_device_mesh
from moejax.model.count import train_flops_per_token
from moejax.train.state import abstract_state, model_structure, new_state
from moejax.train.step import StepSettings, make_eval_step, make_train_step, place

SETTINGS = StepSettings(learning_rate=np.float32(1e-3), bias_update_speed=np.float32(0.01), mtp_weight=np.float32(0.3))


def batch_of(config, seed=0):
    rows, length = config.data.batch_size, config.data.sequence_length + 1
    tokens = np.random.default_rng(seed).integers(0, config.model.vocab_size, (rows, length), dtype=np.int32)
    return Batch(tokens, np.zeros_like(tokens), np.ones(tokens.shape, bool))


def run(config, batches, settings=SETTINGS, poison=None):
    mesh = one_device_mesh()
    state, step = new_state(config, mesh), make_train_step(config, mesh)
    if poison is not None:
        state = poison(state)
    for batch in batches:
        state, metrics = step(state, place(batch, mesh), settings)
    return jax.device_get((state, metrics))


def assert_trees_close(got, want, rtol):
    """Every leaf within `rtol` of its largest number."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        atol = rtol * max(float(np.abs(b).max(initial=0)), 1e-12)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_microbatches_add_up_to_the_whole_batch(run_config, change):
    batches = [batch_of(run_config)]
    whole, whole_metrics = run(run_config, batches)
    cut, cut_metrics = run(change(run_config, "pipeline.microbatches", 4), batches)
    np.testing.assert_array_equal(cut_metrics.counts, whole_metrics.counts)
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        np.testing.assert_allclose(getattr(cut_metrics, name), getattr(whole_metrics, name), rtol=1e-5, err_msg=name)
    # Adam's first moment after one step is (1 - beta1) times the clipped gradient: every parameter's gradient
    assert_trees_close(cut.opt_state[0].mu, whole.opt_state[0].mu, rtol=2e-5)
    assert_trees_close(cut.router_bias, whole.router_bias, rtol=0)


def test_gradients_are_those_of_the_whole_batchs_mean_loss(run_config, change):
    """Of four micro-batches through the executor, against one differentiation of the model on all rows."""
    config, mesh = change(run_config, "pipeline.microbatches", 4), one_device_mesh()
    batch, state = batch_of(config), new_state(config, mesh)
    mask = np.random.default_rng(1).random(batch.tokens.shape) < 0.8

    def objective(params, biases):
        model = nnx.merge(model_structure(config), params, biases)
        losses = model.losses(jnp.asarray(batch.tokens), jnp.asarray(mask), None, jnp.float32)
        return (losses.main + SETTINGS.mtp_weight * losses.mtp) / mask[:, 1:].sum() + losses.balance

    want = jax.device_get(jax.jit(jax.grad(objective))(*jax.device_get((state.params, state.router_bias))))
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(want)))
    factor = 0.1 * min(1, config.optimizer.clip_norm / norm)  # of Adam's first moment
    got, metrics = run(config, [dataclasses.replace(batch, loss_mask=mask)])
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    assert_trees_close(got.opt_state[0].mu, jax.tree.map(lambda g: factor * g, want), rtol=2e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_rematerialisation_changes_no_gradient(run_config, change, remat):
    batches = [batch_of(run_config)]
    cheap, cheap_metrics = run(run_config, batches)
    other, metrics = run(change(run_config, "model.remat", remat), batches)
    np.testing.assert_allclose(metrics.loss, cheap_metrics.loss, rtol=1e-6)
    assert_trees_close(other.opt_state[0].mu, cheap.opt_state[0].mu, rtol=2e-5)


@pytest.mark.parametrize(("unroll", "remat"), [(2, "cheap"), (9, "cheap"), (9, "none")])
def test_unrolled_layers_change_no_gradient(run_config, change, unroll, remat):
    batches = [batch_of(run_config)]
    looped, looped_metrics = run(run_config, batches)
    other, metrics = run(change(change(run_config, "model.unroll", unroll), "model.remat", remat), batches)
    np.testing.assert_allclose(metrics.loss, looped_metrics.loss, rtol=1e-6)
    assert_trees_close(other.opt_state[0].mu, looped.opt_state[0].mu, rtol=2e-5)


def test_rematerialisation_saves_memory(run_config, change):
    config = change(change(run_config, "model.num_layers", 7), "data.batch_size", 32)

    def temporary_bytes(remat):
        again, mesh = change(config, "model.remat", remat), one_device_mesh()
        state = abstract_state(again, mesh)
        batch = jax.eval_shape(lambda: place(batch_of(again), mesh))
        return make_train_step(again, mesh).lower(state, batch, SETTINGS).compile().memory_analysis().temp_size_in_bytes

    assert 1.5 * temporary_bytes("full") < 1.25 * temporary_bytes("cheap") < temporary_bytes("none")


def test_every_parameter_has_a_gradient(run_config):
    state, _ = run(run_config, [batch_of(run_config)])
    for path, moment in jax.tree_util.tree_leaves_with_path(state.opt_state[0].mu):
        assert np.abs(moment).max() > 0, jax.tree_util.keystr(path)


def test_counts_are_of_all_tokens_and_move_the_biases(run_config):
    state, metrics = run(run_config, [batch_of(run_config)])
    top_k, tokens = run_config.model.moe.top_k, run_config.data.batch_size * run_config.data.sequence_length
    mtp_tokens = run_config.data.batch_size * (run_config.data.sequence_length - 1)
    np.testing.assert_array_equal(metrics.counts.sum(-1), [top_k * tokens, top_k * tokens, top_k * mtp_tokens])
    biases = np.concatenate([np.asarray(b) for b in jax.tree.leaves(state.router_bias)])
    want = 0.01 * np.sign(metrics.counts.mean(-1, keepdims=True) - metrics.counts)
    np.testing.assert_array_equal(biases, want.astype(np.float32))


def test_bias_speed_0_leaves_the_biases(run_config):
    settings = StepSettings(np.float32(1e-3), np.float32(0), np.float32(0.3))
    state, _ = run(run_config, [batch_of(run_config)], settings)
    assert not any(np.any(b) for b in jax.tree.leaves(state.router_bias))


def test_two_runs_are_bitwise_equal(run_config):
    batches = [batch_of(run_config, seed) for seed in range(3)]
    first, second = run(run_config, batches), run(run_config, batches)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_that_is_not_finite_leaves_the_state(run_config):
    def poison(state):
        head = state.params["head_DV"][...]
        state.params["head_DV"][...] = jax.device_put(np.where(np.eye(*head.shape) > 0, np.inf, head), head.sharding)
        return state

    before = jax.device_get(poison(new_state(run_config, one_device_mesh())))
    after, metrics = run(run_config, [batch_of(run_config)], poison=poison)
    assert not metrics.finite and not np.isfinite(metrics.loss)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


def test_average_of_the_weights_follows_them(run_config, change):
    config = change(run_config, "optimizer.ema_decay", 0.75)
    start = jax.device_get(new_state(config, one_device_mesh()))
    after, _ = run(config, [batch_of(config)])
    want = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, start.params, after.params)
    assert_trees_close(after.ema, want, rtol=1e-6)


def test_masked_documents_do_not_see_each_other(run_config, change):
    """Two documents in a row give the loss of each alone, weighted by its tokens."""
    config = change(change(run_config, "data.mask_documents", True), "model.mtp.depth", 0)
    mesh, batch = one_device_mesh(), batch_of(config)
    state, evaluate = new_state(config, mesh), make_eval_step(config, mesh)

    def summed_loss(segments, mask):
        return float(evaluate(state, place(Batch(batch.tokens, segments, mask), mesh))[0])

    segments, mask = np.zeros_like(batch.tokens), np.ones(batch.tokens.shape, bool)
    segments[:, 12:] = 1
    mask[:, 12] = False
    both = summed_loss(segments, mask)
    first = summed_loss(np.zeros_like(segments), mask & (segments == 0))
    changed = Batch(np.where(segments == 0, 7, batch.tokens), segments, mask & (segments == 1))
    second = float(evaluate(state, place(changed, mesh))[0])
    np.testing.assert_allclose(both, first + second, rtol=1e-6)


def test_bf16_follows_fp32(run_config, change):
    """BF16 rounds each of a few dozen sums in a row by 2^-9; the loss, a mean of 128 logarithms, moves far less."""
    batches = [batch_of(run_config, seed) for seed in range(3)]
    _, exact = run(run_config, batches)
    state, rounded = run(change(run_config, "precision", "bf16"), batches)
    np.testing.assert_allclose(rounded.loss, exact.loss, rtol=5e-3)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}


def test_compile_time_does_not_grow_with_depth(run_config, change):
    """The layers are scanned: the traced step has the same equations at any depth."""

    def traced(layers):
        config, mesh = change(run_config, "model.num_layers", layers), one_device_mesh()
        state = abstract_state(config, mesh)
        step = make_train_step(config, mesh)
        return str(step.trace(state, jax.eval_shape(lambda: place(batch_of(config), mesh)), SETTINGS).jaxpr).count("\n")

    assert traced(3) == traced(9)


def test_flop_count_matches_xla(run_config, change):
    """XLA counts products (and little else here) of a step without recomputation, loops and attention's blocks."""
    config = change(change(run_config, "model.remat", "none"), "model.loss_chunk", 1 << 20)
    config = change(change(change(config, "model.num_layers", 1), "model.num_dense_layers", 1), "model.mtp.depth", 0)
    config = change(change(config, "model.hidden_size", 256), "model.dense_width", 512)
    mesh = one_device_mesh()
    step = make_train_step(config, mesh)
    compiled = step.lower(new_state(config, mesh), place(batch_of(config), mesh), SETTINGS).compile()
    tokens = config.data.batch_size * config.data.sequence_length
    length = config.data.sequence_length
    # XLA sees the whole square of attention's scores, and the backward pass computes them once more
    a = config.model.attention
    pair = 2 * a.num_heads * length * (a.qk_nope_dim + a.qk_rope_dim + a.v_dim)
    extra = tokens * (3 * pair / 2 + 2 * a.num_heads * length * (a.qk_nope_dim + a.qk_rope_dim))
    want = train_flops_per_token(config.model, length) * tokens + extra
    got = compiled.cost_analysis()["flops"]
    assert want <= got <= 1.1 * want  # the rest is norms, softmax and the optimizer
