"""Memory of large tensors on the CPU, which the C library gives back to the system and asks for again.

A convolution of X-101 writes 35 MB. By default glibc takes every block of that size from the system and returns it
when it is freed, and the system fills each of its 4 KB pages with zeros at the first touch: a third of the time of the
plain network. Kept, the pages are there already. Results are the same to the last bit; the most memory that the
program has used stays with it until it ends.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
CHOSEN_BY_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Lets glibc keep freed blocks of up to 1 GiB for the next tensor, unless the environment sets its thresholds.

    Returns:
        Whether it does; `False` where the C library is another one.
    """
    if any(name in os.environ for name in CHOSEN_BY_THE_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all([mallopt(M_MMAP_THRESHOLD, 2**30), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)])
