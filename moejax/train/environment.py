"""What a run runs on: versions, devices, processor, memory (its environment.json), and the programs compiled for it."""

import importlib.metadata
import os
import platform
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import psutil
from jax.experimental.compilation_cache import compilation_cache

PACKAGES = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
VARIABLES = ("JAX_", "XLA_", "CUDA_VISIBLE_", "NCCL_", "SLURM_JOB_ID", "OMP_NUM_THREADS")  # prefixes


def environment_report() -> dict[str, Any]:
    """The report, ready for JSON. Memory is in bytes. Starts JAX's devices when nothing has yet."""
    return {
        "command": sys.argv,
        "working_directory": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "backend": jax.default_backend(),
        "devices": dict(Counter(device.device_kind for device in jax.devices())),  # kind: how many
        "processes": jax.process_count(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def versions() -> dict[str, str | None]:
    """Of the packages that make the numbers of a run; None where one is not installed."""
    return {name: _version(name) for name in PACKAGES}


def keep_programs(folder: Path) -> None:
    """Keeps compiled programs there, so that another start need not compile; JAX_COMPILATION_CACHE_DIR goes first."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        if jax.default_backend() == "cpu":  # programs suit one kind of processor; a folder may be shared by several
            kind = _of_processor("flags") or _processor()
            folder = folder / f"cpu-{zlib.crc32(kind.encode()):08x}"
        compilation_cache.reset_cache()  # where something has been compiled before, it is taken to be switched off
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    return _of_processor("model name") or platform.processor() or platform.machine()


def _of_processor(fact: str) -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(fact))
    except (OSError, StopIteration):  # not Linux, or not x86
        return None
