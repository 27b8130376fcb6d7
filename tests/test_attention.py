"""Blockwise attention: exact, with gradients, and linear in memory."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from moejax.ops import plain_attention
from moejax.ops.attention import attention

SCALE = 0.3
LENGTHS = {
    "one token": (1, 8),
    "shorter than a block": (5, 8),
    "whole blocks": (24, 8),
    "a few blocks and a rest": (37, 8),
    "many blocks and a rest": (37, 3),
    "blocks of one token": (6, 1),
}


def draw(length, seed=0, rows=2, heads=2, qk=5, v=3):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, heads, dim) for dim in (qk, qk, v, v)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]  # q, k, v and a change of the output


def segments(length, rows=2):
    """Row 0 has documents of several lengths, row 1 one document."""
    ids = np.zeros((rows, length), np.int32)
    ids[0] = np.cumsum(np.isin(np.arange(length), [1, 4, 5, length // 2]))
    return ids


def dense(q, k, v, ids):
    """The definition, with all scores at once."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * SCALE
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if ids is not None:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")


def gradients(function, change, *qkv):
    """The output, and the gradients of q, k and v when it changes by `change`."""
    out, back = jax.vjp(function, *qkv)
    return out, *back(change)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("size", LENGTHS)
def test_values_match_naive_and_gradients_the_dense_form(size, documents):
    length, block = LENGTHS[size]
    q, k, v, change = draw(length)
    ids = segments(length) if documents else None
    ids_ours = None if ids is None else jnp.array(ids)
    got = jax.jit(lambda *x: gradients(lambda *y: attention(*y, SCALE, ids_ours, block=block), *x))(change, q, k, v)
    for row in range(2):
        exact = [x[row].astype(float) for x in (q, k, v)]
        want = naive.attention(*exact, SCALE, None if ids is None else ids[row])
        np.testing.assert_allclose(got[0][row], want, rtol=1e-5, atol=2e-6)  # float32, sums of up to 37 terms
    want = jax.jit(lambda *x: gradients(lambda *y: dense(*y, ids), *x))(change, q, k, v)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6, err_msg=name)


def test_rows_in_turns_give_what_they_give_together(monkeypatch):
    *qkv, change = draw(20, rows=6)
    ids = jnp.array(segments(20, rows=6))

    def made():
        return jax.jit(lambda *x: gradients(lambda *y: attention(*y, SCALE, ids, block=6), *x))(change, *qkv)

    together = made()
    monkeypatch.setattr(plain_attention, "_SCORES", 3 * 4 * 2 * 6 * 20)  # of three rows
    for name, a, b in zip(("out", "dq", "dk", "dv"), made(), together, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)


def test_gradients_match_finite_differences_in_float64():
    *qkv, change = draw(11, rows=1)
    got = jax.jit(lambda *x: gradients(lambda *y: attention(*y, SCALE, block=4), *x))(change, *qkv)[1:]
    exact = [x[0].astype(float) for x in qkv]
    rng = np.random.default_rng(1)
    for part in range(3):
        direction = rng.normal(size=exact[part].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(exact)
            moved[part] = exact[part] + step * direction
            ends.append(np.sum(naive.attention(*moved, SCALE) * change[0]))
        np.testing.assert_allclose(np.sum(got[part][0] * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-4)


def test_large_scores_do_not_overflow():
    q, k, v, _ = draw(20)
    got = jax.jit(lambda *x: attention(*x, SCALE, block=6))(1e3 * q, 1e3 * k, v)
    np.testing.assert_allclose(got, dense(1e3 * q, 1e3 * k, v, None), rtol=1e-5, atol=2e-6)


def test_bf16_is_as_exact_as_its_inputs():
    q, k, v, _ = (jnp.array(x, jnp.bfloat16) for x in draw(20))
    got = jax.jit(lambda *x: attention(*x, SCALE, block=6))(q, k, v)
    assert got.dtype == jnp.bfloat16
    want = dense(*(x.astype(jnp.float32) for x in (q, k, v)), None)
    np.testing.assert_allclose(got.astype(np.float32), want, atol=2 * 2.0**-8 * np.abs(want).max())


def array_sizes(jaxpr):
    """Number of elements of every array that a program makes, loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(variable.aval.shape)) for variable in equation.outvars)
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        for value in inner:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from array_sizes(value)


def step(q, k, v):
    return jax.grad(lambda *x: attention(*x, SCALE, block=64).sum(), argnums=(0, 1, 2))(q, k, v)


def test_no_array_is_quadratic_in_the_length():
    length = 2048
    shapes = [jax.ShapeDtypeStruct((1, length, 1, dim), jnp.float32) for dim in (8, 8, 8)]
    sizes = list(array_sizes(jax.make_jaxpr(step)(*shapes).jaxpr))
    assert max(sizes) <= length * 64 < length**2
    assert length * 8 in sizes


def test_compiled_memory_is_linear_in_the_length():
    temporary = []
    for length in (2048, 4096):
        shapes = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)] * 3
        temporary.append(jax.jit(step).lower(*shapes).compile().memory_analysis().temp_size_in_bytes)
    assert 0 < temporary[0] < 2048**2 * 4
    assert temporary[1] <= 2.1 * temporary[0]
