"""SwiGLU with the routing weight: interpreted, over groups of any size; and compiled for sm_90 with V3's widths."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ahead import compiled, lowered, lowered_in_loop, shape
from cases import over_groups
from interpret import call
from test_kernels_quantise import assert_same, columns_of, tiles_of

from moejax.kernels.swiglu import swiglu_gradient, swiglu_gradient_tiles, weighted_swiglu, weighted_swiglu_rows
from moejax.ops.swiglu import swiglu

BF16 = ml_dtypes.bfloat16
HALF_STEP = 2.0**-8  # of a bfloat16, relative: what a rounding moves it by at most
FEW_STEPS = 16 * 2.0**-24  # of float32: the exponential function, the quotient, and the products around them
OVERTURNED = (
    2 * FEW_STEPS / HALF_STEP
)  # how often such an error changes how a number is rounded, with evenly spread ones

over_widths = pytest.mark.parametrize("width", [256, 128, 48, 200], ids="{} wide".format)


@pytest.fixture
def draw():
    """h [R, 2 * F], the gradient of u [R, F], and the weights [R]; NaN in the first two from row `good` on."""
    random = np.random.default_rng(0)

    def arrays(rows, width, good=None):
        h = 3 * random.standard_normal((rows, 2 * width))
        du = random.standard_normal((rows, width)) * 2.0 ** random.integers(-8, 9, (rows, 1))
        if good is not None:
            h[good:] = du[good:] = np.nan
        return h.astype(BF16), du.astype(BF16), random.random(rows, np.float32)

    return arrays


def exact(h):
    """Gate, up, and the sigmoid of gate, float64."""
    gate, up = np.split(h.astype(np.float64), 2, axis=1)
    return gate, up, 1 / (1 + np.exp(-gate))


# ------------------------------------------------------------------------------------------------------- interpreted


@pytest.mark.interpreter
@over_widths
def test_weighted_swiglu_rounds_as_the_reference(draw, width):
    """Where an error of a few steps of float32 overturns a rounding, the result is one step of bfloat16 off."""
    h, _, weights = draw(37, width)
    got = call(weighted_swiglu, h, weights)
    want = (np.asarray(swiglu(jnp.asarray(h))).astype(np.float32) * weights[:, None]).astype(BF16)
    assert got.dtype == BF16 and (got != want).mean() <= 2 * OVERTURNED
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=4 * HALF_STEP, atol=0)


@pytest.mark.interpreter
@over_widths
def test_weighted_swiglu_is_the_formula(draw, width):
    h, _, weights = draw(37, width)
    gate, up, sigmoid = exact(h)
    want = gate * sigmoid * up * weights[:, None]
    got = call(weighted_swiglu, h, weights).astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=(1 + HALF_STEP + FEW_STEPS) ** 2 - 1, atol=0)  # rounded twice


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_swiglu_of_large_gates():
    """The exponential function overflows for one, and the result is 0; no NaN comes of it."""
    h = np.array([[-1e30, -100, 100, 1e30, 2, 2, 2, 2]], BF16)
    got = call(weighted_swiglu, h, np.ones(1, np.float32))
    np.testing.assert_array_equal(got, np.array([[0, 0, 200, 2e30]], BF16))


@pytest.mark.interpreter
@over_widths
def test_gradient_is_the_formulas(draw, width):
    h, du, weights = draw(37, width)
    gate, up, sigmoid = exact(h)
    dh, dweights = call(swiglu_gradient, h, du, weights)
    assert (dh.dtype, dweights.dtype) == (BF16, np.float32)
    d = du.astype(np.float64) * weights[:, None]
    want = d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * gate * sigmoid
    terms = np.abs(d * up) * sigmoid * (1 + np.abs(gate) * (1 - sigmoid)), np.abs(want[1])  # which may cancel
    error, allowed = np.abs(dh - np.hstack(want)), HALF_STEP * np.abs(np.hstack(want)) + FEW_STEPS * np.hstack(terms)
    assert (error <= allowed * (1 + HALF_STEP)).all(), (error / allowed).max()
    products = du * np.asarray(swiglu(jnp.asarray(h))).astype(np.float64)
    allowed = (2 * HALF_STEP * OVERTURNED + (width + 3) * 2.0**-24) * np.abs(products).sum(1)
    assert (np.abs(dweights - products.sum(1)) <= allowed).all()


@pytest.mark.interpreter
@over_widths
def test_rows_are_those_of_the_two_results(draw, width):
    h, _, weights = draw(37, width)
    u_rows, h_rows = call(weighted_swiglu_rows, h, weights)
    assert_same(u_rows, tiles_of(call(weighted_swiglu, h, weights), 1))
    assert_same(h_rows, tiles_of(h, 1))


def check_gradient_tiles(h, du, weights, sizes):
    """What it gives is what its parts would, quantised; rows beyond the groups are 0, whatever is in them."""
    values, scales = tiles_of(h, 1)
    got = call(lambda *a: swiglu_gradient_tiles(a[:2], *a[2:]), values, scales, du, weights, np.array(sizes))
    real = np.arange(len(h)) < sum(sizes)
    meant = values.astype(np.float32) * np.repeat(scales, 128, 1)[:, : h.shape[1]]
    h, du = (np.where(real[:, None], a, 0).astype(BF16) for a in (meant, du))
    dh, dweights = call(swiglu_gradient, h, du, weights)
    assert_same(got[0], tiles_of(dh, 1))
    assert_same(got[1], columns_of(dh, sizes))
    assert_same(got[2], columns_of(call(weighted_swiglu, h, weights), sizes))
    assert_same([got[3]], [dweights])


@pytest.mark.interpreter
@over_groups
def test_gradient_in_tiles_of_any_groups(draw, sizes, num_rows):
    check_gradient_tiles(*draw(num_rows, 256, good=sum(sizes)), sizes)


@pytest.mark.interpreter
@over_widths
def test_gradient_in_tiles_of_any_width(draw, width):
    check_gradient_tiles(*draw(150, width, good=137), (130, 0, 7))


# ------------------------------------------------------------------------------------------------------------- sm_90

SHAPES = [(4096, 2048), (32768, 1536), (4096, 576)]
over_shapes = pytest.mark.parametrize(("rows", "width"), SHAPES, ids=[f"{width} wide" for _, width in SHAPES])


def arrays(rows, width, experts=8):
    """h, h in tiles, the gradient of u, the weights, and the sizes of groups."""
    h, scales = (rows, 2 * width), (rows, -(-2 * width // 128))
    return (
        shape(h, jnp.bfloat16),
        (shape(h, jnp.float8_e4m3fn), shape(scales, jnp.float32)),
        shape((rows, width), jnp.bfloat16),
        shape((rows,), jnp.float32),
        shape((experts,), jnp.int32),
    )


@pytest.mark.hopper
@pytest.mark.parametrize("kind", ["forward", "forward in rows", "gradient", "gradient in tiles"])
@over_shapes
def test_kernels_fit_a_hopper(rows, width, kind):
    h, tiles, du, weights, sizes = arrays(rows, width)
    kernels = {
        "forward": lambda: compiled(weighted_swiglu, h, weights),
        "forward in rows": lambda: compiled(weighted_swiglu_rows, h, weights),
        "gradient": lambda: compiled(swiglu_gradient, h, du, weights),
        "gradient in tiles": lambda: compiled(swiglu_gradient_tiles, tiles, du, weights, sizes),
    }[kind]()
    for kernel in kernels:
        kernel.check()


@pytest.mark.hopper
@pytest.mark.parametrize("lower", [lowered, lowered_in_loop], ids=["alone", "in a loop of a shard_map"])
@pytest.mark.parametrize(("width", "calls"), [(256, 5), (200, 9)], ids=["whole tiles", "parts of tiles"])
def test_kernels_are_in_a_program_for_a_gpu(lower, width, calls):
    def all_of_them(h, tiles, du, weights, sizes):
        forward = weighted_swiglu(h, weights), weighted_swiglu_rows(h, weights)
        return forward, swiglu_gradient(h, du, weights), swiglu_gradient_tiles(tiles, du, weights, sizes)

    assert lower(all_of_them, *arrays(256, width)) == calls
