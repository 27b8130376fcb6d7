"""What this GPU reaches at best: versions, the speed of a copy, and the rates of dense products by XLA and by torch."""

import importlib.metadata
import shutil
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib import _jax

from gpu.bench import Bench
from gpu.kernels import E4M3, PRODUCTS, SIZES, dense_shape

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-triton", "triton", "flax", "torch", "transformers")
LIBRARIES = ("nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-nccl-cu13", "nvidia-cuda-nvcc", "nvidia-cuda-nvrtc")
QUERY = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")
COPIED = 1 << 32  # bytes
LARGEST = (8192, 8192, 8192)


def versions(bench: Bench) -> None:
    """Of all that makes the numbers; what XLA knows of the GPU is left in `gpu.txtpb`."""
    for package in (*PACKAGES, *LIBRARIES):
        bench.record(package, note=_version(package))
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
        for name, value in zip(QUERY, found.split(", "), strict=True):
            bench.record(f"GPU {name}", note=value)
    device = bench.device
    bench.record("device", note=device.device_kind)
    if bench.dry:
        return
    bench.record("device memory", (device.memory_stats() or {}).get("bytes_limit"), "bytes", note="that JAX may take")
    topology = _jax.get_topology_for_devices(jax.local_devices())
    described = getattr(topology, "target_config", None)  # an attribute that plug-ins for CUDA have
    if described is not None:
        (bench.out / "gpu.txtpb").write_text(str(described), encoding="utf-8")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def dense_sizes() -> list[tuple[int, int, int]]:
    """Rows, contraction and columns of the dense products that grouped ones are compared with, and of a large one."""
    rows = sorted({rows for _, rows in SIZES})
    return [(r, *dims) for r in rows for dims in PRODUCTS.values()] + [LARGEST]


def ceilings(bench: Bench, sizes: list[tuple[int, int, int]] | None = None) -> None:
    """By XLA: it times cuBLAS and its own kernels for each size, and takes the fastest."""
    x = bench.draw((COPIED // 2,))
    bench.speed("copy", jnp.copy, x, by="XLA")
    bench.speed("start of a program", lambda x: x + 1, bench.draw((8,)), by="XLA")

    def dot(a: Any, b: Any) -> Any:
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    for rows, inner, columns in sizes or dense_sizes():
        a, b = bench.draw((rows, inner), seed=1), bench.draw((columns, inner), seed=2)
        flops, shape = 2.0 * rows * inner * columns, dense_shape(rows, inner, columns)
        bench.speed("dense bf16", dot, a, b, flops=flops, shape=shape, by="XLA")
        a, b = bench.make(lambda a, b: (a.astype(E4M3), b.astype(E4M3)), a, b)
        bench.speed("dense fp8", dot, a, b, flops=flops, shape=shape, by="XLA")


def ceilings_of_torch(bench: Bench) -> None:
    """By torch: a copy, cuBLAS in BF16, and cuBLASLt in FP8 with a scale for each factor."""
    bench.with_torch("ceilings", sizes=dense_sizes(), copied=COPIED)
