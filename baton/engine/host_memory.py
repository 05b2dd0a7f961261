"""Host memory as the engine wants it: lazily resident pools, and buffers that are kept.

Not known here: what the memory holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from dataclasses import dataclass

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_KEPT_BYTES = 32 << 20
"""glibc's own upper bound for M_MMAP_THRESHOLD on 64-bit machines."""
_KEPT_TOP_BYTES = 512 << 20


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed buffers instead of returning them to the kernel.

    A step allocates and frees the same multi-megabyte activations layer after layer; fetching
    their pages anew each time costs more than half of the attention time of a 512-token prefill.
    Affects the whole process. Returns False where the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        and mallopt(_M_TRIM_THRESHOLD, _KEPT_TOP_BYTES)
        and mallopt(_M_TOP_PAD, _LARGEST_KEPT_BYTES)
    )


def release_freed_memory() -> None:
    """Hand what is free now back to the kernel: loading leaves tens of megabytes behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """Zeroed, page-aligned, writable memory whose pages become resident when first written."""

    memory: memoryview
    fd: int | None
    """Names the memory for other processes that map it; None when it is ours alone. Belongs to
    whoever made the memory."""


def map_pool(num_bytes: int) -> memoryview:
    """Memory for this process alone."""
    return memoryview(mmap.mmap(-1, num_bytes))


def map_own_pool(num_bytes: int) -> PoolMemory:
    """`map_pool`, where memory with a descriptor is allowed too."""
    return PoolMemory(map_pool(num_bytes), None)


def map_shared_pool(num_bytes: int) -> PoolMemory:
    """Memory that other processes may map. Close the descriptor once they have; it stays ours."""
    fd = os.memfd_create("baton-kv-pool", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return PoolMemory(memoryview(mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED)), fd)
