"""Freed memory is kept for the next tensor, and goes back where it is told to."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

from qmerge.heap import give_back, keep_freed

TENSORS, MIB = 32, 1 << 20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def resident_mib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) >> 10


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    keep_freed()
    give_back()
    before = resident_mib()
    tensors = [torch.ones(MIB) for _ in range(TENSORS)]  # 4 MiB each: mapped one by one, left alone
    full = resident_mib()
    del tensors
    kept = resident_mib()
    give_back()
    after = resident_mib()
    assert full - before >= 4 * TENSORS - 16
    assert kept >= full - 16
    assert after <= before + 16
