"""Attention over cached latents against the naive attention, whose keys and values are made from the latents."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from moejax.ops.latent import absorb_queries, attend, store, values_of

H, C, K, R, V = 3, 6, 5, 4, 7
SLOTS, SCALE = 12, 0.4


@pytest.fixture(scope="module")
def parts():
    rng = np.random.default_rng(0)
    shapes = {"q": (2, SLOTS, H, K), "q_rot": (2, SLOTS, H, R), "c": (2, SLOTS, C), "k_rot": (2, SLOTS, R)}
    shapes |= {"key": (C, H, K), "value": (C, H, V)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def want(p, row, length):
    """The naive attention of the first `length` positions of a row: [length, H, V]."""
    c, k_rot = p["c"][row, :length], p["k_rot"][row, :length]
    k = np.concatenate([np.einsum("tc,chk->thk", c, p["key"]), np.repeat(k_rot[:, None], H, axis=1)], axis=-1)
    q = np.concatenate([p["q"][row, :length], p["q_rot"][row, :length]], axis=-1)
    return naive.attention(q, k, np.einsum("tc,chv->thv", c, p["value"]), SCALE)


def got(p, cache, positions, block):
    """The output at each row's positions [B, S]."""
    rows = np.arange(2)[:, None]
    q = absorb_queries(*(jnp.float32(p[name][rows, positions]) for name in ("q", "q_rot")), jnp.float32(p["key"]))
    mixed = attend(q, cache, jnp.asarray(positions), C, SCALE, block)
    return values_of(mixed, jnp.float32(p["value"]))


@pytest.mark.parametrize("block", [4, 12], ids=["blocks of slots", "all slots at once"])
def test_rows_of_different_lengths_match_naive(parts, block):
    """The first row is at positions 5 to 7, the second at 9 to 11; slots beyond hold what nothing may see."""
    cache = jnp.full((2, SLOTS, C + R), 50.0)
    lengths, positions = (8, 12), np.asarray([[5, 6, 7], [9, 10, 11]])
    entries = np.concatenate([parts["c"], parts["k_rot"]], axis=-1).astype(np.float32)
    for row, length in enumerate(lengths):
        cache = cache.at[row, :length].set(entries[row, :length])
    out = jax.jit(lambda cache: got(parts, cache, positions, block))(cache)
    for row, length in enumerate(lengths):
        expected = want(parts, row, length)[length - 3 :]
        np.testing.assert_allclose(out[row], expected, atol=2e-6 * np.abs(expected).max() * SLOTS)  # float32 sums


def test_store_leaves_out_positions_without_a_slot():
    cache = jnp.zeros((2, 4, 1))
    new = jnp.arange(1.0, 7.0).reshape(2, 3, 1)
    stored = store(cache, new, jnp.asarray([[-1, 0, 1], [2, 3, 4]]))
    np.testing.assert_array_equal(stored[..., 0], [[2, 3, 0, 0], [0, 0, 4, 5]])
