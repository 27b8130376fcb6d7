"""Rotary positions and YaRN, against a rotation of one pair at a time."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from moejax.config import AttentionConfig, YarnConfig
from moejax.ops import rope

YARNS = {
    "no YaRN": None,
    "V3": YarnConfig(),
    "V2": YarnConfig(mscale=0.707, mscale_all_dim=0.707),
    "cos and sin scaled": YarnConfig(factor=8.0, original_length=256, mscale=1.0, mscale_all_dim=0.5),
    "one pair between kept and divided": YarnConfig(original_length=64, beta_fast=2.0, beta_slow=1.9),
}


def as_dict(yarn):
    if yarn is None:
        return None
    return {
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


@pytest.mark.parametrize("dim", [2, 4, 16, 64])
@pytest.mark.parametrize("yarn", YARNS)
def test_frequencies_match_naive(yarn, dim):
    got = rope.frequencies(dim, 10000.0, YARNS[yarn])
    np.testing.assert_allclose(got, naive.frequencies(dim, 10000.0, as_dict(YARNS[yarn])), rtol=1e-12)


def test_v3_ramp_runs_from_pair_10_to_pair_23():
    plain, extended = rope.frequencies(64, 10000.0, None), rope.frequencies(64, 10000.0, YarnConfig())
    share = plain / extended
    np.testing.assert_allclose(share[:11], 1, rtol=1e-12)
    np.testing.assert_allclose(share[23:], 40, rtol=1e-12)
    assert np.all(np.diff(share[10:24]) > 0)


@pytest.mark.parametrize(
    ("yarn", "want"),
    [(None, 0.0721688), (YarnConfig(), 0.1352338), (YARNS["V2"], 192**-0.5 * 1.2608**2)],
    ids=["4K training", "V3 in long context", "V2 in long context"],
)
def test_published_softmax_scales(yarn, want):
    np.testing.assert_allclose(rope.softmax_scale(AttentionConfig(yarn=yarn)), want, rtol=1e-5)


@pytest.mark.parametrize("yarn", YARNS)
def test_rotation_matches_naive(yarn):
    cfg = AttentionConfig(qk_rope_dim=16, yarn=YARNS[yarn])
    positions = np.array([[0, 1, 2, 7, 63], [5, 4, 100, 1000, 3]])
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16)).astype(np.float32)
    got = rope.rotate(jnp.array(x), rope.rotation(jnp.array(positions), cfg))
    freqs = naive.frequencies(16, cfg.rope_theta, as_dict(cfg.yarn))
    magnitude = naive.rotary_magnitude(as_dict(cfg.yarn))
    want = np.empty(x.shape)
    for row, place, head in np.ndindex(2, 5, 3):
        want[row, place, head] = magnitude * naive.rotate(x[row, place, head], positions[row, place], freqs)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)  # float32 angles up to 1000 rad are exact to 6e-5
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-5)


def test_gradient_of_rotation_is_the_rotation_back():
    cfg = AttentionConfig(qk_rope_dim=8)
    positions = jnp.arange(6)[None]
    x, change = np.random.default_rng(0).normal(size=(2, 1, 6, 2, 8)).astype(np.float32)
    _, transpose = jax.vjp(lambda x: rope.rotate(x, rope.rotation(positions, cfg)), x)
    back = rope.rotate(jnp.array(change), rope.rotation(-positions, cfg))
    np.testing.assert_allclose(transpose(jnp.array(change))[0], back, atol=1e-6)


def test_products_depend_on_the_distance_only():
    cfg = AttentionConfig(qk_rope_dim=16, yarn=YarnConfig())
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def product(at_q, at_k):
        turned = [rope.rotate(jnp.array(x), rope.rotation(jnp.array([[at]]), cfg)) for x, at in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    np.testing.assert_allclose(product(9, 4), product(105, 100), rtol=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-2
