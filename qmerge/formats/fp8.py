"""FP8 checkpoints with one scale per block, as DeepSeek-V3 and Qwen3-FP8 are published.

Shapes: O out features, I in features. Stored: X float8 [..., O, I] and X_scale_inv [..., blocks of
O, blocks of I], usually 128 by 128. The weight is code times scale, despite the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats.base import (
    FormatSummary,
    Reader,
    StoredWeight,
    common_dtype,
    dense_weights,
    tally,
)
from qmerge.formats.checks import DENSE_DTYPES, expect_dtype, expect_finite, nothing_quantized
from qmerge.formats.integer import ALL, by_rows
from qmerge.formats.packing import look_up
from qmerge.formats.settings import Settings
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.headers import TensorInfo

FP8_DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
SCALE_DTYPES = (*DENSE_DTYPES, torch.float8_e8m0fnu)
SCALE_ENDINGS = ("_scale_inv", "_scale")


class Fp8Reader(Reader[tuple[int, int]]):
    """Weights in FP8 with a scale per block, per row or for all."""

    methods: ClassVar[tuple[str, ...]] = ("fp8",)

    @classmethod
    def open(cls, checkpoint: Checkpoint, settings: Settings) -> Self:
        tensors, block = checkpoint.tensors, _block(settings)
        pairs = {
            name: _scale_of(tensors, name)
            for name, info in tensors.items()
            if info.dtype in FP8_DTYPES
        }
        if not pairs:
            raise nothing_quantized(checkpoint, settings.file, "fp8")
        claimed = {*pairs, *pairs.values()}
        weights = dense_weights(checkpoint, [n for n in tensors if n not in claimed], "fp8")
        dtype = common_dtype(weights)
        for name, scale in pairs.items():
            shape = tensors[name].shape
            expect_dtype(tensors[scale], SCALE_DTYPES, "scale")
            expect_scale_shape(scale, tensors[scale].shape, shape, block)
            weights.append(
                StoredWeight(
                    name=name,
                    shape=shape,
                    dtype=dtype,
                    quantized=True,
                    sources=(name, scale),
                    bits=8,
                )
            )
        summary = FormatSummary(
            method="fp8",
            checkpoint_format=settings.text("fmt", "e4m3"),
            settings_file=settings.file,
            bits=8,
            **tally(weights),
        )
        layouts = dict.fromkeys(pairs, block)
        return cls(checkpoint, name="fp8", weights=weights, summary=summary, layouts=layouts)

    def _decode(self, weight: StoredWeight, rows: slice, dtype: torch.dtype) -> Tensor:
        code, scale = (self.checkpoint.read(name) for name in weight.sources)
        scale = expect_finite(weight.sources[1], scale.to(torch.float32))
        return decode_scaled(code, scale, self.layouts[weight.name], dtype, rows)


def decode_scaled(
    code: Tensor,
    scale: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    part: slice = ALL,
) -> Tensor:
    """FP8 `code` [..., O, I] times an fp32 scale: one for all, one per row, or one per block.

    Computed in fp32 and rounded once if `dtype` is narrower. `part` is of the first dimension.
    """
    height, width = code.shape[-2:]
    if scale.numel() == 1:
        block = (height, width)
    elif scale.shape in (code.shape[:-1], (*code.shape[:-1], 1)):
        block = (1, width)
    high, wide = block
    flat, bands = code.reshape(-1, width), -(-height // high)
    scale = scale.reshape(-1, -(-width // wide))
    table = _values(code.dtype)
    first, stop, _ = part.indices(len(code))
    before = first * len(flat) // len(code)
    flat = flat[before : stop * len(flat) // len(code)]

    def fill(rows: slice, out: Tensor) -> None:
        row = torch.arange(before + rows.start, before + rows.stop)
        # A band ends where its matrix ends, which may be before its last block is full.
        steps = scale[row // height * bands % len(scale) + row % height // high]
        _decode_into(out.view(-1), flat[rows].view(-1), table)
        if width % wide:
            out.mul_(steps.repeat_interleave(wide, dim=1)[:, :width])
        else:
            out.view(len(row), -1, wide).mul_(steps.unsqueeze(2))

    return by_rows((len(flat), width), dtype, fill).view(stop - first, *code.shape[1:])


def _decode_into(out: Tensor, code: Tensor, table: Tensor) -> None:
    """Vectors; by pairs where bytes can be taken as words, which is 3 times faster."""
    if len(code) % 2 or code.storage_offset() % 2:
        out.copy_(code)
    else:
        look_up(code.view(torch.uint16), table, out)


@cache
def _values(dtype: torch.dtype) -> Tensor:
    """fp32 [65536, 2]: what two adjacent bytes of FP8 stand for, read as one little-endian word."""
    words = torch.arange(1 << 16).to(torch.uint16)
    return words.view(torch.uint8).view(dtype).to(torch.float32).view(-1, 2)


def expect_scale_shape(
    name: str, found: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    """CheckpointError naming the scale unless it is one that `decode_scaled` can apply."""
    if len(shape) >= 2:
        blocks = (-(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        fitting = ((), (1,), shape[:-1], (*shape[:-1], 1), (*shape[:-2], *blocks))
        if tuple(found) in fitting:
            return
    raise CheckpointError(
        f"{name}: shape {list(found)} fits no weight of {list(shape)} in blocks of {list(block)}",
        hint="weight_block_size in the settings is of another checkpoint, or the file is damaged",
    )


def _block(settings: Settings) -> tuple[int, int]:
    found = settings.values.get("weight_block_size") or (128, 128)
    try:
        high, wide = (int(size) for size in found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{settings.file}: weight_block_size is {found!r}", hint="give two numbers, [128, 128]"
        ) from error
    if high < 1 or wide < 1:
        raise CheckpointError(f"{settings.file}: weight_block_size is {found!r}")
    return high, wide


def _scale_of(tensors: Mapping[str, TensorInfo], name: str) -> str:
    for ending in SCALE_ENDINGS:
        if f"{name}{ending}" in tensors:
            return f"{name}{ending}"
    raise CheckpointError(
        f"{name}: in FP8, and its scale {name}{SCALE_ENDINGS[0]} is missing",
        hint="the download is incomplete: compare the files with the model's page",
    )
