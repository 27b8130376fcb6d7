"""The speed that a share of the peak (MFU) is relative to, and the memory that a run has used."""

import resource
import sys
import time

import jax
import jax.numpy as jnp
import psutil

# Dense BF16 peaks of the data sheets, TFLOP/s: without sparsity, which would double them.
BF16_PEAKS = {"H100 PCIe": 756, "H100": 989.5, "H200": 989.5, "H800": 989.5, "A100": 312, "B200": 2250}


def peak_flops(num_devices: int) -> float:
    """FLOP/s of the devices together: the data sheet's dense BF16 peak, or on others a measured product in FP32."""
    kind = jax.devices()[0].device_kind
    for name, peak in BF16_PEAKS.items():
        if name in kind:
            return peak * 1e12 * num_devices
    return _measured_flops()


def _measured_flops(size: int = 1024, tries: int = 10) -> float:
    """FLOP/s of the fastest of some products of two FP32 matrices, on the cores that all devices share."""
    x = jnp.ones((size, size))
    product = jax.jit(jnp.dot)
    jax.block_until_ready(product(x, x))
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def memory_limit_bytes() -> int:
    """Memory of the smallest device; on CPU, of the machine."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return min(s.get("bytes_limit", psutil.virtual_memory().total) for s in stats)


def peak_memory_bytes() -> int:
    """Most memory that the fullest device has held so far; on CPU, that this process has."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    most = max(s.get("peak_bytes_in_use", 0) for s in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return most or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
