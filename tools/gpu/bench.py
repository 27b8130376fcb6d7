"""What sections measure with. On a GPU programs run; in a dry run the same programs are compiled for an H200."""

import contextlib
import functools
import json
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from gpu.results import Result, append
from moejax.kernels.launch import available
from moejax.plan.hopper import h200_devices

KERNELS = ("triton_kernel_call", "mosaic_gpu", "__cudnn$fmha")  # in the names of custom calls
# a time is the median of spans of calls; the results of all calls of a span may be held at a time
SPANS, SPAN_SECONDS, MOST_CALLS = 7, 0.03, 50


class Bench:
    """Takes the programs of a section, and writes what comes out into `out/results.jsonl`."""

    def __init__(self, section: str, out: Path, *, dry: bool = False, torch: str = ""):
        self.section, self.out, self.dry, self.torch = section, out, dry, torch

    @functools.cached_property
    def device(self) -> jax.Device:
        """The GPU, or the H200 that is not there.

        Raises:
            RuntimeError: there is neither, or no Triton.
        """
        device = h200_devices(1)[0] if self.dry else jax.local_devices()[0]
        if device.platform != "gpu":
            raise RuntimeError(f"JAX has no GPU here, but {device.platform}")
        if not available():
            raise RuntimeError("no kernels: they take a Hopper GPU, Triton and jax-triton")
        return device

    # ------------------------------------------------------------------------------------------------------- results

    def record(self, name: str, value: float | None = None, unit: str = "", **about: Any) -> None:
        """Writes a result; `about`: other fields of `Result`."""
        append(self.out / "results.jsonl", Result(section=self.section, name=name, value=value, unit=unit, **about))

    @contextlib.contextmanager
    def attempt(self, name: str, shape: str = "") -> Iterator[None]:
        """What goes wrong in it is the result of that name, and the section goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().splitlines()
            self.record(name, shape=shape, error=f"{type(error).__name__}: {text[0] if text else ''}"[:240])

    # ------------------------------------------------------------------------------------------------------ programs

    def make(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """The arrays that `function(*arrays)` makes, on the device; of a dry run, their shapes."""
        if not self.dry:
            return jax.block_until_ready(jax.jit(function)(*arrays))
        sharding = SingleDeviceSharding(self.device)
        shapes = jax.eval_shape(function, *arrays)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)

    def draw(self, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, seed: int = 0, scale: float = 1.0) -> Any:
        """Normal random numbers."""
        return self.make(lambda: (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype))

    def constant(self, value: Any, dtype: Any = jnp.int32) -> Any:
        """An array of known numbers."""
        return self.make(lambda: jnp.asarray(value, dtype))

    def compile(self, name: str, function: Callable[..., Any], *arrays: Any, shape: str = "") -> Any:
        """`function`, compiled for these arrays; one that is a `jax.jit` already is taken as it is."""
        function = function if hasattr(function, "lower") else jax.jit(function)
        program = function.lower(*arrays).compile()
        if self.dry:
            memory = program.memory_analysis()
            self.record(name, memory.temp_size_in_bytes / 1e6, "MB", shape=shape, note="compiled; temporary memory")
        return program

    def seconds(self, program: Callable[..., Any], *arrays: Any) -> float:
        """Of one call, when calls follow each other: the median of several spans of them."""
        jax.block_until_ready(program(*arrays))
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        calls = min(MOST_CALLS, max(1, round(SPAN_SECONDS / (time.perf_counter() - start))))
        spans = []
        for _ in range(SPANS):
            start = time.perf_counter()
            for _ in range(calls):
                result = program(*arrays)
            jax.block_until_ready(result)
            spans.append((time.perf_counter() - start) / calls)
        return statistics.median(spans)

    def rate(self, name: str, amount: float, unit: str, program: Any, *arrays: Any, **about: Any) -> float | None:
        """Records `amount` (FLOPs, bytes or tokens of a call) per second; returns the seconds, None in a dry run."""
        if self.dry:
            return None
        seconds = self.seconds(program, *arrays)
        self.record(name, amount / seconds, unit, note=f"{seconds * 1e6:.1f} us", **about)
        return seconds

    def speed(
        self, name: str, function: Callable[..., Any], *arrays: Any, flops: float = 0, shape: str = "", **about: Any
    ) -> None:
        """Compiles a function and records its FLOP/s; without `flops` bytes/s, of each input and output once."""
        with self.attempt(name, shape):
            program = self.compile(name, function, *arrays, shape=shape)
            amount = flops or num_bytes(arrays) + num_bytes(program.out_info)
            self.rate(name, amount, "FLOP/s" if flops else "bytes/s", program, *arrays, shape=shape, **about)

    # -------------------------------------------------------------------------------------------------------- parity

    def parity(
        self,
        name: str,
        kernel: Callable[..., Any],
        reference: Callable[..., Any],
        *arrays: Any,
        bound: float,
        shape: str = "",
    ) -> None:
        """Compares `kernel(*arrays)`, in which there must be a kernel, with `reference(*arrays)`, made of plain JAX.

        The reference is compiled without kernels and with exact products. The error is the Frobenius norm of the
        difference over that of the reference, of the array where it is largest. What the kernel writes into has held
        NaN before, as far as the allocator gives the same memory again.
        """
        with self.attempt(name, shape):
            program = self.compile(name, kernel, *arrays, shape=shape)
            with plain_form(), jax.default_matmul_precision("highest"):
                # a function of its own: what JAX has traced of `kernel`, which may be the same, is not taken
                plain = self.compile(f"{name}, reference", lambda *given: reference(*given), *arrays, shape=shape)
            if has_kernel(plain) or not has_kernel(program):
                raise RuntimeError(
                    "a kernel is in the reference" if has_kernel(plain) else "no kernel is in the program"
                )
            if self.dry:
                return
            want = jax.block_until_ready(plain(*arrays))
            jax.block_until_ready(jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan, a.dtype), program.out_info))
            self.record(name, relative_error(program(*arrays), want), "error", shape=shape, bound=bound)

    # --------------------------------------------------------------------------------------------------------- torch

    def with_torch(self, what: str, **sizes: Any) -> None:
        """Records what `with_torch.py` measures, in a process that has the GPU for itself: JAX must not have begun."""
        program = Path(__file__).with_name("with_torch.py")
        command = [self.torch, "-P", str(program), what, json.dumps(sizes)]  # -P: modules beside it are not packages
        process = subprocess.Popen(command + ["--tiny"] * self.dry, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            self.record(**json.loads(line))
        if process.wait():
            raise RuntimeError(f"{what} on torch ended with exit code {process.returncode}")


@contextlib.contextmanager
def plain_form() -> Iterator[None]:
    """In it programs are traced as for a CPU: operations have the form in plain JAX."""

    def plain(*arrays: Any, default: Callable[..., Any], **_: Any) -> Any:
        return default(*arrays)

    with patch.object(jax.lax, "platform_dependent", plain):
        yield


def has_kernel(program: Any) -> bool:
    """Whether a compiled program calls one of ours, or cuDNN's attention."""
    text = program.as_text()
    return any(f'custom_call_target="{name}' in text for name in KERNELS)


def relative_error(got: Any, want: Any) -> float:
    """Of the array in which it is largest: the norm of the difference, over that of what is wanted if this is not 0."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        norm = jnp.linalg.norm(b.ravel())
        return jnp.linalg.norm((a - b).ravel()) / jnp.where(norm == 0, 1, norm)

    errors = jax.tree.map(jax.jit(one), jax.tree.leaves(got), jax.tree.leaves(want))
    return float(jnp.max(jnp.stack(errors)))  # NaN if one is


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
