"""Which form of an operation runs: a kernel on NVIDIA GPUs, plain JAX elsewhere. Nothing above an op knows."""

from collections.abc import Callable
from typing import Any

from jax import lax

from moejax.kernels.launch import available


def by_platform(kernel: Callable[..., Any], plain: Callable[..., Any], *arrays: Any) -> Any:
    """`kernel(*arrays)` where the program is compiled for CUDA and Triton is installed, else `plain(*arrays)`.

    Both give arrays of equal shapes and dtypes. The kernel's module is to be imported inside `kernel`: it needs Triton.
    """
    return lax.platform_dependent(*arrays, cuda=kernel, default=plain) if available() else plain(*arrays)
