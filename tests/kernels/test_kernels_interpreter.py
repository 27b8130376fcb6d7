"""The interpreter that stands in for a GPU: it rounds as one does, and refuses what goes unnoticed on one."""

import ml_dtypes
import numpy as np
import pytest
import triton
import triton.language as tl
from interpret import run
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.interpreter


@triton.jit
def copy_kernel(x, y, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, mask=at < LIMIT).to(y.dtype.element_ty), mask=at < LIMIT)


@triton.jit
def load_kernel(x, y, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, mask=at < LIMIT))


@triton.jit
def double_kernel(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(y + at, value + value)


@triton.jit
def number_kernel(x, SHIFT: tl.constexpr):
    program = tl.program_id(0)
    tl.store(x + program // 2, program >> SHIFT)


@triton.jit
def dot_kernel(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(x + at)))


def floats():
    """Of every sign and exponent, on both sides of each boundary between two numbers with 3 or 7 bits of mantissa."""
    boundaries = np.array([0, 0x8000, 0x10000, 0x18000, 0x20000, 0x40000, 0x60000, 0x80000], np.uint32)
    offsets = np.concatenate([boundaries, boundaries + 1, boundaries + 0x7FFF, boundaries - 1])
    bits = np.arange(1 << 12, dtype=np.uint32) << 20
    return (bits[:, None] + offsets).reshape(-1).view(np.float32)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=["bf16", "e4m3"])
def test_casts_round_to_nearest_even(dtype):
    x = floats()
    y = np.zeros(x.shape, dtype)
    run(copy_kernel, (1,), x, y, SIZE=x.size, LIMIT=x.size)
    largest = float(ml_dtypes.finfo(dtype).max)
    with np.errstate(invalid="ignore", over="ignore"):
        want = (np.clip(x, -largest, largest) if dtype == ml_dtypes.float8_e4m3fn else x).astype(dtype)
    np.testing.assert_array_equal(y.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=["bf16", "e4m3"])
def test_casts_to_float32_keep_every_number(dtype):
    bits = np.arange(256, dtype=np.uint16) << (8 if dtype == ml_dtypes.bfloat16 else 0)
    x = bits.astype(np.uint16 if dtype == ml_dtypes.bfloat16 else np.uint8).view(dtype)
    y = np.zeros(256, np.float32)
    run(copy_kernel, (1,), x, y, SIZE=256, LIMIT=256)
    np.testing.assert_array_equal(y, x.astype(np.float32))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=["bf16", "e4m3"])
def test_products_are_of_the_numbers(dtype):
    x = np.random.default_rng(0).integers(-8, 9, (16, 16)).astype(dtype)
    y = np.zeros((16, 16), np.float32)
    run(dot_kernel, (1,), x, y, SIZE=16)
    np.testing.assert_array_equal(y, x.astype(np.float32) @ x.astype(np.float32))


@pytest.mark.parametrize(("x", "y"), [(7, 8), (8, 7)], ids=["a load", "a store"])
def test_accesses_outside_of_arrays_are_refused(x, y):
    arrays = np.zeros(x, np.float32), np.zeros(y, np.float32)
    with pytest.raises(InterpreterError, match="outside of the arrays"):
        run(copy_kernel, (1,), *arrays, SIZE=8, LIMIT=8)
    run(copy_kernel, (1,), *arrays, SIZE=8, LIMIT=7)


def test_programs_that_write_different_numbers_to_one_place_are_refused():
    x = np.zeros(2, np.int32)
    with pytest.raises(InterpreterError, match="another number was written to the same place"):
        run(number_kernel, (4,), x, SHIFT=0)
    run(number_kernel, (4,), x, SHIFT=1)
    assert x.tolist() == [0, 1]


def test_what_a_mask_leaves_open_is_nan():
    y = np.zeros(8, np.float32)
    run(load_kernel, (1,), np.ones(8, np.float32), y, SIZE=8, LIMIT=3)
    np.testing.assert_array_equal(y, [1, 1, 1] + 5 * [np.nan])


def test_arithmetic_on_small_floats_is_refused():
    x = np.ones(8, ml_dtypes.bfloat16)
    with pytest.raises(InterpreterError, match="arithmetic on bf16: cast to float32 first"):
        run(double_kernel, (1,), x, np.zeros_like(x), SIZE=8)
