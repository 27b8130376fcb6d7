"""Kernels without a GPU: compiled ahead of time for sm_90, as the functions that launch them would have it, and read.

Registers, memory and instructions are what NVIDIA's assembler says of the binary.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import jax_triton
import triton
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {"bfloat16": "bf16", "float32": "fp32", "float8_e4m3fn": "fp8e4nv", "int32": "i32"}
CALL = "@triton_kernel_call"  # in a program for a GPU
SHARED = 227 * 1024  # bytes of an H200 that one block can have

triton.knobs.cache.dir = str(Path(__file__).parents[2] / ".pytest_cache" / "triton")


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a GPU."""

    name: str
    registers: int  # of a thread
    stack: int  # bytes of a thread, in local memory: spilled registers
    local: int  # bytes of a thread
    shared: int  # bytes of a block
    instructions: Counter  # how many of each opcode

    def check(self, product=None):
        """No local memory, and shared memory that fits; with `product`, there are such instructions."""
        assert (self.stack, self.local, self.instructions["LDL"], self.instructions["STL"]) == (0, 0, 0, 0), self
        assert self.shared <= SHARED, self
        if product:
            assert self.instructions[product] > 0, self


def shape(dims, dtype, sharding=None):
    """An array that need not exist."""
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


def compiled(function, *arrays):
    """The kernels that `function(*arrays)` launches, in that order, as `Compiled`. It can be given `shape`s."""
    with _recorded() as calls:
        jax.eval_shape(function, *arrays)
    return [_compile(*call) for call in calls]


def lowered(function, *arrays):
    """How many kernels are in the program that JAX hands to XLA for a GPU; it holds them compiled."""
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text().count(CALL)


def lowered_in_loop(function, *arrays):
    """The same in a scan in a shard_map that checks over which axes arrays vary: over `x`, and so must all outputs."""
    mesh = jax.make_mesh((2,), ("x",))

    def local(*arrays):
        def step(carry, _):
            outputs = function(*jax.tree.map(lambda a: a[0], arrays))
            assert all(jax.typeof(a).manual_axis_type.varying == {"x"} for a in jax.tree.leaves(outputs))
            return carry, jax.tree.map(lambda a: a[None], outputs)

        return jax.lax.scan(step, None, length=2)[1]

    spread = jax.tree.map(lambda a: shape((2, *a.shape), a.dtype, NamedSharding(mesh, P("x"))), arrays)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P(None, "x"))
    return lowered(mapped, *spread)


# ------------------------------------------------------------------------------------------------------------- pieces


@contextmanager
def _recorded():
    """The calls of jax-triton, which does nothing meanwhile."""
    calls, call = [], jax_triton.triton_call

    def record(*arrays, kernel, name, grid, num_warps, num_stages, compute_capability, input_output_aliases, **others):
        out = others.pop("out_shape" if "out_shape" in others else "out_type")
        dtypes = tuple(str(a.dtype) for a in (*arrays, *jax.tree.leaves(out)))
        calls.append((kernel, dtypes, num_warps, num_stages, tuple(others.items())))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), out)

    jax_triton.triton_call = record
    try:
        yield calls
    finally:
        jax_triton.triton_call = call


@functools.cache
def _compile(kernel, dtypes, num_warps, num_stages, constants):
    names, constants = kernel.arg_names, dict(constants)
    pointers = {name: f"*{TYPES[dtype]}" for name, dtype in zip(names, dtypes, strict=False) if name not in constants}
    source = ASTSource(
        fn=kernel,
        signature={name: pointers.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code, re.MULTILINE)
    return Compiled(kernel.__name__, registers, stack, local, binary.metadata.shared, Counter(opcodes))


def _cuobjdump(flag, path):
    return subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True).stdout
