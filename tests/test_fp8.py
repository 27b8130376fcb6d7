"""FP8 in tiles against NumPy references written from section 3.3 of the V3 report (`naive.py`).

Quantised numbers and scales are compared bit by bit. Products are sums of some hundred exact products in float32
there, in double here: their bound is 1e-5 of the largest, or a BF16 rounding (2^-8) where results are BF16.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import naive
import numpy as np
import pytest

from moejax.ops.experts import routed_swiglu, sort_by_expert
from moejax.ops.fp8 import dequantise_rows, keep_rows, kept_rows, quantise_blocks, quantise_columns, quantise_rows
from moejax.ops.grouped import grouped_dot, grouped_outer
from moejax.ops.linear import feed_forward, linear

BF16 = 2.0**-8
GROUPS = {
    "uneven": (130, 1, 57),
    "empty": (0, 200, 0, 100),
    "one has all": (0, 0, 300),
    "rows beyond the groups": (100, 30),
    "no row at all": (0, 0),
}


def numbers(shape, seed=0):
    """Ordinary ones, and all that is hard: zeros, numbers that vanish, huge ones, ties and powers of two."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32) * np.exp(rng.normal(size=(*shape[:-1], 1)) * 3)
    hard = np.asarray([0, -0.0, 1e-30, -1e-7, 3e38, -1e30, 448, 224, 2.0**-9, 1.0625, 17, 27], np.float32)
    x.reshape(-1)[rng.permutation(x.size)[: x.size // 20]] = rng.choice(hard, x.size // 20)
    return x.astype(ml_dtypes.bfloat16)


def assert_bits(scaled, values, scales):
    np.testing.assert_array_equal(np.asarray(scaled.values).view(np.uint8), values.view(np.uint8))
    np.testing.assert_array_equal(scaled.scales, scales)


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any scale", "powers of two"])
@pytest.mark.parametrize("shape", [(5, 256), (130, 300), (3, 48)], ids=str)
def test_rows_are_quantised_bit_by_bit(shape, power_of_two):
    x = numbers(shape)
    values, scales = naive.quantise(x, (1, 128), power_of_two)
    assert_bits(jax.jit(quantise_rows, static_argnums=1)(x, power_of_two), values, scales[:, ::128])
    assert not np.isnan(values.astype(np.float32)).any()


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
def test_blocks_are_quantised_bit_by_bit(transposed):
    w = np.stack([numbers((200, 300), seed).astype(np.float32) for seed in range(2)])
    got = jax.jit(quantise_blocks, static_argnums=1)(w, transposed)
    for expert, matrix in enumerate(w):
        values, scales = naive.quantise(matrix, (128, 128))
        values, scales = (values.T, scales.T) if transposed else (values, scales)
        assert_bits(jax.tree.map(lambda a, e=expert: a[e], got), values, scales[::128, ::128])


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any scale", "powers of two"])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_columns_are_quantised_by_the_tokens_of_each_expert(sizes, power_of_two):
    x = numbers((300, 40))
    x[sum(sizes) :] = np.nan  # nobody's
    got = jax.jit(quantise_columns, static_argnums=2)(x, jnp.asarray(sizes), power_of_two)
    tile, start = 0, 0
    for size in sizes:
        tiles = -(-size // 128)
        values, scales = naive.quantise(x[start : start + size], (128, 1), power_of_two)
        place = np.asarray(got.values)[:, tile * 128 :]
        np.testing.assert_array_equal(place[:, :size].view(np.uint8), values.T.view(np.uint8))
        np.testing.assert_array_equal(place[:, size : tiles * 128].astype(np.float32), 0)
        np.testing.assert_array_equal(got.scales[tile : tile + tiles], scales[::128])
        tile, start = tile + tiles, start + size
    np.testing.assert_array_equal(np.asarray(got.values)[:, tile * 128 :].astype(np.float32), 0)


def test_rows_become_columns_without_loss_where_scales_are_powers_of_two():
    """All that may get lost is a number 2^15 times smaller than its new tile's largest, or more."""
    x = np.random.default_rng(0).normal(size=(128, 256)).astype(np.float32)
    rows = quantise_rows(jnp.asarray(x), power_of_two=True)
    columns = quantise_columns(rows, None, power_of_two=True)
    before = np.asarray(rows.values, np.float32) * np.repeat(rows.scales, 128, 1)
    after = np.asarray(columns.values, np.float32).T * np.repeat(columns.scales, 128, 0)
    np.testing.assert_array_equal(before[np.abs(before) > 2.0**-14], after[np.abs(before) > 2.0**-14])


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_grouped_products_are_of_fp8_numbers(sizes):
    rng = np.random.default_rng(1)
    x, dy = (rng.normal(size=(300, n)).astype(np.float32) for n in (200, 70))
    w = rng.normal(size=(len(sizes), 200, 70)).astype(np.float32)
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    x_RI, dy_RO, w_EIO, sizes_E = map(jnp.asarray, (x, dy, w, sizes))
    y = grouped_dot(quantise_rows(x_RI), w_EIO, sizes_E, jnp.float32)
    dx = grouped_dot(quantise_rows(dy_RO), w_EIO, sizes_E, jnp.float32, transposed=True)
    dw = grouped_outer(quantise_columns(x_RI, sizes_E), quantise_columns(dy_RO, sizes_E), sizes_E)
    start = 0
    for expert, size in enumerate(sizes):
        own = slice(start, start + size)
        w8 = naive.quantise(w[expert], (128, 128))
        want = naive.scaled_product(naive.quantise(x[own], (1, 128)), naive.turned(w8))
        np.testing.assert_allclose(y[own], want, atol=1e-5 * np.abs(want).max(initial=0))
        want = naive.scaled_product(naive.quantise(dy[own], (1, 128)), w8)
        np.testing.assert_allclose(dx[own], want, atol=1e-5 * np.abs(want).max(initial=0))
        x8, dy8 = (naive.turned(naive.quantise(a[own], (128, 1))) for a in (x, dy))
        want = naive.scaled_product(x8, dy8)
        np.testing.assert_allclose(dw[expert], want, atol=1e-5 * np.abs(want).max())
        start += size
    for beyond in (y, dx):
        np.testing.assert_array_equal(beyond[start:], 0)


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any scale", "powers of two"])
def test_a_linear_layer_and_its_gradients(power_of_two):
    rng = np.random.default_rng(2)
    x, dy = (rng.normal(size=(2, 150, n)).astype(ml_dtypes.bfloat16) for n in (200, 70))
    w = rng.normal(size=(200, 70)).astype(ml_dtypes.bfloat16).astype(np.float32)
    y, pull = jax.vjp(lambda x, w: linear(x, w, True, power_of_two), jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(dy))
    flat_x, flat_dy = x.reshape(300, -1).astype(np.float32), dy.reshape(300, -1).astype(np.float32)
    wants = naive.fp8_linear(flat_x, w, flat_dy, power_of_two)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for got, want, rounding in zip((y, dx, dw), wants, (BF16, BF16, 1e-5), strict=True):
        got = np.asarray(got, np.float32).reshape(want.shape)
        np.testing.assert_allclose(got, want, rtol=rounding, atol=1e-5 * np.abs(want).max())


def naive_expert(x, gate_up, down, weights, dy, power_of_two):
    """One expert's SwiGLU in FP8: y, and the gradients of x, both matrices and the weights."""

    def bf16(a):
        return np.asarray(a).astype(ml_dtypes.bfloat16).astype(np.float32)

    def halves(h):
        gate, up = np.split(h, 2, axis=-1)
        return gate, up, naive.sigmoid(gate)

    def activation(h):
        gate, up, sigmoid = halves(h)
        plain = bf16(gate * sigmoid * up)
        return plain, bf16(plain * weights[:, None])

    def again(rows, p2):
        return naive.quantise(rows[0].astype(np.float32) * rows[1], (128, 1), p2)

    x8, gate_up8, down8 = (
        naive.quantise(x, (1, 128), power_of_two),
        *(naive.quantise(w, (128, 128)) for w in (gate_up, down)),
    )
    h = bf16(naive.scaled_product(x8, naive.turned(gate_up8)))
    y = bf16(naive.scaled_product(naive.quantise(activation(h)[1], (1, 128)), naive.turned(down8)))
    kept = naive.quantise(h, (1, 128))
    h = bf16(kept[0].astype(np.float32) * kept[1])
    plain, weighted = activation(h)
    dy8 = naive.quantise(dy, (1, 128), power_of_two)
    du = bf16(naive.scaled_product(dy8, down8))
    gate, up, sigmoid = halves(h)
    scaled = du * weights[:, None]
    dh = bf16(np.concatenate([scaled * up * sigmoid * (1 + gate * (1 - sigmoid)), scaled * gate * sigmoid], axis=-1))
    dx = bf16(naive.scaled_product(naive.quantise(dh, (1, 128)), gate_up8))
    columns = [naive.turned(a) for a in (again(x8, power_of_two), naive.quantise(dh, (128, 1)))]
    dy_columns = again(dy8, power_of_two) if power_of_two else naive.quantise(dy, (128, 1))
    ddown = naive.scaled_product(naive.turned(naive.quantise(weighted, (128, 1))), naive.turned(dy_columns))
    return y, dx, naive.scaled_product(*columns), ddown, (du * plain).sum(-1)


def close(got, want):
    """But for the few numbers that another rounding before a quantiser pushes to the next E4M3 number."""
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    assert np.linalg.norm(got.reshape(want.shape) - want) < 5e-3 * np.linalg.norm(want)


def rounded(rng, *shape):
    return rng.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)


def test_a_dense_network_and_its_gradients():
    rng = np.random.default_rng(3)
    x, dy = (rng.normal(size=(300, 96)).astype(ml_dtypes.bfloat16) for _ in range(2))
    gate_up, down = rounded(rng, 96, 160) / 8, rounded(rng, 80, 96) / 8
    y, pull = jax.vjp(lambda *a: feed_forward(*a, fp8=True), *map(jnp.asarray, (x, gate_up, down)))
    want = naive_expert(x.astype(np.float32), gate_up, down, np.ones(300, np.float32), dy.astype(np.float32), False)
    for a, b in zip((y, *pull(jnp.asarray(dy))), want[:4], strict=True):
        close(a, b)


@pytest.mark.parametrize("max_rows", [None, 160], ids=["one pass", "passes"])
def test_routed_experts_and_their_gradients(max_rows):
    """Every expert alone, with the rows that it has: with passes the tiles of a weight's gradient end at each pass."""
    rng = np.random.default_rng(4)
    tokens, choices, experts = 150, 2, 4
    ids = np.stack([rng.permutation(3)[:choices] for _ in range(tokens)]).astype(np.int32)  # nobody chooses the last
    x, dy = (rng.normal(size=(tokens, 96)).astype(ml_dtypes.bfloat16) for _ in range(2))
    weights = rng.random((tokens, choices)).astype(np.float32)
    gate_up, down = rounded(rng, experts, 96, 80) / 8, rounded(rng, experts, 40, 96) / 8
    rows = *sort_by_expert(jnp.asarray(ids)), jnp.asarray(np.bincount(ids.reshape(-1), minlength=experts))
    y, pull = jax.vjp(
        lambda *a: routed_swiglu(*a, *rows, max_rows=max_rows, fp8=True), *map(jnp.asarray, (x, weights, gate_up, down))
    )
    dx, dweights, dgate_up, ddown = pull(jnp.asarray(dy))
    want_y, want_dx = np.zeros((tokens, 96)), np.zeros((tokens, 96))
    for expert in range(experts):
        token, choice = np.nonzero(ids == expert)
        own = (
            x[token].astype(np.float32),
            gate_up[expert],
            down[expert],
            weights[token, choice],
            dy[token].astype(np.float32),
        )
        if not len(token):
            np.testing.assert_array_equal(dgate_up[expert], 0)
            np.testing.assert_array_equal(ddown[expert], 0)
            continue
        y_R, dx_R, want_gate_up, want_down, want_weights = naive_expert(*own, True)
        np.add.at(want_y, token, y_R)
        np.add.at(want_dx, token, dx_R)
        close(np.asarray(dweights)[token, choice], want_weights)
        if max_rows is None:
            close(dgate_up[expert], want_gate_up)
            close(ddown[expert], want_down)
        else:  # other tiles: the noise of their E4M3 numbers, each within 2^-4 of itself, in both factors
            for got, want in ((dgate_up, want_gate_up), (ddown, want_down)):
                assert np.linalg.norm(got[expert] - want) < 0.07 * np.linalg.norm(want)
    close(y, want_y)
    close(dx, want_dx)


@pytest.mark.parametrize("network", ["linear", "dense", "routed"])
def test_the_backward_pass_keeps_activations_as_fp8(network):
    """Of the arrays that have a row a token, no one of the width of the model or of the experts has 2 bytes or more."""
    x, gate_up, down = jnp.ones((256, 96), jnp.bfloat16), jnp.ones((1, 96, 80)), jnp.ones((1, 40, 96))
    if network == "linear":
        run = functools.partial(linear, w=gate_up[0], fp8=True)
    elif network == "dense":
        run = functools.partial(feed_forward, gate_up=gate_up[0], down=down[0], fp8=True)
    else:
        rows = *sort_by_expert(jnp.zeros((256, 1), jnp.int32)), jnp.asarray([256])

        def run(x):
            return routed_swiglu(x, jnp.ones((256, 1)), gate_up, down, *rows, fp8=True)

    _, pull = jax.vjp(run, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.ndim == 2 and leaf.shape[0] == 256 and leaf.shape[1] >= 40]
    widths = {96} if network == "linear" else {96, 80}
    assert {(leaf.shape[1], leaf.dtype.name) for leaf in kept} == {(width, "uint8") for width in widths}


def test_what_is_kept_under_a_name_is_also_used_unchanged():
    """JAX rounds what a policy of `jax.checkpoint` saves where it is used; E4M3 above 240 would not survive that."""
    x = jnp.asarray(np.linspace(-448, 448, 256).reshape(1, 256), jnp.float32)

    def call(scale):
        rows = kept_rows(keep_rows(quantise_rows(x), "kept"))
        return scale * dequantise_rows(rows)

    saving = jax.checkpoint(call, policy=jax.checkpoint_policies.save_only_these_names("kept"))
    y, pull = jax.jit(lambda scale: jax.vjp(saving, scale))(jnp.ones(()))
    np.testing.assert_array_equal(y, call(jnp.ones(())))
    np.testing.assert_allclose(pull(jnp.ones_like(y))[0], y.sum(), rtol=1e-5)
