"""Grouped products in BF16: interpreted, over groups of any size; and compiled for sm_90 with V3's dims."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ahead import compiled, lowered, lowered_in_loop, shape
from cases import ROWS, bounds, over_groups, over_products
from interpret import call

from moejax.kernels.grouped import grouped_dot, grouped_outer

DIMS = {
    "whole blocks": (128, 256),
    "less than a block": (32, 48),
    "parts of blocks": (72, 136),
}
over_dims = pytest.mark.parametrize(("inputs", "outputs"), DIMS.values(), ids=DIMS.keys())


@pytest.fixture
def draw():
    """Small integers, of which products and sums are exact in float32; NaN in rows from `good` on."""
    random = np.random.default_rng(0)

    def numbers(*dims, good=None, dtype=ml_dtypes.bfloat16):
        values = random.integers(-8, 9, dims).astype(np.float32)
        values[slice(good, None) if good is not None else slice(0)] = np.nan
        return values.astype(dtype)

    return numbers


def naive_dot(x, w, sizes):
    y = np.zeros((len(x), w.shape[2]), np.float32)
    for e, (start, end) in enumerate(bounds(sizes)):
        y[start:end] = x[start:end].astype(np.float32) @ w[e].astype(np.float32)
    return y


def naive_outer(x, dy, sizes):
    pairs = [(x[start:end].astype(np.float32), dy[start:end].astype(np.float32)) for start, end in bounds(sizes)]
    return np.stack([x.T @ dy for x, dy in pairs])


def check_dot(draw, sizes, num_rows, inputs, outputs, transposed):
    x = draw(num_rows, outputs if transposed else inputs, good=sum(sizes))
    w = draw(len(sizes), inputs, outputs)
    want = naive_dot(x, w.swapaxes(1, 2) if transposed else w, sizes)
    y = call(grouped_dot, x, w, np.array(sizes), dtype=jnp.float32, transposed=transposed)
    np.testing.assert_array_equal(y, want)
    return x, w, y


@pytest.mark.interpreter
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@over_groups
def test_dot_of_any_groups(draw, sizes, num_rows, transposed):
    check_dot(draw, sizes, num_rows, 64, 128, transposed)


@pytest.mark.interpreter
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@over_dims
def test_dot_of_any_dims(draw, inputs, outputs, transposed):
    check_dot(draw, (130, 0, 7), 150, inputs, outputs, transposed)


@pytest.mark.interpreter
def test_dot_rounds_its_sums_to_bf16(draw):
    x, w, y = check_dot(draw, (40, 90), 130, 128, 128, False)
    rounded = call(grouped_dot, x, w, np.array([40, 90]), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(rounded, y.astype(ml_dtypes.bfloat16))


def check_outer(draw, sizes, num_rows, inputs, outputs, onto):
    x, dy = draw(num_rows, inputs, good=sum(sizes)), draw(num_rows, outputs, good=sum(sizes))
    before = draw(len(sizes), inputs, outputs, dtype=np.float32)
    want = naive_outer(x, dy, sizes) + (before if onto else 0)
    dw = call(grouped_outer, x, dy, np.array(sizes), before if onto else None)
    np.testing.assert_array_equal(dw, want)


@pytest.mark.interpreter
@pytest.mark.parametrize("onto", [False, True], ids=["anew", "onto"])
@over_groups
def test_outer_of_any_groups(draw, sizes, num_rows, onto):
    check_outer(draw, sizes, num_rows, 64, 128, onto)


@pytest.mark.interpreter
@pytest.mark.parametrize("onto", [False, True], ids=["anew", "onto"])
@over_dims
def test_outer_of_any_dims(draw, inputs, outputs, onto):
    check_outer(draw, (70, 0, 7), 90, inputs, outputs, onto)


# ------------------------------------------------------------------------------------------------------------- sm_90


def arrays(experts, inputs, outputs):
    """Rows, their products' gradients, matrices, gradients of matrices, and sizes of groups."""
    return (
        shape((ROWS, inputs), jnp.bfloat16),
        shape((ROWS, outputs), jnp.bfloat16),
        shape((experts, inputs, outputs), jnp.bfloat16),
        shape((experts, inputs, outputs), jnp.float32),
        shape((experts,), jnp.int32),
    )


def dot(x, w, sizes):
    return grouped_dot(x, w, sizes, jnp.bfloat16)


def dot_transposed(dy, w, sizes):
    return grouped_dot(dy, w, sizes, jnp.bfloat16, transposed=True)


@pytest.mark.hopper
@pytest.mark.parametrize("kind", ["dot", "dot transposed", "outer", "outer onto"])
@over_products
def test_kernels_fit_a_hopper(dims, kind):
    x, dy, w, dw, sizes = arrays(*dims)
    (kernel,) = {
        "dot": lambda: compiled(dot, x, w, sizes),
        "dot transposed": lambda: compiled(dot_transposed, dy, w, sizes),
        "outer": lambda: compiled(grouped_outer, x, dy, sizes),
        "outer onto": lambda: compiled(grouped_outer, x, dy, sizes, dw),
    }[kind]()
    kernel.check("HGMMA")


@pytest.mark.hopper
@pytest.mark.parametrize("lower", [lowered, lowered_in_loop], ids=["alone", "in a loop of a shard_map"])
def test_kernels_are_in_a_program_for_a_gpu(lower):
    x, dy, w, dw, sizes = arrays(4, 256, 512)

    def all_of_them(x, dy, w, dw, sizes):
        ways = grouped_outer(x, dy, sizes), grouped_outer(x, dy, sizes, dw)
        return dot(x, w, sizes), dot_transposed(dy, w, sizes), ways

    assert lower(all_of_them, x, dy, w, dw, sizes) == 4


@pytest.mark.hopper
def test_other_dtypes_are_refused():
    x, _, w, _, sizes = arrays(4, 256, 512)
    with pytest.raises(ValueError, match=r"bfloat16, not float32 \(4096, 256\)"):
        compiled(dot, shape(x.shape, jnp.float32), w, sizes)
