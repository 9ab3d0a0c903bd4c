"""glibc's allocator, told to keep what is freed: tensors of megabytes come and go at every step.

By default each is mapped anew and every page of it faults in: 3,500 faults and 9 of 31 ms of processor time in an outer step of
the benchmark's reference work (256 tasks). Memory then stays at the peak of what was in use at once, which it reaches anyway.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_BYTES = 32 * 1024 * 1024  # glibc refuses a larger threshold for mapping
_KEPT_BYTES = 1024 * 1024 * 1024


def keep_freed_memory() -> bool:
    """For this process, from now on; False where the C library has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
