"""Experts that a checkpoint holds fused, read as the weights of single experts.

Since transformers 5 a model is also published as it is in memory: one tensor `experts.gate_up_proj`
for all experts of a block. Servers know packed experts one by one, by the names of older
checkpoints.

E: experts, R: rows of one expert in a fused tensor, I: in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.formats.base import Format, IntegerWeight, StoredWeight


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of one expert in a dense tensor [E, R, I] that are a weight of its own."""

    source: str
    expert: int
    start: int
    stop: int


class StackedReader:
    """A checkpoint seen through `parts`, by name, in place of the fused tensors they are of."""

    def __init__(self, inner: Format, parts: Mapping[str, Part]) -> None:
        self.name, self.summary = inner.name, inner.summary
        self._inner, self._parts = inner, parts
        fused = {part.source for part in parts.values()}
        own = {name: weight for name, weight in inner.weights.items() if name not in fused}
        self.weights: Mapping[str, StoredWeight] = own | {
            name: StoredWeight(
                name=name,
                shape=(part.stop - part.start, inner.weights[part.source].shape[-1]),
                dtype=inner.weights[part.source].dtype,
                quantized=False,
                sources=(part.source,),
            )
            for name, part in parts.items()
        }

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        if name not in self._parts:
            return self._inner.dense(name, dtype)
        return self.rows(name, 0, self.weights[name].shape[0], dtype)

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        part = self._parts.get(name)
        if part is None:
            return self._inner.rows(name, start, stop, dtype)
        (expert_RI,) = self._inner.rows(part.source, part.expert, part.expert + 1, dtype)
        return expert_RI[part.start + start : part.start + stop].clone()

    def integer(self, name: str) -> IntegerWeight | None:
        return None if name in self._parts else self._inner.integer(name)
