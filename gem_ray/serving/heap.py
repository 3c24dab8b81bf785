"""The heap of processes that take large bodies in."""

from __future__ import annotations

import ctypes

# glibc's mallopt.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX.
_OPTIONS = {-1: 2**20, -3: 2**20, -8: 2}


def give_freed_memory_back() -> None:
    """Let glibc give freed blocks of a MiB and more back to the system at once; other C libraries do as they do.

    By itself it puts blocks of up to 32 MiB on its heaps once one of that size was freed, and gives a heap to each
    thread: between bodies that come and go they grow with every one that does not fit. Processes with models are better
    off so, since their tensors would be mapped anew each time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _OPTIONS.items():
            mallopt(option, value)
