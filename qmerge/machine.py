"""What this machine has, and how fast it does what a run is made of.

Each piece is tried once, small, on random numbers, and remembered while the process lives. What is
written to see how fast a disk is has no name there, and is gone.

O, I: out and in features; W, S, H: windows, tokens of a window, hidden width.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qmerge.gptq import Drift, GridSpec, Hessian, solve_update
from qmerge.job import existing
from qmerge.measure.tokens import TokenAccumulator
from qmerge.model.frame import Frame, GivenWeights
from qmerge.model.layer import called_bytes as bytes_of_calls
from qmerge.model.layer import fill, linears, move, run
from qmerge.model.paused import Held, most_held
from qmerge.model.paused import held_bytes as bytes_held
from qmerge.model.skeleton import Skeleton, text_config
from qmerge.precision import reduced_precision
from qmerge.texts import TOKENS_AT_ONCE

SQUARE = {"cpu": 768, "cuda": 4096}
"""Rows of the matrices whose product is timed."""
PRODUCTS = 10
"""Products [O, I] with [I, I] that rounding a linear takes: passes, refits, the moved target, and
what is measured of it."""
NARROW, LOW, HIGH = 256, 64, 1024
"""In features, and few and many out features, of the linears whose rounding is timed."""
PASSED = 1 << 22
"""Numbers of a trial of memory."""
LARGE = 1 << 24
"""Parameters above which a layer is not tried itself: its products take nearly all of its time."""
WORK = 1 << 31
"""Multiplications of a layer's trial, which is of one window at least."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configurations call the number of experts in a layer."""
WRITTEN = 1 << 23
"""Bytes of a trial of a disk."""

MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Seconds of quantizing a linear [O, I] beside its large products."""

    per_column: float
    per_weight: float


def disk_free(path: Path) -> int:
    """Bytes free where `path` is or will be."""
    status = os.statvfs(existing(path))
    return status.f_bavail * status.f_frsize


def memory_size(device: torch.device) -> int:
    """Bytes of memory that a device has; of the host, what its processes may have of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = MEMORY_LIMIT.read_text().strip()
    except OSError:
        return size
    return min(size, int(limit)) if limit.isdecimal() else size


@cache
def product_seconds(device: torch.device) -> float:
    """Seconds of one multiplication and addition in a product of large float32 matrices."""
    return _product(device)


@cache
def reduced_seconds(device: torch.device) -> float:
    """As `product_seconds`, on matrix units where there are any."""
    with reduced_precision():
        return _product(device)


def _product(device: torch.device) -> float:
    size = SQUARE.get(device.type, SQUARE["cuda"])
    matrix = torch.ones(size, size, device=device)
    return _seconds(lambda: matrix @ matrix, device) / size**3


@cache
def pass_seconds(device: torch.device) -> float:
    """Seconds to read one float32 number from memory and write it back."""
    numbers = torch.ones(PASSED, device=device)
    return _seconds(lambda: numbers * 2, device) / PASSED


@cache
def rounding_seconds(device: torch.device) -> Rounding:
    """Measured on two linears of equal width, which tells what a column costs from what a weight
    does."""
    low, high = (_rounded(rows, device) for rows in (LOW, HIGH))
    per_weight = max(0.0, high - low) / ((HIGH - LOW) * NARROW)
    return Rounding(per_column=max(0.0, low / NARROW - per_weight * LOW), per_weight=per_weight)


def _rounded(rows: int, device: torch.device) -> float:
    """Seconds of rounding one linear, less those of its large products."""
    draw = torch.Generator().manual_seed(0)
    origin_OI = torch.randn(rows, NARROW, generator=draw).to(device)
    merged_OI = origin_OI + 0.1 * torch.randn(rows, NARROW, generator=draw).to(device)
    inputs_NI = torch.randn(2 * NARROW, NARROW, generator=draw).to(device)
    hessian, drift = Hessian(NARROW, device=device), Drift(NARROW, NARROW, device=device)
    hessian.add(inputs_NI)
    drift.add(1.01 * inputs_NI, inputs_NI, inputs_NI)
    H_II, spec = hessian.mean(), GridSpec(bits=4, group_size=64, symmetric=True)

    def work() -> None:
        solve_update(merged_OI, origin_OI, H_II, spec, rows=(rows,), drift_II=drift.mean())

    products = PRODUCTS * rows * NARROW**2 * product_seconds(device)
    return max(0.0, _seconds(work, device) - products)


@cache
def scoring_seconds(device: torch.device) -> float:
    """Seconds that one logit of one model adds to the figures of its token, once it is computed."""
    rows, width, arms = 64, 2048, ("reference", "other")
    logits = {arm: torch.randn(rows, width, device=device) for arm in arms}
    targets_R = torch.zeros(rows, dtype=torch.long, device=device)

    def work() -> None:
        TokenAccumulator(arms, arms[0], targets_R).add(0, logits)

    return _seconds(work, device) / (rows * width * len(arms))


def layer_seconds(skeleton: Skeleton, length: int, device: torch.device) -> float:
    """Seconds that one token of a window of `length` takes through the first decoder layer."""
    layer = skeleton.layer(0)
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    if parameters > LARGE:
        return active_weights(skeleton) * product_seconds(device)
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in layer.named_parameters())
    key = (type(skeleton.model).__name__, shapes, length, device)
    if key not in _LAYERS:
        _LAYERS[key] = _tried(skeleton, layer, length, device)
    return _LAYERS[key]


_LAYERS: dict[Any, float] = {}


def _tried(skeleton: Skeleton, layer: nn.Module, length: int, device: torch.device) -> float:
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: 0.02 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in layer.state_dict().items()
        if tensor.is_meta
    }
    fill(layer, weights)
    layer.to(device)
    call = move(_frame(skeleton).calls(length), device)[0]
    products = sum(tensor.numel() for tensor in weights.values()) * length
    windows = max(1, min(TOKENS_AT_ONCE // length, WORK // products))
    hidden_WSH = torch.randn(windows, length, skeleton.hidden_size, generator=draw).to(device)
    return _seconds(lambda: run(layer, hidden_WSH, call), device) / (windows * length)


def called_bytes(skeleton: Skeleton, length: int) -> int:
    """Bytes of what all layers are called with for a window of text."""
    return bytes_of_calls(_frame(skeleton).calls(length))


def held_bytes(skeleton: Skeleton, length: int, stops: Collection[str]) -> Held:
    """Most bytes per token that forwards of windows of `length` hold while they wait before the
    linears in `stops`: every kind of layer is run on the meta device, without memory. RuntimeError
    where one cannot be run there."""
    meta, most = torch.device("meta"), Held(0, 0)
    calls = move(_frame(skeleton).calls(length), meta)
    hidden_1SH = torch.empty(1, length, skeleton.hidden_size, device=meta)
    seen = set()
    for index, call in enumerate(calls):
        layer = skeleton.layer(index).to(meta)
        make = frozenset((name, tensor.shape) for name, tensor in layer.named_parameters())
        if make not in seen:
            before = {name: module for name, module in linears(layer).items() if name in stops}
            found = most_held(bytes_held(layer, hidden_1SH, call, before))
            most = Held(*map(max, most, found))
        seen.add(make)
    return Held(*(held // length for held in most))


def _frame(skeleton: Skeleton) -> Frame:
    """One with zeros outside the layers: what a layer is called with depends on no weight."""
    zeros = {name: torch.zeros(()).expand(t.shape) for name, t in skeleton.parameters().items()}
    return Frame(skeleton, GivenWeights(zeros))


def active_weights(skeleton: Skeleton) -> int:
    """Weights of the first layer that one token is multiplied with: of experts, its own."""
    config = text_config(skeleton.model.config)
    experts = next((n for key in EXPERTS if (n := getattr(config, key, None))), 0)
    met = getattr(config, "num_experts_per_tok", None) or experts
    parameters = skeleton.layer(0).named_parameters()
    return sum(
        tensor.numel() * met // experts if experts and ".experts." in f".{name}" else tensor.numel()
        for name, tensor in parameters
    )


@cache
def digest_seconds() -> float:
    """Seconds to hash one byte with SHA-256."""
    data = bytes(WRITTEN)
    return _seconds(lambda: hashlib.sha256(data).digest(), torch.device("cpu")) / WRITTEN


def disk_seconds(path: Path) -> float:
    """Seconds to write one byte to the disk that `path` is on, force it there and read it back; 0
    where nothing may be written."""
    folder = existing(path)
    disk = folder.stat().st_dev
    if disk not in _DISKS:
        _DISKS[disk] = _written(folder) / WRITTEN
    return _DISKS[disk]


_DISKS: dict[int, float] = {}


def _written(folder: Path) -> float:
    began = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(WRITTEN))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            file.read()
    except OSError:
        return 0.0
    return time.perf_counter() - began


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The faster of two runs, after one that warms up."""
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
