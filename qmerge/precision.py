"""Products on a processor's matrix units.

What goes in is rounded, to bf16 on a CPU with AMX and to TF32 on a GPU; what comes out is summed in
float32. A Hessian is a mean over thousands of such products, and takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@contextmanager
def reduced_precision(allowed: bool = True) -> Iterator[None]:
    """While this lasts, products of float32 matrices are made on matrix units that there are, where
    that is `allowed`."""
    if not allowed:
        yield
        return
    before = [(matmul, matmul.fp32_precision) for matmul, _ in _backends().values()]
    try:
        for matmul, precision in _backends().values():
            matmul.fp32_precision = precision
        yield
    finally:
        for matmul, precision in before:
            matmul.fp32_precision = precision


def precision_on(device: torch.device) -> str | None:
    """What inputs of a product on this device are rounded to: "bf16", "tf32" or nothing."""
    _, precision = _backends().get(device.type, (None, None))
    return precision


@cache
def _backends() -> dict[str, tuple[Any, str]]:
    """Backends of torch that have matrix units by kind of device, and what turns them on."""
    cpu: Any = torch.cpu
    backends: Any = torch.backends
    found = {}
    # On other CPUs a product in bf16 takes longer than in float32. torch 2.9 cannot tell.
    if hasattr(cpu, "get_capabilities") and cpu.get_capabilities().get("amx_bf16"):
        found["cpu"] = backends.mkldnn.matmul, "bf16"
    if torch.cuda.is_available():
        found["cuda"] = backends.cuda.matmul, "tf32"
    return found
