import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig
from moejax.mesh import AXES, make_mesh
from moejax.ops.loss import cross_entropy
from moejax.varying import vary_over


def dense(x, head, targets):
    return -jax.nn.log_softmax(x @ head)[jnp.arange(len(targets)), targets]


@pytest.mark.parametrize("keep", [False, True], ids=["computed again", "kept"])
@pytest.mark.parametrize("chunk", [7, 20, 40, 1000], ids=["does not divide", "divides", "all", "more than all"])
def test_cross_entropy_matches_dense_in_values_and_gradients(key, chunk, keep):
    x, head = jax.random.normal(key, (30, 16)), jax.random.normal(jax.random.key(1), (16, 40))
    targets = jax.random.randint(jax.random.key(2), (30,), 0, 40)
    weights = jax.random.normal(jax.random.key(3), (30,))
    ours = functools.partial(cross_entropy, targets_T=targets, chunk=chunk, keep=keep)
    np.testing.assert_allclose(ours(x, head), dense(x, head, targets), rtol=0, atol=5e-6)
    got = jax.grad(lambda x, w: (ours(x, w) * weights).sum(), argnums=(0, 1))(x, head)
    want = jax.grad(lambda x, w: (dense(x, w, targets) * weights).sum(), argnums=(0, 1))(x, head)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=5e-6 * float(jnp.abs(w).max()))


@pytest.mark.parametrize(("chunk", "keep"), [(1, False), (12, False), (12, True), (1000, True)])
def test_columns_over_devices_give_the_numbers_of_one(key, chunk, keep):
    """Of 10 columns on each of 4 devices 1, 3, 3 and 5 are gathered at one time."""
    mesh, axes = make_mesh(MeshConfig(data=2, expert=2), jax.devices()[:4]), ("data", "expert")
    x, head = jax.random.normal(key, (24, 16)), jax.random.normal(jax.random.key(1), (16, 40))
    targets, weights = jax.random.randint(jax.random.key(2), (24,), 0, 40), jax.random.normal(jax.random.key(3), (24,))

    def local(*arrays):
        x, head, targets, weights = (vary_over(a, AXES) for a in arrays)

        def loss(x, head):
            losses = cross_entropy(x, head, targets, chunk, axes, keep)
            return (losses * weights).sum(), losses

        (dx, dhead), losses = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, head)
        return losses, dx, dhead

    rows, columns = P(axes), P(None, axes)
    specs = rows, columns, rows, rows
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(AXES), P(AXES), P(None, AXES))))
    given = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((x, head, targets, weights), specs, strict=True))
    losses, *got = step(*given)
    np.testing.assert_allclose(losses, dense(x, head, targets), rtol=0, atol=5e-6)
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
