"""Freed memory is kept for the next tensor, and goes back where it is told to."""

from __future__ import annotations

import multiprocessing
import platform

import pytest
import torch

from qmerge.heap import give_back, keep_freed
from qmerge.meter import resident

TENSORS, MIB = 32, 1 << 20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def held() -> tuple[int, ...]:
    """Resident bytes before there are tensors, with them, behind them, and once given back."""
    keep_freed()
    give_back()
    before = resident()
    tensors = [torch.ones(MIB) for _ in range(TENSORS)]  # 4 MiB each: mapped one by one, left alone
    full = resident()
    del tensors
    kept = resident()
    give_back()
    return before, full, kept, resident()


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    # A process of its own: the heap of one that ran other tests has holes that tensors fit into.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before, full, kept, after = pool.apply(held)
    assert full - before >= (4 * TENSORS - 16) * MIB
    assert kept >= full - 16 * MIB
    assert after <= before + 16 * MIB
