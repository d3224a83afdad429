"""How the memory of tensors is handed back: not between one step and the next, which would ask for it again."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings (malloc.h)."""
KEPT, LARGEST_OF_OLD = 2**30, 2**25
"""Bytes that are kept when freed, and the size of tensors from which on each has pages of its own; glibc before 2.35
takes no more than the second for the latter."""

DECIDED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user has decided already."""


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for later ones, where the user has not decided; else no effect.

    By default every large tensor has pages of its own, and the kernel clears each of them anew: on a network of
    convolutions that took a third of the processor's time. The most that a run takes at once stays nearly the same.
    """
    if sys.platform != "linux" or any(name in os.environ for name in DECIDED):
        return
    with suppress(OSError, AttributeError):  # there is no such setting
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(TRIM_THRESHOLD, KEPT)
        if not mallopt(MMAP_THRESHOLD, KEPT):
            mallopt(MMAP_THRESHOLD, LARGEST_OF_OLD)
