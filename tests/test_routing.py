"""The gates, the bias update and the counts, against references of one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from moejax.config import MoEConfig
from moejax.ops import routing

GATES = {
    "V3": MoEConfig(),
    "two best of a group": MoEConfig(num_experts=16, num_groups=4, top_groups=2, top_k=4),
    "three best of a group": MoEConfig(num_experts=24, num_groups=4, top_groups=2, top_k=6),
    "groups of one expert": MoEConfig(num_experts=6, num_groups=6, top_groups=2, top_k=2),
    "no groups": MoEConfig(num_experts=8, num_groups=1, top_groups=1, top_k=3),
    "all experts": MoEConfig(num_experts=8, num_groups=2, top_groups=2, top_k=8),
    "not normalised": MoEConfig(num_experts=16, num_groups=4, top_groups=2, top_k=4, normalize_weights=False),
    "V2": MoEConfig(
        num_experts=160,
        num_groups=8,
        top_groups=3,
        top_k=6,
        gate="group_limited_greedy",
        normalize_weights=False,
        route_scale=16.0,
    ),
    "V2-Lite": MoEConfig(
        num_experts=64,
        num_groups=1,
        top_groups=1,
        top_k=6,
        gate="greedy",
        normalize_weights=False,
        route_scale=1.0,
    ),
}
ROUTE = jax.jit(routing.route, static_argnums=2)
BIASES = {"no bias": (0.0, 0.0), "small bias": (0.0, 0.1), "bias below zero": (-3.0, 0.3), "bias above 1": (5.0, 0.3)}


def want(logits, bias, cfg):
    """ids, weights and scores of all tokens by the naive gates."""
    sizes = (cfg.num_groups, cfg.top_groups, cfg.top_k, cfg.normalize_weights, cfg.route_scale)
    if cfg.gate == "noaux_tc":
        rows = [naive.gate_v3(row, bias, *sizes) for row in logits]
    else:
        rows = [naive.gate_v2(row, *sizes) for row in logits]
    return tuple(np.array([row[part] for row in rows]) for part in range(3))


def draw(cfg, bias, tokens=40, seed=0):
    mean, spread = BIASES[bias]
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, cfg.num_experts)).astype(np.float32)
    return logits, (mean + spread * rng.normal(size=cfg.num_experts)).astype(np.float32)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("gate", GATES)
def test_route_matches_naive(gate, bias):
    cfg = GATES[gate]
    logits, biases = draw(cfg, bias)
    ids, weights, scores = ROUTE(logits, biases, cfg)
    want_ids, want_weights, want_scores = want(logits.astype(float), biases.astype(float), cfg)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=2e-6, atol=0)  # float32: a few ulp
    np.testing.assert_allclose(scores, want_scores, rtol=2e-6, atol=0)
    assert weights.dtype == scores.dtype == jnp.float32


@pytest.mark.parametrize("gate", ["two best of a group", "not normalised", "V2", "V2-Lite"])
def test_gradient_of_weights_matches_finite_differences(gate):
    cfg = GATES[gate]
    logits, bias = draw(cfg, "small bias", tokens=4)
    mix = np.random.default_rng(1).normal(size=(4, cfg.top_k))
    got = jax.jit(jax.grad(lambda x: (routing.route(x, jnp.array(bias), cfg)[1] * mix).sum()))(logits)
    step, exact = 1e-5, logits.astype(float)
    for token, expert in np.ndindex(2, min(cfg.num_experts, 20)):
        change = np.zeros_like(exact)
        change[token, expert] = step
        up, down = (np.sum(want(x, bias.astype(float), cfg)[1] * mix) for x in (exact + change, exact - change))
        np.testing.assert_allclose(got[token, expert], (up - down) / (2 * step), rtol=1e-4, atol=2e-6 * cfg.route_scale)


@pytest.mark.parametrize("gate", ["V3", "V2"])
def test_bias_has_no_gradient(gate):
    cfg = GATES[gate]
    logits, bias = draw(cfg, "small bias")
    got = jax.jit(jax.grad(lambda b: sum(x.sum() for x in routing.route(jnp.array(logits), b, cfg)[1:])))(bias)
    np.testing.assert_array_equal(got, 0)


def test_unchosen_groups_stay_out_when_all_biased_scores_are_negative():
    """Group 1 has the best pair; a mask of 0 instead of -inf would pick the worst experts of group 0."""
    cfg = MoEConfig(num_experts=4, num_groups=2, top_groups=1, top_k=2)
    ids, _, _ = ROUTE(jnp.array([[0.0, 0.0, 1.0, 2.0]]), jnp.full(4, -9.0), cfg)
    np.testing.assert_array_equal(ids, [[3, 2]])


def test_choice_is_invariant_to_a_common_shift_of_the_bias():
    cfg = GATES["two best of a group"]
    logits, bias = draw(cfg, "small bias")
    ids = [ROUTE(logits, bias + shift, cfg)[0] for shift in (0.0, 2.0, -2.0)]
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[0], ids[2])


def test_route_scale_multiplies_the_weights_only():
    cfg = GATES["V3"]
    logits, bias = draw(cfg, "small bias")
    once = ROUTE(logits, bias, dataclasses.replace(cfg, route_scale=1.0))
    twice = ROUTE(logits, bias, dataclasses.replace(cfg, route_scale=2.0))
    np.testing.assert_array_equal(once[0], twice[0])
    np.testing.assert_array_equal(2 * once[1], twice[1])
    np.testing.assert_allclose(once[1].sum(-1), 1, rtol=1e-6)


def test_update_bias_matches_naive():
    """A layer with all loads different, one with loads at the mean, one where one expert has all tokens."""
    counts = np.array([[3, 9, 0, 4], [5, 5, 5, 5], [0, 0, 40, 0]], np.int32)
    bias = np.array([[0.0, 1.0, -2.0, 3.0], [4.0, 0.0, -1.0, 2.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    got = routing.update_bias(jnp.array(bias), jnp.array(counts), 0.25)
    np.testing.assert_array_equal(got, [naive.update_bias(b, c, 0.25) for b, c in zip(bias, counts, strict=True)])
    np.testing.assert_array_equal(got[1], bias[1])


def test_expert_counts_are_exact():
    ids = np.random.default_rng(0).integers(6, size=(50, 3))
    np.testing.assert_array_equal(routing.expert_counts(jnp.array(ids), 7), np.bincount(ids.reshape(-1), minlength=7))
