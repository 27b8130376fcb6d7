"""Calls of Triton kernels from JAX, through either interface of jax-triton: 0.3's and 0.4's."""

import functools
import importlib
import importlib.util
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jaxtyping import Array

from moejax.varying import vary_over

HOPPER = 90  # compute capability


@functools.cache
def available() -> bool:
    """Whether Triton and jax-triton are installed, and can be imported: jax-triton needs JAX's plugin for CUDA.

    Where there are GPUs of another kind than Hopper the answer is no: programs for it do not run on them.
    """
    device = jax.local_devices()[0]
    if device.platform == "gpu" and float(device.compute_capability) * 10 != HOPPER:
        return False
    if not all(importlib.util.find_spec(name) for name in ("triton", "jax_triton")):
        return False
    try:
        importlib.import_module("jax_triton")
    except ImportError as error:
        logging.getLogger(__name__).warning("no Triton kernels: %s", str(error).splitlines()[0])
        return False
    return True


def launch(
    kernel: Any,
    *arrays: Array,
    out: Any,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    aliases: dict[int, int] | None = None,
    flops: int = 0,
    **constants: Any,
) -> Any:
    """What `kernel` computes of `arrays`: arrays of the shapes and dtypes of `out`, a `ShapeDtypeStruct` or a tuple.

    The kernel's parameters are, in this order, a pointer for each of `arrays`, one for each of `out`, and `constants`.
    With `aliases={i: j}` output j is computed in the buffer of array i: the kernel finds it there, and leaves the
    output's own parameter alone, which 0.3 fills with the same pointer and 0.4 with None.

    `flops` of a product of matrices, at most: its name in the program says them, for profiles and `plan.overlap`.

    Works under jit, scan and shard_map; outputs vary over the mesh axes over which any of `arrays` varies. It has no
    gradient and no batching rule.
    """
    import jax_triton

    aliases = aliases or {}
    if jax_triton.__version_info__ >= (0, 4):
        outputs = kernel.arg_names[len(arrays) :]
        given = {"out_type": out} | {outputs[j]: None for j in aliases.values()}
    else:
        given = {"out_shape": out}
    with costing(flops):
        computed = jax_triton.triton_call(
            *arrays,
            kernel=kernel,
            name=kernel.__name__,
            grid=grid,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=HOPPER,
            input_output_aliases=aliases,
            **given,
            **constants,
        )
    axes = set().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))
    return jax.tree.map(lambda array: vary_over(array, axes), computed)


def costing(flops: int) -> AbstractContextManager[Any]:
    """Names what is called inside it by its FLOPs, which XLA does not know of a kernel: `.../flops=1024/...`."""
    return jax.named_scope(f"flops={flops}") if flops else nullcontext()
