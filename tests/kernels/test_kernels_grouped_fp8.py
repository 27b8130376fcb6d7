"""Grouped products of E4M3 numbers: interpreted, over groups of any size; and compiled for sm_90 with V3's dims."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ahead import compiled, lowered, lowered_in_loop, shape
from cases import ROWS, bounds, over_groups, over_products
from interpret import call

from moejax.kernels.grouped_fp8 import scaled_grouped_dot, scaled_grouped_outer

TILE = 128
E4M3 = ml_dtypes.float8_e4m3fn
DIMS = {
    "whole blocks": (256, 128),
    "less than a block": (32, 48),
    "parts of blocks": (136, 200),
}
over_dims = pytest.mark.parametrize(("inputs", "outputs"), DIMS.values(), ids=DIMS.keys())


@pytest.fixture
def draw():
    """Numbers of all magnitudes; NaN in rows from `good` on."""
    random = np.random.default_rng(0)

    def numbers(*dims, dtype=np.float32, good=None):
        values = random.standard_normal(dims) * 2.0 ** random.integers(-4, 5, dims)
        values[slice(good, None) if good is not None else slice(0)] = np.nan
        return values.astype(dtype)

    return numbers


def tiles(size):
    return -(-size // TILE)


def scaled(values, scales, *axes):
    """What is meant: each number times the scale of its tile along `axes`; each has its own along others."""
    for axis in axes:
        scales = np.repeat(scales, TILE, axis).take(range(values.shape[axis]), axis)
    return values.astype(np.float64) * scales


def assert_close(got, want, magnitudes, num_tiles):
    """Within the roundings to float32 of sums of 128, of their scales, of their products, and of sums of tiles."""
    error, allowed = np.abs(got - want), (TILE + num_tiles + 3) * 2.0**-24 * magnitudes
    assert (error <= allowed).all(), (error.max(), allowed.max())


def check_dot(draw, sizes, num_rows, inner, columns):
    x, x_scales = draw(num_rows, inner, dtype=E4M3, good=sum(sizes)), np.abs(draw(num_rows, tiles(inner)))
    w, w_scales = draw(len(sizes), columns, inner, dtype=E4M3), np.abs(draw(len(sizes), tiles(columns), tiles(inner)))
    y = call(scaled_grouped_dot, x, x_scales, w, w_scales, np.array(sizes), dtype=jnp.float32)
    for e, (start, end) in enumerate(bounds(sizes)):
        rows, matrix = scaled(x[start:end], x_scales[start:end], 1), scaled(w[e], w_scales[e], 0, 1).T
        assert_close(y[start:end], rows @ matrix, np.abs(rows) @ np.abs(matrix), tiles(inner))
    assert (y[sum(sizes) :] == 0).all()
    return x, x_scales, w, w_scales, y


@pytest.mark.interpreter
@over_groups
def test_scaled_dot_of_any_groups(draw, sizes, num_rows):
    check_dot(draw, sizes, num_rows, 256, 128)


@pytest.mark.interpreter
@over_dims
def test_scaled_dot_of_any_dims(draw, inputs, outputs):
    check_dot(draw, (130, 0, 7), 150, inputs, outputs)


@pytest.mark.interpreter
def test_scaled_dot_rounds_its_sums_to_bf16(draw):
    *factors, y = check_dot(draw, (40, 90), 130, 128, 128)
    rounded = call(scaled_grouped_dot, *factors, np.array([40, 90]), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(rounded, y.astype(ml_dtypes.bfloat16))


def columns_of(draw, sizes, num_rows, channels):
    """Values [C, M * 128] and scales [M, C]: zeros fill up the last tile of a group, unused ones have any scales."""
    num_tiles = num_rows // TILE + len(sizes)
    values = np.zeros((channels, num_tiles * TILE), E4M3)
    for (start, _), size in zip(bounds([tiles(size) for size in sizes]), sizes, strict=True):
        values[:, start * TILE : start * TILE + size] = draw(channels, size, dtype=E4M3)
    return values, np.abs(draw(num_tiles, channels))


def check_outer(draw, sizes, num_rows, inputs, outputs, onto):
    x, dy = columns_of(draw, sizes, num_rows, inputs), columns_of(draw, sizes, num_rows, outputs)
    before = draw(len(sizes), inputs, outputs) if onto else None
    dw = call(scaled_grouped_outer, *x, *dy, np.array(sizes), before)
    before = before if onto else np.zeros_like(dw)
    x_IT, dy_OT = (scaled(values, scales.T, 1) for values, scales in (x, dy))
    for e, (start, end) in enumerate(bounds([tiles(size) for size in sizes])):
        left, right = x_IT[:, start * TILE : end * TILE], dy_OT[:, start * TILE : end * TILE].T
        magnitudes = np.abs(before[e]) + np.abs(left) @ np.abs(right)
        assert_close(dw[e], before[e] + left @ right, magnitudes if end > start else 0, end - start)


@pytest.mark.interpreter
@pytest.mark.parametrize("onto", [False, True], ids=["anew", "onto"])
@over_groups
def test_scaled_outer_of_any_groups(draw, sizes, num_rows, onto):
    check_outer(draw, sizes, num_rows, 128, 256, onto)


@pytest.mark.interpreter
@pytest.mark.parametrize("onto", [False, True], ids=["anew", "onto"])
@over_dims
def test_scaled_outer_of_any_dims(draw, inputs, outputs, onto):
    check_outer(draw, (130, 0, 7), 150, inputs, outputs, onto)


# ------------------------------------------------------------------------------------------------------------- sm_90


def arrays(experts, inputs, outputs):
    """Rows, matrices, columns of rows and of their products' gradients; each with its scales."""
    num_tiles = ROWS // TILE + experts

    def with_scales(dims, scales):
        return shape(dims, jnp.float8_e4m3fn), shape(scales, jnp.float32)

    return (
        with_scales((ROWS, inputs), (ROWS, tiles(inputs))),
        with_scales((experts, outputs, inputs), (experts, tiles(outputs), tiles(inputs))),
        with_scales((inputs, num_tiles * TILE), (num_tiles, inputs)),
        with_scales((outputs, num_tiles * TILE), (num_tiles, outputs)),
    )


def dot(x, w, sizes):
    return scaled_grouped_dot(*x, *w, sizes, jnp.bfloat16)


def outer(x, dy, sizes, onto=None):
    return scaled_grouped_outer(*x, *dy, sizes, onto)


@pytest.mark.hopper
@pytest.mark.parametrize("kind", ["dot", "dot transposed", "outer", "outer onto"])
@over_products
def test_kernels_fit_a_hopper(dims, kind):
    (experts, inputs, outputs), sizes = dims, shape(dims[:1], jnp.int32)
    x, w, x_columns, dy_columns = arrays(experts, inputs, outputs)
    dy, w_transposed, *_ = arrays(experts, outputs, inputs)
    (kernel,) = {
        "dot": lambda: compiled(dot, x, w, sizes),
        "dot transposed": lambda: compiled(dot, dy, w_transposed, sizes),
        "outer": lambda: compiled(outer, x_columns, dy_columns, sizes),
        "outer onto": lambda: compiled(outer, x_columns, dy_columns, sizes, shape(dims, jnp.float32)),
    }[kind]()
    kernel.check("QGMMA")


@pytest.mark.hopper
@pytest.mark.parametrize("lower", [lowered, lowered_in_loop], ids=["alone", "in a loop of a shard_map"])
def test_kernels_are_in_a_program_for_a_gpu(lower):
    x, w, x_columns, dy_columns = arrays(4, 256, 512)
    dw, sizes = shape((4, 256, 512), jnp.float32), shape((4,), jnp.int32)

    def all_of_them(x, w, x_columns, dy_columns, dw, sizes):
        return dot(x, w, sizes), outer(x_columns, dy_columns, sizes), outer(x_columns, dy_columns, sizes, dw)

    assert lower(all_of_them, x, w, x_columns, dy_columns, dw, sizes) == 3
