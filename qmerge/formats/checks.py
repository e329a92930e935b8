"""What readers check before they believe a header; CheckpointError names the tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats.settings import Settings
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.headers import TensorInfo

DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WORD_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def nothing_quantized(checkpoint: Checkpoint, file: str | None, method: str) -> CheckpointError:
    """The settings speak of quantization and no tensor is quantized: a half-made release."""
    return CheckpointError(
        f"{checkpoint.path}: {file} says {method}, but no tensor is quantized",
        hint="remove the settings if the model is dense; else look for the quantized files",
    )


def expect_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], why: str) -> None:
    """CheckpointError naming the tensor unless its shape is `wanted`."""
    if tuple(found) != tuple(wanted):
        raise CheckpointError(
            f"{name}: shape {list(found)}, where {why} makes it {list(wanted)}",
            hint="the settings are of another checkpoint, or the file is damaged",
        )


def expect_dtype(info: TensorInfo, wanted: Collection[torch.dtype], what: str) -> None:
    """CheckpointError naming the tensor unless its dtype is one of `wanted`."""
    if info.dtype not in wanted:
        raise CheckpointError(
            f"{info.name}: stored as {info.dtype}, which no {what} is",
            hint="the file is damaged or was written by an incompatible program",
        )


def expect_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor; CheckpointError naming it where it holds a NaN or an infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{name}: holds values that are not finite",
            hint="the quantizer that wrote this checkpoint failed on this layer",
        )
    return tensor


def required(module: str, parts: Mapping[str, TensorInfo], suffix: str) -> TensorInfo:
    """The part, or CheckpointError naming the tensor that is missing."""
    if suffix not in parts:
        raise CheckpointError(
            f"{module}.{suffix} is missing, and {', '.join(sorted(parts))} are there",
            hint="the download is incomplete: compare the files with the model's page",
        )
    return parts[suffix]


def expect_group_size(module: str, settings: Settings, width: int, *, default: int) -> int:
    """Columns that share a step; −1 where all do, as wherever a group is as wide as the input."""
    size = settings.integer("group_size", default)
    if size != -1 and size < 1:
        raise CheckpointError(f"{settings.file}: group size {size} for {module}")
    return -1 if size >= width else size
