"""The balance losses, against sums over one token at a time."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from moejax.config import BalanceConfig, MoEConfig
from moejax.ops import routing

SEQUENCES, LENGTH, EXPERTS = 3, 10, 8
BALANCE = jax.jit(routing.balance_loss, static_argnums=(2, 3))
LOSSES = {
    "sequence": BalanceConfig(sequence=0.5),
    "device": BalanceConfig(sequence=0.0, device=0.7, devices=4, device_limit=2),
    "communication": BalanceConfig(sequence=0.0, communication=0.9, devices=4, device_limit=2),
    "all of V2": BalanceConfig(sequence=0.003, device=0.05, communication=0.02, devices=2, device_limit=1),
}


def settings(balance, top_k=3):
    return MoEConfig(num_experts=EXPERTS, num_groups=1, top_groups=1, top_k=top_k, gate="greedy", balance=balance)


def draw(top_k=3):
    scores = np.random.default_rng(0).uniform(0.01, 1, size=(SEQUENCES, LENGTH, EXPERTS)).astype(np.float32)
    return scores, naive.top_ids(scores, top_k)


def want(scores, ids, b):
    return (
        naive.sequence_balance_loss(scores, ids, b.sequence)
        + naive.device_balance_loss(scores, ids, b.device, b.devices)
        + naive.communication_balance_loss(scores, ids, b.communication, b.devices, b.device_limit)
    )


def flat(x):
    return jnp.array(x.reshape(SEQUENCES * LENGTH, -1))


@pytest.mark.parametrize("name", LOSSES)
def test_balance_loss_matches_naive(name):
    scores, ids = draw()
    got = BALANCE(flat(scores), flat(ids), SEQUENCES, settings(LOSSES[name]))
    np.testing.assert_allclose(got, want(scores.astype(float), ids, LOSSES[name]), rtol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_matches_finite_differences(name):
    scores, ids = draw()
    cfg = settings(LOSSES[name])
    got = jax.jit(jax.grad(lambda s: routing.balance_loss(s, flat(ids), SEQUENCES, cfg)))(flat(scores))
    exact, step = scores.astype(float), 1e-6
    for place in [(0, 0, 0), (0, 9, 7), (1, 4, 3), (2, 5, 5)]:
        change = np.zeros_like(exact)
        change[place] = step
        slope = (want(exact + change, ids, LOSSES[name]) - want(exact - change, ids, LOSSES[name])) / (2 * step)
        np.testing.assert_allclose(got.reshape(exact.shape)[place], slope, rtol=1e-3, atol=1e-8)


def test_perfect_balance_gives_alpha():
    scores = np.full((SEQUENCES, LENGTH * 4, EXPERTS), 0.3, np.float32)
    ids = np.arange(SEQUENCES * LENGTH * 4 * 2).reshape(SEQUENCES, LENGTH * 4, 2) % EXPERTS
    cfg = settings(BalanceConfig(sequence=1e-4), top_k=2)
    got = BALANCE(jnp.array(scores.reshape(-1, EXPERTS)), jnp.array(ids.reshape(-1, 2)), SEQUENCES, cfg)
    np.testing.assert_allclose(got, 1e-4, rtol=1e-6)


def test_one_unbalanced_sequence_is_not_hidden_by_another():
    """Two sequences, each with all tokens on two experts of its own: balanced as a batch, not each for itself."""
    ids = np.repeat([[[0, 1]], [[2, 3]]], 5, axis=1)
    scores = np.full((2, 5, 4), 0.1)
    np.put_along_axis(scores, ids, 0.9, axis=-1)
    cfg = MoEConfig(num_experts=4, num_groups=1, top_groups=1, top_k=2, balance=BalanceConfig(sequence=1.0))
    got = BALANCE(jnp.array(scores.reshape(-1, 4)), jnp.array(ids.reshape(-1, 2)), 2, cfg)
    np.testing.assert_allclose(got, 1.8, rtol=1e-6)


def test_v3_counts_the_best_by_unbiased_scores():
    """Equation 18: the experts that the bias chose do not enter."""
    scores, best = draw()
    cfg = MoEConfig(num_experts=EXPERTS, num_groups=4, top_groups=2, top_k=3, balance=BalanceConfig(sequence=0.5))
    got = BALANCE(flat(scores), flat((best + 1) % EXPERTS), SEQUENCES, cfg)
    np.testing.assert_allclose(got, naive.sequence_balance_loss(scores.astype(float), best, 0.5), rtol=2e-6)
