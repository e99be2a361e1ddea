"""How the C library keeps the memory that tensors on a CPU gave back."""

from __future__ import annotations

import ctypes
import os
import sys

HEAP_BLOCK = 2**23
"""Bytes from which a block of memory stands alone and returns to the system when it is freed."""
_MMAP_THRESHOLD = -3  # of malloc.h


def return_large_blocks() -> None:
    """Let blocks from HEAP_BLOCK on return to the system as soon as they are freed.

    Left alone, glibc raises that limit to 32 MiB as it goes, and keeps what is smaller in a heap, in whose gaps a run held up to a
    third more than it used. Whoever set the limit in the environment (MALLOC_MMAP_THRESHOLD_) keeps it. Other C libraries have no
    such heap, and nothing is done.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, HEAP_BLOCK)
