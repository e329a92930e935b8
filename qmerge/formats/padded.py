"""A model laid out as a wider copy of it is: zeros put between its rows and columns.

Published Int4 models of some sizes are wider inside than their originals, so that groups and the
shares of several GPUs come out even; Qwen2-72B has every second of its first 256 intermediate
channels at zero. What such a model computes is what the narrow one does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from qmerge.formats.base import Format, StoredWeight, Wrapper
from qmerge.formats.integer import IntegerWeight
from qmerge.storage.checkpoint import Checkpoint

Padding = tuple[int, int]
"""A size and the wider one in its place."""


class PaddedReader(Wrapper):
    """A dense checkpoint whose tensors read in wider shapes, with zeros where nothing is kept."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        narrow: Format,
        shapes: Mapping[str, tuple[int, ...]],
        kept: Mapping[Padding, Tensor],
    ) -> None:
        """`shapes` are the wide ones by stored name; `kept` the places, int64, of what there is."""
        weights = [
            dataclasses.replace(weight, shape=shapes[name], quantized=True)
            if name in shapes
            else weight
            for name, weight in narrow.weights.items()
        ]
        super().__init__(checkpoint, name=narrow.name, weights=weights, summary=narrow.summary)
        self.inner = narrow
        self.kept = kept

    def integer(self, name: str) -> IntegerWeight | None:
        return None

    def _decode(self, weight: StoredWeight, rows: slice, dtype: torch.dtype) -> Tensor:
        wide = self.inner.dense(weight.name, dtype)
        for dim, (have, want) in enumerate(zip(wide.shape, weight.shape, strict=True)):
            if have != want:
                shape = (*wide.shape[:dim], want, *wide.shape[dim + 1 :])
                wide = wide.new_zeros(shape).index_copy_(dim, self.kept[have, want], wide)
        return wide[rows]
