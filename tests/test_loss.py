import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.loss import cross_entropy


def dense(x, head, targets):
    return -jax.nn.log_softmax(x @ head)[jnp.arange(len(targets)), targets]


@pytest.mark.parametrize("chunk", [7, 20, 40, 1000], ids=["does not divide", "divides", "all", "more than all"])
def test_cross_entropy_matches_dense_in_values_and_gradients(key, chunk):
    x, head = jax.random.normal(key, (30, 16)), jax.random.normal(jax.random.key(1), (16, 40))
    targets = jax.random.randint(jax.random.key(2), (30,), 0, 40)
    weights = jax.random.normal(jax.random.key(3), (30,))
    np.testing.assert_allclose(cross_entropy(x, head, targets, chunk), dense(x, head, targets), rtol=0, atol=5e-6)
    got = jax.grad(lambda x, w: (cross_entropy(x, w, targets, chunk) * weights).sum(), argnums=(0, 1))(x, head)
    want = jax.grad(lambda x, w: (dense(x, w, targets) * weights).sum(), argnums=(0, 1))(x, head)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=5e-6 * float(jnp.abs(w).max()))


def test_cross_entropy_of_far_apart_logits_is_finite():
    x, head = jnp.full((2, 1), 1e4), jnp.asarray([[1.0, -1.0, 0.5]])
    np.testing.assert_allclose(cross_entropy(x, head, jnp.asarray([0, 1]), 2), [0, 2e4])


def test_logits_are_never_whole():
    tokens, vocab, chunk = 64, 1024, 128
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 8), (8, vocab))]
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    gradient = jax.grad(lambda x, w, t: cross_entropy(x, w, t, chunk).sum(), argnums=(0, 1))
    text = jax.jit(gradient).lower(*shapes, targets).compile().as_text()
    assert f"f32[{tokens},{chunk}]" in text
    assert f"[{tokens},{vocab}]" not in text and f"[{vocab},{tokens}]" not in text
