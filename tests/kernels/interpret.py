"""Triton's interpreter for NumPy arrays: the body of a kernel, run for one program after another.

TRITON_INTERPRET=1 has to be set before Triton is imported, so these tests have a process of their own. As it comes, the
interpreter wants torch's tensors, multiplies the bits of bfloat16 numbers as integers, and truncates where GPUs round.
Here it computes as a GPU does, and is stricter than one. It is an error to touch what is outside of the arrays, to
write two different numbers to one place, of which a GPU may keep either, and to compute with floats of 8 or 16 bits
rather than in float32. What a masked load without `other` leaves open is NaN (-1 of integers).
"""

from typing import NamedTuple
from unittest.mock import patch

import jax
import jax_triton
import ml_dtypes
import numpy as np
from triton.runtime import interpreter

PACKED = {"bf16": ml_dtypes.bfloat16, "fp8e4nv": ml_dtypes.float8_e4m3fn, "fp8e5": ml_dtypes.float8_e5m2}
FLOATS = PACKED | {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}


def run(kernel, grid, *arrays, **constants):
    """Runs `kernel` for every program of `grid`; it writes into `arrays`: NumPy's, contiguous, or None."""
    assert isinstance(kernel, interpreter.InterpretedFunction), "set TRITON_INTERPRET=1 before Triton is imported"
    _ARRAYS[:] = [_Memory(a.ctypes.data, np.zeros(a.nbytes, bool)) for a in arrays if a is not None]
    kernel[grid](*(a if a is None else _Tensor(a) for a in arrays), **constants)


def call(function, *arrays, **options):
    """`function(*arrays, **options)`, the kernels it launches interpreted; what they do not write is NaN, or -1."""
    with patch.object(jax_triton, "triton_call", _triton_call):
        return jax.tree.map(np.asarray, function(*jax.tree.map(jax.numpy.asarray, arrays), **options))


def _triton_call(*arrays, kernel, grid, input_output_aliases, **others):
    out, structure = jax.tree.flatten(others["out_shape" if "out_shape" in others else "out_type"])
    arrays, aliased = [np.array(a) for a in arrays], {j: i for i, j in input_output_aliases.items()}
    outputs = [arrays[aliased[j]] if j in aliased else _unwritten(a.shape, a.dtype) for j, a in enumerate(out)]
    constants = {name: others[name] for name in kernel.arg_names if name in others}
    pointers = zip(kernel.arg_names, [*arrays, *outputs], strict=False)
    run(kernel, grid, *(array for name, array in pointers if name not in constants), **constants)
    return jax.tree.unflatten(structure, [jax.numpy.asarray(a) for a in outputs])


def _unwritten(shape, dtype):
    return np.full(np.prod((*shape, dtype.itemsize)), 255, np.uint8).view(dtype).reshape(shape)


class _Tensor:
    """As much of a torch tensor as the interpreter looks at: its memory is the array's, and so is its storage's."""

    def __init__(self, array):
        assert array.flags.c_contiguous
        self.array, self.dtype, self.shape = array, str(array.dtype), array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.shape

    def stride(self):
        return tuple(stride // self.array.itemsize for stride in self.array.strides)

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return _Tensor(self.array)

    def set_(self, *_):
        pass

    def copy_(self, other):
        assert other.array is self.array


# --------------------------------------------------------------------------------------------------- what is corrected


class _Memory(NamedTuple):
    """An array that a kernel may touch."""

    start: int  # address
    written: np.ndarray  # whether a byte has been


_ARRAYS: list[_Memory] = []


def _check(pointers, mask, values=None):
    """All accesses are in one array; and none of `values`, which are to be written, undoes what was written before."""
    wanted = pointers.data[mask]
    if not wanted.size:
        return
    low, high = int(wanted.min()), int(wanted.max()) + max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    array = next((a for a in _ARRAYS if a.start <= low and high <= a.start + a.written.size), None)
    if array is None:
        raise IndexError(f"accesses from {low} to {high} are outside of the arrays")
    if values is not None:
        offsets = (wanted - np.uint64(array.start)).astype(np.int64)
        again = array.written[offsets]
        if again.any() and _read(wanted[again], values.dtype).tobytes() != values[again].tobytes():
            raise ValueError("another number was written to the same place")
        array.written[offsets] = True


def _read(pointers, dtype):
    return interpreter._interpreter.load(
        pointers, np.ones(pointers.shape, bool), np.zeros(pointers.shape, dtype), dtype
    )


def _load(self, pointers, mask, other, *_):
    mask = mask.data.astype(bool)
    _check(pointers, mask)
    dtype = pointers.get_element_ty()
    kind = interpreter._get_np_dtype(dtype)
    rest = _unwritten(pointers.data.shape, kind) if other is None else other.data
    return interpreter.TensorHandle(interpreter._interpreter.load(pointers.data, mask, rest, kind), dtype)


def _store(self, pointers, value, mask, *_):
    mask = mask.data.astype(bool)
    _check(pointers, mask, np.broadcast_to(value.data, mask.shape)[mask])
    return interpreter._interpreter.store(pointers.data, value.data, mask)


def _checked(operation):
    """Of atomic operations."""

    def checked(self, kind, pointers, value, mask, *rest):
        _check(pointers, mask.data.astype(bool))
        return operation(self, kind, pointers, value, mask, *rest)

    return checked


def _numbers(handle):
    """The numbers that a handle stands for: those of 8 and 16 bits are kept as unsigned integers."""
    name = handle.dtype.scalar.name
    return handle.data.view(PACKED[name]).astype(np.float32) if name in PACKED else handle.data


def _cast(self, source, dtype, *_):
    given, wanted = source.dtype.scalar, dtype.scalar
    if given.name not in PACKED and wanted.name not in PACKED:
        return interpreter.TensorHandle(source.data.astype(interpreter._get_np_dtype(dtype)), wanted)
    if given.name not in FLOATS or wanted.name not in FLOATS:
        raise TypeError(f"{given} to {wanted}: cast through float32")
    numbers = _numbers(source).astype(np.float32)
    if wanted.is_fp8():  # larger ones become the largest, as on a GPU
        largest = float(ml_dtypes.finfo(PACKED[wanted.name]).max)
        numbers = np.clip(numbers, -largest, largest)  # NaN stays
    with np.errstate(invalid="ignore", over="ignore"):
        data = np.ascontiguousarray(numbers.astype(FLOATS[wanted.name]))
    return interpreter.TensorHandle(data.view(interpreter._get_np_dtype(dtype)), wanted)


def _dot(self, a, b, sums, *_):
    product = np.matmul(_numbers(a), _numbers(b), dtype=sums.data.dtype)
    return interpreter.TensorHandle(product + sums.data, sums.dtype.scalar)


def _refusing(operation):
    def checked(self, *operands):
        for handle in operands:
            if isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar.name in PACKED:
                raise TypeError(f"arithmetic on {handle.dtype}: cast to float32 first")
        return operation(self, *operands)

    return checked


def _with_scalars(original):
    """NumPy no longer makes an int of an array with one element and one dim, which is what a scalar is here."""

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


_builder = interpreter.InterpreterBuilder
_builder.create_masked_load = _load
_builder.create_masked_store = _store
_builder.create_atomic_rmw = _checked(_builder.create_atomic_rmw)
_builder.cast_impl = _cast
_builder.create_fp_to_fp = _cast
_builder.create_dot = _dot
_builder.binary_op = _refusing(_builder.binary_op)
_builder.unary_op = _refusing(_builder.unary_op)
_builder.create_fabs = _refusing(_builder.create_fabs)
_builder.create_fma = _refusing(_builder.create_fma)
interpreter._patch_lang_tensor = _with_scalars(interpreter._patch_lang_tensor)
