"""Numbers of 12 bits: against NumPy, at the edges, and as attention keeps them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.attention import attention
from moejax.ops.e5m6 import Packed, pack, unpack

HALF_STEP = 2.0**-7  # the largest relative error of a number with 6 bits of mantissa


def reference(x):
    """Rounded to steps of 2^-6 of the power of two below each number, which is no less than 2^-14 of scaled tiles.

    And how far numbers below that, which are rounded twice, may be from it: a step.
    """
    width = x.shape[-1]
    tiles = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % 128)]).reshape(*x.shape[:-1], -1, 128).astype(np.float64)
    largest = np.abs(tiles).max(-1, keepdims=True)
    scale = 2.0 ** (np.frexp(largest)[1] - 15)
    scaled = tiles / scale
    step = 2.0 ** (np.maximum(np.frexp(scaled)[1] - 1, -14) - 6)
    found = np.round(scaled / step) * step * scale, np.where(np.abs(scaled) < 2.0**-14, 2.0**-20 * scale, 0)
    return [a.reshape(*x.shape[:-1], -1)[..., :width].astype(np.float32) for a in found]


def drawn(*shape):
    """Numbers of many magnitudes, of bfloat16's precision."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * np.exp(4 * rng.standard_normal(shape))
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("shape", [(7, 128), (2, 3, 256), (5, 200), (4, 2, 33), (3, 1)], ids=str)
def test_rounds_as_the_reference_does(shape):
    x = drawn(*shape)
    packed = pack(jnp.asarray(x))
    assert packed.low.shape == shape and packed.high.shape == (*shape[:-1], -(-shape[-1] // 2))
    assert packed.low.dtype == packed.high.dtype == jnp.uint8
    expected, step = reference(x)
    assert (np.abs(unpack(packed) - expected) <= step).all()


def test_ties_go_to_even():
    steps = np.array([64.5, 65.5, 66.5, 127.5, -64.5, 127.0], np.float32)  # of a 64th of 64
    np.testing.assert_array_equal(unpack(pack(jnp.asarray(steps))), [64, 66, 66, 128, -64, 127])


def test_what_is_packed_is_kept():
    once = unpack(pack(jnp.asarray(drawn(6, 300))))
    np.testing.assert_array_equal(unpack(pack(once)), once)


@pytest.mark.parametrize("value", [0.0, 3e38, -3e38, 1e-30, 1.0], ids=str)
def test_edges_are_finite(value):
    x = jnp.full((2, 130), value, jnp.float32)
    np.testing.assert_allclose(unpack(pack(x)), x, rtol=HALF_STEP)


def test_bits_fit_twelve():
    packed = jax.eval_shape(pack, jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16))
    assert sum(a.size * a.dtype.itemsize * 8 for a in packed) == 4096 * (128 * 12 + 32)


def inputs(dtype=jnp.float32):
    return [
        jnp.asarray(np.random.default_rng(i).standard_normal((2, 96, 3, d)), dtype) for i, d in enumerate((24, 24, 16))
    ]


def test_attention_is_rounded_and_its_gradient_is_that_of_what_is_kept():
    q, k, v = inputs()
    exact = functools.partial(attention, scale=0.2, block=32)
    np.testing.assert_array_equal(exact(q, k, v, fp8=True), unpack(pack(exact(q, k, v))))

    def gradient(fp8):
        return jax.grad(lambda *a: (exact(*a, fp8=fp8) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)

    for rounded, plain in zip(gradient(True), gradient(False), strict=True):
        error = np.linalg.norm(rounded - plain) / np.linalg.norm(plain)
        assert 0 < error < 2 * HALF_STEP  # of the output's gradient, and of the output beside it


def test_backward_pass_keeps_twelve_bits():
    q, k, v = inputs(jnp.bfloat16)
    policy = jax.checkpoint_policies.save_only_these_names("attention_out")
    call = jax.checkpoint(functools.partial(attention, scale=0.2, fp8=True), policy=policy)
    kept = jax.tree.leaves(jax.vjp(call, q, k, v)[1])
    shapes = {(a.dtype.name, a.shape) for a in kept}
    packed = jax.eval_shape(pack, jax.ShapeDtypeStruct((2, 96, 3, 16), jnp.bfloat16))
    assert isinstance(packed, Packed)
    assert shapes >= {(a.dtype.name, a.shape) for a in packed}
    assert not [a for a in kept if a.dtype == jnp.bfloat16 and a.shape == v.shape and a is not v and not (a == v).all()]
