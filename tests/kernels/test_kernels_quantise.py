"""Quantisers to E4M3: interpreted, bit for bit, over groups of any size; and compiled for sm_90 with V3's dims."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ahead import compiled, lowered, lowered_in_loop, shape
from cases import bounds, over_groups
from interpret import call

from moejax.kernels.quantise import quantise_blocks, quantise_both, quantise_columns, quantise_rows
from moejax.ops import fp8

BF16, E4M3, LARGEST = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, 448
LEAST, OVER_LARGEST = np.float32(1e-4), np.float32(1 / LARGEST)  # XLA multiplies where it is told to divide
MIXED = ((130, 0, 7, 128), 300)  # sizes of groups, and rows in all

over_scales = pytest.mark.parametrize("power_of_two", [False, True], ids=["any scale", "powers of two"])
over_widths = pytest.mark.parametrize("width", [256, 128, 48, 200, 576], ids="{} wide".format)


@pytest.fixture
def draw():
    """Numbers of all magnitudes; NaN in rows from `good` on."""
    random = np.random.default_rng(0)

    def numbers(*dims, dtype=BF16, good=None):
        values = random.standard_normal(dims) * 2.0 ** random.integers(-20, 21, dims)
        values[slice(good, None) if good is not None else slice(0)] = np.nan
        return values.astype(dtype)

    return numbers


def hard(width=256):
    """Rows on which quantisers go wrong, bfloat16."""
    step = np.arange(width)
    ties = np.where(step % 2, 1, -1) * (17 + 2 * (step % 8)) / 16  # halfway between two numbers of E4M3
    small = (2 * (step % 7) + 1) / 1024  # the same among its subnormals
    rows = [
        np.zeros(width),
        np.where(step % 2, -0.0, 0.0),
        np.full(width, 1e-40),  # a subnormal
        1e-4 * ties,  # around the least magnitude of a tile
        1e30 * ties,
        np.full(width, float(ml_dtypes.finfo(BF16).max)),
        np.where(step % 128, ties, LARGEST),  # a scale of 1: ties stay ties
        np.where(step % 128, small, LARGEST),
        np.where(step % 128, ties * 32, LARGEST * 32),  # a scale that is a power of two
        np.where(step % 128, ties, LARGEST + 2),  # one just above it
        np.where(step % 128, ties, LARGEST - 2),
        np.where(step % 50 == 3, np.inf, ties),
        np.where(step % 50 == 3, -np.inf, ties),
        np.where(step % 50 == 3, np.nan, ties),
        np.where(step == 0, np.nan, np.inf),
    ]
    return np.stack(rows).astype(BF16)


# ---------------------------------------------------------------------------------------------------------- in NumPy


def tiles_of(x, axis, power_of_two=False):
    """Values and scales of tiles of 128 along `axis`; the last may be shorter."""
    x = np.moveaxis(x.astype(np.float32), axis, -1)
    length = x.shape[-1]
    x = np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -length % 128)]).reshape(*x.shape[:-1], -1, 128)
    with np.errstate(all="ignore"):
        scales = np.maximum(np.abs(x).max(-1), LEAST) * OVER_LARGEST
        if power_of_two:
            mantissas, exponents = np.frexp(scales)
            powers = np.ldexp(np.float32(1), exponents - (mantissas == 0.5))
            scales = np.where(np.isfinite(scales), powers, np.float32(1))
        values = np.clip(x * (1 / scales)[..., None], -LARGEST, LARGEST).astype(E4M3)
    values = values.reshape(*values.shape[:-2], -1)[..., :length]
    return np.moveaxis(values, -1, axis), np.moveaxis(scales, -1, axis)


def columns_of(x, sizes, power_of_two=False):
    """Values [I, M * 128] and scales [M, I]."""
    tiles = np.zeros(((len(x) + 127 * len(sizes)) // 128 * 128, x.shape[1]), x.dtype)
    first = 0
    for start, end in bounds(sizes):
        tiles[first : first + end - start] = x[start:end]
        first += -(-(end - start) // 128) * 128
    values, scales = tiles_of(tiles, 0, power_of_two)
    return values.T, scales


def blocks_of(w):
    """Values and scales of blocks of 128 x 128."""
    height, width = w.shape
    w = np.pad(w, [(0, -height % 128), (0, -width % 128)]).reshape(-(-height // 128), 128, -(-width // 128), 128)
    scales = np.maximum(np.abs(w).max((1, 3)), LEAST) * OVER_LARGEST
    values = np.clip(w * (1 / scales)[:, None, :, None], -LARGEST, LARGEST).astype(E4M3)
    return values.reshape(values.shape[0] * 128, -1)[:height, :width], scales


def assert_same(got, want):
    """Bit for bit, but that any NaN will do."""
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        nan, bits = np.isnan(b), {1: np.uint8, 2: np.uint16, 4: np.uint32}[b.itemsize]
        np.testing.assert_array_equal(np.isnan(a), nan)
        np.testing.assert_array_equal(a.view(bits)[~nan], b.view(bits)[~nan])


# ------------------------------------------------------------------------------------------------------- interpreted


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@over_scales
def test_hard_rows_are_those_of_the_reference(power_of_two):
    x = hard()
    got = call(quantise_rows, x, power_of_two=power_of_two)
    assert_same(got, tiles_of(x, 1, power_of_two))
    assert_same(got, map(np.asarray, fp8.quantise_rows(jnp.asarray(x), power_of_two)))


@pytest.mark.interpreter
@over_scales
@over_widths
@pytest.mark.parametrize("dtype", [BF16, np.float32], ids=["bf16", "fp32"])
def test_rows_of_any_width(draw, width, dtype, power_of_two):
    x = draw(37, width, dtype=dtype)
    assert_same(call(quantise_rows, x, power_of_two=power_of_two), tiles_of(x, 1, power_of_two))


def check_both(x, sizes, power_of_two):
    """Rows beyond the groups are 0, whatever is in them."""
    rows, columns = call(quantise_both, x, np.array(sizes), power_of_two=power_of_two)
    real = np.where(np.arange(len(x))[:, None] < sum(sizes), x, x.dtype.type(0))
    assert_same(rows, tiles_of(real, 1, power_of_two))
    assert_same(columns, columns_of(x, sizes, power_of_two))


@pytest.mark.interpreter
@over_scales
@over_groups
def test_both_of_any_groups(draw, sizes, num_rows, power_of_two):
    check_both(draw(num_rows, 256, good=sum(sizes)), sizes, power_of_two)


@pytest.mark.interpreter
@over_scales
@over_widths
def test_both_of_any_width(draw, width, power_of_two):
    sizes, num_rows = MIXED
    check_both(draw(num_rows, width, good=sum(sizes)), sizes, power_of_two)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@over_scales
@pytest.mark.parametrize("sizes", [(3, 0, 9), (15,)], ids=["with rows beyond", "all of them"])
def test_both_of_hard_rows(sizes, power_of_two):
    check_both(hard(), sizes, power_of_two)


@pytest.mark.interpreter
@over_scales
@over_groups
def test_columns_of_any_groups(draw, sizes, num_rows, power_of_two):
    x = draw(num_rows, 256, good=sum(sizes))
    got = call(quantise_columns, x, np.array(sizes), power_of_two=power_of_two)
    assert_same(got, columns_of(x, sizes, power_of_two))
    assert_same(got, map(np.asarray, fp8.quantise_columns(jnp.asarray(x), jnp.array(sizes), power_of_two)))


def check_columns_again(draw, sizes, num_rows, width, power_of_two):
    values, scales = tiles_of(draw(num_rows, width, good=sum(sizes)), 1)
    meant = values.astype(np.float32) * np.repeat(scales, 128, 1)[:, :width]
    got = call(lambda *x: quantise_columns(x[:2], x[2], power_of_two), values, scales, np.array(sizes))
    assert_same(got, columns_of(meant, sizes, power_of_two))


@pytest.mark.interpreter
@over_scales
@over_groups
def test_columns_of_rows_of_any_groups(draw, sizes, num_rows, power_of_two):
    check_columns_again(draw, sizes, num_rows, 256, power_of_two)


@pytest.mark.interpreter
@over_widths
def test_columns_of_rows_of_any_width(draw, width):
    check_columns_again(draw, *MIXED, width, False)


@pytest.mark.interpreter
@pytest.mark.parametrize("transposed", [False, True], ids=["in place", "transposed"])
@pytest.mark.parametrize("dims", [(256, 128), (48, 32), (576, 200)], ids=["whole blocks", "small", "parts of blocks"])
def test_blocks_of_any_dims(draw, dims, transposed):
    w = draw(2, *dims, dtype=np.float32)
    got = call(quantise_blocks, w, transposed=transposed)
    for expert in range(2):
        assert_same([a[expert] for a in got], [a.T if transposed else a for a in blocks_of(w[expert])])
    assert_same(got, map(np.asarray, fp8.quantise_blocks(jnp.asarray(w), transposed)))


# ------------------------------------------------------------------------------------------------------------- sm_90

SIZES = shape((8,), jnp.int32)
SHAPES = [(4096, 7168), (32768, 4096), (32768, 2048), (4096, 576)]
over_shapes = pytest.mark.parametrize(("rows", "dim"), SHAPES, ids=[f"{dim} wide" for _, dim in SHAPES])
over_kinds = pytest.mark.parametrize("kind", ["rows", "both", "columns", "columns of rows"])


def rows_in_tiles(rows, dim):
    return shape((rows, dim), jnp.float8_e4m3fn), shape((rows, -(-dim // 128)), jnp.float32)


@pytest.mark.hopper
@over_kinds
@over_shapes
@over_scales
def test_kernels_fit_a_hopper(rows, dim, kind, power_of_two):
    x = shape((rows, dim), jnp.bfloat16)
    (kernel,) = {
        "rows": lambda: compiled(lambda x: quantise_rows(x, power_of_two), x),
        "both": lambda: compiled(lambda x, sizes: quantise_both(x, sizes, power_of_two), x, SIZES),
        "columns": lambda: compiled(lambda x, sizes: quantise_columns(x, sizes, power_of_two), x, SIZES),
        "columns of rows": lambda: compiled(
            lambda x, sizes: quantise_columns(x, sizes, power_of_two), rows_in_tiles(rows, dim), SIZES
        ),
    }[kind]()
    kernel.check()


@pytest.mark.hopper
@pytest.mark.parametrize("transposed", [False, True], ids=["in place", "transposed"])
@pytest.mark.parametrize(
    "dims", [(8, 7168, 4096), (8, 2048, 7168), (1, 7168, 576)], ids=["gate and up", "down", "keys and values"]
)
def test_block_kernels_fit_a_hopper(dims, transposed):
    (kernel,) = compiled(lambda w: quantise_blocks(w, transposed), shape(dims, jnp.float32))
    kernel.check()


@pytest.mark.hopper
@pytest.mark.parametrize("lower", [lowered, lowered_in_loop], ids=["alone", "in a loop of a shard_map"])
def test_kernels_are_in_a_program_for_a_gpu(lower):
    def all_of_them(x, tiles, w, sizes):
        ways = quantise_columns(x, sizes), quantise_columns(tiles, sizes)
        return quantise_rows(x), quantise_both(x, sizes), ways, quantise_blocks(w), quantise_blocks(w, True)

    x, w = shape((256, 384), jnp.bfloat16), shape((8, 256, 384), jnp.float32)
    assert lower(all_of_them, x, rows_in_tiles(256, 384), w, SIZES) == 6
