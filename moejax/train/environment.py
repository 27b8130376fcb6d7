"""What a run ran on: versions, devices, processor, memory. A run folder keeps it as environment.json."""

import importlib.metadata
import os
import platform
import sys
from collections import Counter
from typing import Any

import jax
import psutil

PACKAGES = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
VARIABLES = ("JAX_", "XLA_", "CUDA_VISIBLE_", "NCCL_", "SLURM_JOB_ID", "OMP_NUM_THREADS")  # prefixes


def environment_report() -> dict[str, Any]:
    """The report, ready for JSON. Memory is in bytes. Starts JAX's devices when nothing has yet."""
    return {
        "command": sys.argv,
        "working_directory": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": dict(Counter(device.device_kind for device in jax.devices())),  # kind: how many
        "processes": jax.process_count(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()
