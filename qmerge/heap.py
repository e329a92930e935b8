"""What the C library does with freed memory, where it is glibc; elsewhere nothing happens here.

Left alone, it gives every large tensor back to the system as it is freed and has the next one
zeroed page by page: up to a tenth of a run. Kept, freed memory is used again. But between blocks
still in use a large tensor does not fit into what was kept and is laid beside it, and the peak
grows, by a quarter where the forwards of a layer wait in memory while its linears are solved: there
it is given back, and behind each layer.
"""

from __future__ import annotations

import ctypes
import sys

# Of <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

KEPT = 1 << 30
"""Bytes free at the heap's end from which on they go back by themselves."""


def keep_freed() -> None:
    """Have freed memory used again, that of large tensors as well."""
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Return every free page to the system."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(function: str) -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
