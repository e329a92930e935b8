"""Freed memory, given back to the system.

The C library keeps what is freed for later. Between blocks still in use a large tensor does not
fit into it and is laid beside it, and the peak grows: by a quarter where the forwards of a layer
wait in memory while its linears are solved.
"""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return every free page, where the C library is glibc; elsewhere do nothing."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
