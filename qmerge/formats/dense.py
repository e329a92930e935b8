"""Checkpoints that are not quantized: fp32, fp16 or bf16 tensors as they are."""

from __future__ import annotations

from typing import ClassVar, Self

from qmerge.formats.base import FormatSummary, Reader, common_dtype, dense_weights
from qmerge.formats.settings import Settings
from qmerge.storage.checkpoint import Checkpoint


class DenseReader(Reader[None]):
    """Every tensor is its own weight."""

    methods: ClassVar[tuple[str, ...]] = ("none",)

    @classmethod
    def open(cls, checkpoint: Checkpoint, settings: Settings) -> Self:
        weights = dense_weights(checkpoint, checkpoint.tensors, settings.method)
        dtype = common_dtype(weights)
        summary = FormatSummary(
            method="none",
            checkpoint_format=str(dtype).removeprefix("torch."),
            dtype=dtype,
            dense=len(weights),
        )
        return cls(checkpoint, name="dense", weights=weights, summary=summary)
