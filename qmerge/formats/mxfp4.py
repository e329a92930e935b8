"""MXFP4 checkpoints, as gpt-oss is published: the experts of a block fused, in FP4.

Shapes: E experts, O out and I in features. Stored: X_blocks uint8 [E, O, I/32, 16], two codes in a
byte, the lower bits first; X_scales uint8 [E, O, I/32], exponents of two less 127. The model has X
as [E, I, O].
"""

from __future__ import annotations

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
from qmerge.formats.checks import expect_dtype, expect_finite, expect_shape, nothing_quantized
from qmerge.formats.packing import look_up
from qmerge.formats.settings import Settings
from qmerge.storage.checkpoint import Checkpoint

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Mxfp4Reader(Reader[None]):
    """Weights of four bits with a power of two per 32 inputs."""

    methods: ClassVar[tuple[str, ...]] = ("mxfp4",)

    @classmethod
    def open(cls, checkpoint: Checkpoint, settings: Settings) -> Self:
        tensors = checkpoint.tensors
        parts = {
            name.removesuffix(BLOCKS): (name, _scales_of(checkpoint, name))
            for name in tensors
            if name.endswith(BLOCKS)
        }
        if not parts:
            raise nothing_quantized(checkpoint, settings.file, "mxfp4")
        claimed = {part for both in parts.values() for part in both}
        weights = dense_weights(checkpoint, [n for n in tensors if n not in claimed], "mxfp4")
        dtype = common_dtype(weights)
        for name, sources in parts.items():
            blocks, scales = (tensors[part] for part in sources)
            expect_dtype(blocks, (torch.uint8,), "packed code")
            expect_dtype(scales, (torch.uint8,), "exponent")
            expect_shape(blocks.name, blocks.shape, (*scales.shape, BLOCK // 2), scales.name)
            experts, outs, groups = scales.shape
            weights.append(
                StoredWeight(
                    name=name,
                    shape=(experts, groups * BLOCK, outs),
                    dtype=dtype,
                    quantized=True,
                    sources=sources,
                    bits=4,
                )
            )
        summary = FormatSummary(
            method="mxfp4",
            checkpoint_format="mxfp4",
            settings_file=settings.file,
            bits=4,
            group_size=BLOCK,
            **tally(weights),
        )
        return cls(checkpoint, name="mxfp4", weights=weights, summary=summary)

    def _decode(self, weight: StoredWeight, rows: slice, dtype: torch.dtype) -> Tensor:
        first, stop, _ = rows.indices(weight.shape[0])
        blocks, scales = (self.checkpoint.read_rows(name, first, stop) for name in weight.sources)
        out = torch.empty(stop - first, *weight.shape[1:], dtype=dtype)
        for expert, (codes_OGB, scales_OG) in enumerate(zip(blocks, scales, strict=True)):
            powers_OG = torch.ldexp(torch.ones(scales_OG.shape), scales_OG.int() - BIAS)
            steps_OG = expect_finite(weight.sources[1], powers_OG)
            values = look_up(codes_OGB.flatten(), _values()).view(*scales_OG.shape, BLOCK)
            out[expert] = values.mul_(steps_OG.unsqueeze(2)).flatten(1).T
        return out


def _scales_of(checkpoint: Checkpoint, blocks: str) -> str:
    name = blocks.removesuffix(BLOCKS) + SCALES
    if name not in checkpoint.tensors:
        raise CheckpointError(
            f"{blocks}: its exponents {name} are missing",
            hint="the download is incomplete: compare the files with the model's page",
        )
    if len(checkpoint.tensors[name].shape) != 3:
        raise CheckpointError(f"{name}: shape {list(checkpoint.tensors[name].shape)}, not of three")
    return name


def _values() -> Tensor:
    """fp32 [256, 2]: what the lower and the upper four bits of a byte stand for."""
    values = torch.tensor([*MAGNITUDES, *(-each for each in MAGNITUDES)])
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1)
