"""Drawing tokens: temperature, top-k, top-p, and the acceptance of drafts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.serve.sampling import Sampling, accepted, draw, keys_for, probabilities

PROBS = np.asarray([0.15, 0.5, 0.05, 0.3])
DRAWS = 20_000


def kept_probabilities(**options):
    sampling = Sampling(**options)
    numbers = sampling.temperature, sampling.top_k, sampling.top_p
    return np.asarray(probabilities(jnp.log(jnp.float32(PROBS)), sampling.kind, numbers))


def keys(count):
    return jax.random.key_data(jax.random.split(jax.random.key(7), count))


def assert_shares(tokens, probs):
    """The share of a token with probability p in n draws has the standard deviation sqrt(p (1 - p) / n)."""
    shares = np.bincount(tokens, minlength=len(probs)) / len(tokens)
    np.testing.assert_array_less(np.abs(shares - probs), 4.5 * np.sqrt(probs * (1 - probs) / len(tokens)) + 1e-12)


@pytest.mark.parametrize(
    "options, want",
    [
        ({}, PROBS),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, PROBS**2 / (PROBS**2).sum()),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 0.625, 0, 0.375]),
        ({"top_k": 9}, PROBS),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 0.625, 0, 0.375]),
        ({"top_p": 0.81}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # of the two that are left, the first has 0.625
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_probabilities_are_those_that_the_settings_leave(options, want):
    got = kept_probabilities(**options)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_array_equal(got == 0, np.asarray(want) == 0)


def test_draws_follow_the_probabilities():
    probs = jnp.broadcast_to(jnp.float32(PROBS), (DRAWS, 4))
    assert_shares(np.asarray(draw(probs, keys(DRAWS), "plain")), PROBS)


def test_key_of_a_token_is_its_own():
    """Rows with equal keys and numbers draw alike; another number or purpose is another draw."""
    key = jnp.broadcast_to(keys(1), (3, 2))
    made = np.asarray(keys_for(key, jnp.asarray([4, 4, 5]), 1))
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != made[2]).any() and (made[0] != np.asarray(keys_for(key, jnp.asarray([4, 4, 5]), 2))[0]).any()


def test_accepted_drafts_leave_the_probabilities_as_they_are():
    """Two drafts, of other probabilities than the model's: the tokens of each place have the model's."""
    rng = np.random.default_rng(3)
    model, draft = (rng.dirichlet(np.full(4, 0.7), size=3) for _ in range(2))
    q = np.broadcast_to(draft[:2], (DRAWS, 2, 4)).astype(np.float32)
    p = np.broadcast_to(model, (DRAWS, 3, 4)).astype(np.float32)
    drafts = np.stack([rng.choice(4, size=DRAWS, p=draft[k]) for k in range(2)], axis=1).astype(np.int32)
    kept, rest = accepted(drafts, q, p, rng.random((DRAWS, 2)).astype(np.float32))
    last = np.asarray(draw(rest, keys(DRAWS), "plain"))
    kept = np.asarray(kept)
    chance = np.minimum(model, draft).sum(-1)  # that a draft is accepted
    assert_shares(kept, np.asarray([1 - chance[0], chance[0] * (1 - chance[1]), chance[0] * chance[1]]))
    assert_shares(np.where(kept > 0, drafts[:, 0], last), model[0])
    first = kept >= 1
    assert_shares(np.where(kept > 1, drafts[:, 1], last)[first], model[1])
    pairs = (4 * drafts[:, 0] + np.where(kept > 1, drafts[:, 1], last))[first]  # of a first draft that was accepted
    assert_shares(pairs, np.outer(np.minimum(model[0], draft[0]) / chance[0], model[1]).reshape(-1))
    assert_shares(last[kept == 2], model[2])


def test_without_chance_drafts_are_accepted_up_to_the_first_that_differs():
    likeliest = jnp.asarray([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    drafts = jnp.asarray([[1, 2], [1, 0], [0, 2]])
    one_hot = lambda tokens: jax.nn.one_hot(tokens, 4)  # noqa: E731
    kept, rest = accepted(drafts, one_hot(drafts), one_hot(likeliest), jnp.full((3, 2), 0.999))
    np.testing.assert_array_equal(kept, [2, 1, 0])
    np.testing.assert_array_equal(draw(rest, keys(3), "greedy"), [3, 2, 1])


@pytest.mark.parametrize(
    "options, error",
    [
        ({"temperature": -1.0}, "temperature=-1.0: wanted 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan: wanted 0 or more"),
        ({"top_k": -1}, "top_k=-1: wanted 0 or more"),
        ({"top_p": 0.0}, "top_p=0.0: wanted above 0, at most 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, error):
    with pytest.raises(ConfigError, match=error):
        Sampling(**options)
