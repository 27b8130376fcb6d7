import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.ops import grouped
from moejax.ops.experts import routed_swiglu, sort_by_expert
from moejax.ops.grouped import grouped_dot, grouped_outer

D, F = 8, 4
ROUTINGS = {
    "one token": (1, 4, 2),
    "some": (50, 4, 2),
    "one group longer than a large block": (500, 2, 2),
    "many experts, most of them empty": (5, 64, 2),
}


def layer(ids_TK, num_experts, seed=0):
    """Tokens, weights and matrices of a layer, float32."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return draw(ids_TK.shape[0], D), draw(*ids_TK.shape), draw(num_experts, D, 2 * F) / 2, draw(num_experts, F, D) / 2


def routed(ids_TK, x_TD, weights_TK, gate_up, down, **passes):
    """A choice of -1 is absent."""
    experts = gate_up.shape[0]
    order_R, row_TK = sort_by_expert(jnp.where(ids_TK < 0, experts, ids_TK))
    sizes_E = (ids_TK.reshape(-1)[:, None] == jnp.arange(experts)).sum(0)
    return routed_swiglu(x_TD, weights_TK, gate_up, down, order_R, row_TK, sizes_E, **passes)


def every_expert_for_every_token(ids_TK, x_TD, weights_TK, gate_up, down):
    """The obviously right form, for gradients."""
    gate, up = jnp.split(jnp.einsum("td,edf->tef", x_TD, gate_up), 2, axis=-1)
    y_TED = jnp.einsum("tef,efd->ted", jax.nn.silu(gate) * up, down)
    weights_TE = (jax.nn.one_hot(ids_TK, gate_up.shape[0]) * weights_TK[..., None]).sum(1)
    return jnp.einsum("ted,te->td", y_TED, weights_TE)


def assert_equal_to_naive(ids_TK, num_experts, **passes):
    arrays = layer(ids_TK, num_experts)
    function = functools.partial(routed, **passes)
    got = jax.jit(function)(ids_TK, *arrays)
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in arrays)
    gate, up = np.split(gate_up, 2, axis=-1)
    present = np.where(ids_TK < 0, 0, weights)
    want = naive.experts(x, np.asarray(ids_TK), present, *(w.swapaxes(1, 2) for w in (gate, up, down)))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1, np.abs(want).max()))

    dy = jnp.asarray(np.random.default_rng(1).normal(size=want.shape), jnp.float32)
    pull = lambda f: jax.jit(jax.grad(lambda a: (f(ids_TK, *a) * dy).sum()))(arrays)  # noqa: E731
    names = ("tokens", "weights", "gate and up", "down")
    for name, g, w in zip(names, pull(function), pull(every_expert_for_every_token), strict=True):
        bound = 4e-6 * max(1, float(jnp.abs(w).max()))
        np.testing.assert_allclose(g, w, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("blocks", [None, (16, 4)], ids=["blocks as they are", "small blocks"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routed_experts_match_naive(routing, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(grouped, "_LARGE", blocks[0])
        monkeypatch.setattr(grouped, "_SMALL", blocks[1])
    tokens, experts, per_token = ROUTINGS[routing]
    order = np.argsort(np.random.default_rng(2).random((tokens, experts)), axis=1)
    assert_equal_to_naive(jnp.asarray(order[:, :per_token], jnp.int32), experts)


def test_routed_experts_match_naive_when_all_tokens_go_to_one_expert():
    assert_equal_to_naive(jnp.full((130, 1), 3, jnp.int32), 6)


@pytest.mark.parametrize("keep", [True, False], ids=["first pass kept", "nothing kept"])
@pytest.mark.parametrize("max_rows", [1, 16, 25, 150], ids=["row by row", "few rows", "just enough rows", "all rows"])
def test_passes_of_few_rows_match_naive(max_rows, keep):
    """Of 50 tokens' 150 choices 25 are present, a token's first being present or not."""
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((50, 4)), axis=1)[:, :3]
    ids[rng.permuted(np.arange(150) >= 25).reshape(50, 3)] = -1
    assert_equal_to_naive(jnp.asarray(ids, jnp.int32), 4, max_rows=max_rows, keep=keep)


@pytest.mark.parametrize("ids", [np.full((9, 2), -1), np.full((9, 1), 2)], ids=["no choice present", "one expert only"])
def test_passes_match_naive_at_the_extremes(ids):
    assert_equal_to_naive(jnp.asarray(ids, jnp.int32), 3, max_rows=4)


def test_no_product_has_more_rows_than_a_pass():
    ids, arrays = jnp.zeros((600, 2), jnp.int32), layer(jnp.zeros((600, 2)), 2)
    jaxpr = jax.make_jaxpr(jax.grad(lambda a: routed(ids, *a, max_rows=40).sum()))(arrays)
    products = [e.invars[0].aval.shape for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) > 6 and all(shape[0] <= 40 for shape in products)


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 80),
    experts=st.integers(1, 7),
    per_token=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    favour=st.floats(0, 8),
)
def test_routed_experts_match_naive_whatever_the_routing(tokens, experts, per_token, seed, favour):
    rng = np.random.default_rng(seed)
    liking = rng.normal(size=experts) * favour + rng.gumbel(size=(tokens, experts))
    ids = np.argsort(-liking, axis=1)[:, : min(per_token, experts)]
    assert_equal_to_naive(jnp.asarray(ids, jnp.int32), experts)


def test_gradient_of_empty_groups_is_exactly_zero():
    ids = jnp.asarray([[1], [1], [4]], jnp.int32)
    arrays = layer(ids, 6)
    gate_up, down = jax.grad(lambda g, d: routed(ids, *arrays[:2], g, d).sum(), argnums=(0, 1))(*arrays[2:])
    empty = np.asarray([0, 2, 3, 5])
    np.testing.assert_array_equal(gate_up[empty], 0)
    np.testing.assert_array_equal(down[empty], 0)
    assert np.all(np.abs(gate_up[np.asarray([1, 4])]).max((1, 2)) > 0)


def test_rows_beyond_the_groups_give_zero_and_take_no_part():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(100, D)), jnp.float32).at[60:].set(jnp.nan)
    w = jnp.asarray(rng.normal(size=(3, D, F)), jnp.float32)
    sizes = jnp.asarray([20, 0, 40])
    y = grouped_dot(x, w, sizes, jnp.float32)
    np.testing.assert_array_equal(y[60:], 0)
    assert np.isfinite(y).all()
    dy = jnp.asarray(rng.normal(size=(100, F)), jnp.float32)
    want = np.stack([x[:20].T @ dy[:20], np.zeros((D, F)), x[20:60].T @ dy[20:60]])
    np.testing.assert_allclose(grouped_outer(x, dy, sizes), want, rtol=0, atol=2e-5)


def test_cost_follows_the_rows_and_not_the_number_of_experts():
    """The products in the compiled program are of blocks of rows; none is of all rows, or has experts as a dim."""
    rows, experts = 2048, 16
    shapes = jax.ShapeDtypeStruct((rows, D), jnp.float32), jax.ShapeDtypeStruct((experts, D, F), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda *a: grouped_dot(*a, jnp.float32))(
        *shapes, jax.ShapeDtypeStruct((experts,), jnp.int32)
    )
    products = [e.outvars[0].aval.shape for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert sorted(products) == [(length, F) for length in range(128, 769, 128)]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
