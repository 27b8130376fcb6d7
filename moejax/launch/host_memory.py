"""What glibc does with freed memory, for runs on CPU.

A step on CPU allocates its temporaries, hundreds of MB, and frees them at its end. As glibc comes it gives so much back
to the system each time, and the next step pays for a hundred thousand page faults.
"""

import ctypes
import importlib.metadata
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of malloc.h
_HUGE, _ADVICE_HUGE = 2**21, 14  # bytes of a huge page; MADV_HUGEPAGE


def will_run_on_cpu() -> bool:
    """Whether JAX is yet to start here, and will run on CPU: as it was asked to, or as it has no plugin."""
    import jax

    if _has_started():
        return False
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]
    return asked.split(",")[0] == "cpu" if asked else not importlib.metadata.entry_points(group="jax_plugins")


def _has_started() -> bool:
    """Whether JAX has its devices: then it takes no other number of them."""
    import jax

    devices = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_num_cpu_devices", devices + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", devices)
    return False


def keep_freed_memory() -> None:
    """From now on this process keeps what it has freed, in one heap of huge pages; nothing where libc is not glibc.

    The process then stays as large as it once was. To be called before JAX starts: its threads are to use that heap.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):
        libc.mallopt(option, value)
    _advise_huge_pages(libc, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _advise_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Lets the heap grow by `size` bytes that lie in huge pages once they are used."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = libc.malloc(size)
    if address:
        start = -(-address // _HUGE) * _HUGE
        libc.madvise(start, (address + size - start) // _HUGE * _HUGE, _ADVICE_HUGE)
        libc.free(address)
