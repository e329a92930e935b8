"""One checkpoint's weights under the names of the model: decoded, as float32, when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qmerge.formats.base import Format, IntegerWeight
from qmerge.names import NameMap, Unit, under
from qmerge.storage.checkpoint import Checkpoint

PIECE = 1 << 22
"""Elements decoded at a time where a whole weight is not wanted."""
ALIGNED = 64
"""Rows whose codes end with a word in every format."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint seen through the model's parameter names.

    `changed` holds tensors that replace stored ones (merged embeddings, say).
    """

    format: Format
    names: NameMap
    checkpoint: Checkpoint
    changed: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def tensor(self, parameter: str) -> torch.Tensor:
        """One parameter as float32."""
        if parameter in self.changed:
            return self.changed[parameter]
        return self.format.dense(self.names.stored[parameter])

    def rows(self, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of one parameter as float32, without decoding the rest."""
        if parameter in self.changed:
            return self.changed[parameter][start:stop]
        return self.format.rows(self.names.stored[parameter], start, stop)

    def pieces(self, parameter: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A parameter in `dtype`, some rows at a time, so that memory is used again and again."""
        name, shape = self.names.stored[parameter], self.shape(parameter)
        width = max(1, math.prod(shape[1:]))
        step = max(ALIGNED, PIECE // width // ALIGNED * ALIGNED)
        if not shape or shape[0] <= step:
            yield self.format.dense(name, dtype)
            return
        for start in range(0, shape[0], step):
            yield self.format.rows(name, start, min(start + step, shape[0]), dtype)

    def row_count(self, parameter: str) -> int:
        if parameter in self.changed:
            return self.changed[parameter].shape[0]
        return self.format.weights[self.names.stored[parameter]].shape[0]

    def unit(self, unit: Unit) -> dict[str, torch.Tensor]:
        """All parameters of one unit, by name relative to its path."""
        return {under(name, unit.path) or name: self.tensor(name) for name in unit.parameters}

    def as_stored(self, parameter: str) -> torch.Tensor | None:
        """A parameter in its stored dtype, or None where it is stored quantized."""
        stored = self.format.weights[self.names.stored[parameter]]
        return None if stored.quantized else self.checkpoint.read(stored.sources[0])

    def integer(self, parameter: str) -> IntegerWeight | None:
        """The parameter on the integer grid it is stored on, if it is on one."""
        return self.format.integer(self.names.stored[parameter])

    def is_quantized(self, parameter: str) -> bool:
        """Whether the parameter is stored quantized."""
        return self.format.weights[self.names.stored[parameter]].quantized

    def shape(self, parameter: str) -> tuple[int, ...]:
        return tuple(self.format.weights[self.names.stored[parameter]].shape)

    def stored_bytes(self, parameter: str) -> int:
        """Bytes that the parameter takes in this checkpoint, whatever form it has there."""
        sources = self.format.weights[self.names.stored[parameter]].sources
        return sum(self.checkpoint.tensors[name].nbytes for name in sources)

    def dense_dtype(self, parameter: str) -> torch.dtype:
        """The dtype a dense copy is written in: as stored, or the model's own if it is packed."""
        stored = self.format.weights[self.names.stored[parameter]]
        if not stored.quantized:
            return self.checkpoint.tensors[stored.sources[0]].dtype
        return model_dtype(self.checkpoint.config)

    def dense_bytes(self, parameter: str) -> int:
        return torch.Size(self.shape(parameter)).numel() * self.dense_dtype(parameter).itemsize


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The 16-bit dtype that a configuration names; float16 where it names none or a wider one."""
    named = config.get("dtype") or config.get("torch_dtype")
    return torch.bfloat16 if named == "bfloat16" else torch.float16
