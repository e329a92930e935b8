"""Freed memory is kept for the next tensor, and goes back where it is told to."""

from __future__ import annotations

import platform

import pytest
import torch

from qmerge.heap import give_back, keep_freed
from qmerge.meter import resident

TENSORS, MIB = 32, 1 << 20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    keep_freed()
    give_back()
    before = resident()
    tensors = [torch.ones(MIB) for _ in range(TENSORS)]  # 4 MiB each: mapped one by one, left alone
    full = resident()
    del tensors
    kept = resident()
    give_back()
    after = resident()
    assert full - before >= (4 * TENSORS - 16) * MIB
    assert kept >= full - 16 * MIB
    assert after <= before + 16 * MIB
