"""One checkpoint's weights under the names of the model: decoded, as float32, when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qmerge.formats.base import Format
from qmerge.formats.integer import IntegerWeight
from qmerge.formats.stacked import Stack
from qmerge.model.frame import ROWS_AT_ONCE
from qmerge.names import NameMap, Unit, under
from qmerge.storage.checkpoint import Checkpoint

PIECE = 1 << 22
"""Elements decoded at a time where a whole weight is not wanted."""
ALIGNED = 64
"""Rows whose codes end with a word in every format."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint seen through the model's parameter names.

    `changed` holds tensors that replace stored ones (merged embeddings, say), `packed` those that
    do on an integer grid, `resized` the rows of those with another vocabulary than the stored one:
    cut, or filled up with the mean row. `turned` are weights that lie as [I, O] in a dense
    checkpoint, and as [O, I] in the model and where they are packed. `stacks` are the fused tensors
    that it holds in place of single experts, by stored name.
    """

    format: Format
    names: NameMap
    checkpoint: Checkpoint
    changed: Mapping[str, torch.Tensor] = field(default_factory=dict)
    packed: Mapping[str, IntegerWeight] = field(default_factory=dict)
    resized: Mapping[str, int] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    _means: dict[str, torch.Tensor] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    """Mean rows that were asked for: each takes all that is stored, and scores ask many times."""

    def tensor(self, parameter: str) -> torch.Tensor:
        """One parameter as float32."""
        if parameter in self.packed:
            return self.packed[parameter].dense()
        if parameter in self.changed:
            return self.changed[parameter]
        return self._fitted(parameter, self.format.dense(self.names.stored[parameter]))

    def rows(self, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of one parameter as float32, without decoding the rest.

        A turned one is read as a whole: its rows are columns of what is stored.
        """
        if parameter in self.packed:
            return self.packed[parameter].rows(start, stop).dense()
        if parameter in self.changed:
            return self.changed[parameter][start:stop]
        stored = self.names.stored[parameter]
        if self._lies_turned(parameter):
            return self._fitted(parameter, self.format.dense(stored)[:, start:stop])
        known = self._known(parameter)
        if stop <= known:
            return self.format.rows(stored, start, stop)
        past = self._mean(parameter, stop - max(start, known))
        if start >= known:
            return past
        return torch.cat([self.format.rows(stored, start, known), past])

    def pieces(
        self, parameter: str, dtype: torch.dtype, elements: int | None = None
    ) -> Iterator[torch.Tensor]:
        """A parameter in `dtype`, some rows at a time, so that memory is used again and again:
        about so many elements, PIECE where that is not said."""
        name, shape = self.names.stored[parameter], self.shape(parameter)
        width = max(1, math.prod(shape[1:]))
        step = max(ALIGNED, (elements or PIECE) // width // ALIGNED * ALIGNED)
        if shape and parameter not in self.resized:
            return self.format.pieces(name, step, dtype)
        return iter([self._fitted(parameter, self.format.dense(name, dtype))])

    def row_count(self, parameter: str) -> int:
        if parameter in self.changed:
            return self.changed[parameter].shape[0]
        return self.shape(parameter)[0]

    def holds(self, parameter: str) -> bool:
        return parameter in self.names.stored

    def unit(self, unit: Unit) -> dict[str, torch.Tensor]:
        """All parameters of one unit, by name relative to its path."""
        return {under(name, unit.path) or name: self.tensor(name) for name in unit.parameters}

    def as_stored(self, parameter: str) -> torch.Tensor | None:
        """A parameter in its stored dtype, or None where it is stored quantized."""
        stored = self.format.weights[self.names.stored[parameter]]
        if stored.quantized:
            return None
        if stored.name in self.checkpoint.tensors:  # as it is mapped, without a copy
            return self._fitted(parameter, self.checkpoint.read(stored.name))
        return self.format.dense(stored.name, stored.dtype)

    def on_disk(self, parameter: str, value: torch.Tensor) -> torch.Tensor:
        """A dense parameter as a checkpoint of this model has it."""
        return value.T.contiguous() if parameter in self.turned else value

    def integer(self, parameter: str) -> IntegerWeight | None:
        """The parameter on the integer grid it is stored on, if it is on one."""
        return self.format.integer(self.names.stored[parameter])

    def is_quantized(self, parameter: str) -> bool:
        """Whether the parameter is stored quantized."""
        return self.format.weights[self.names.stored[parameter]].quantized

    def bits(self, parameter: str) -> int | None:
        """Bits of the codes that the parameter is stored in; None where it is dense."""
        return self.format.weights[self.names.stored[parameter]].bits

    def shape(self, parameter: str) -> tuple[int, ...]:
        stored = tuple(self.format.weights[self.names.stored[parameter]].shape)
        if self._lies_turned(parameter):
            return stored[::-1]
        return (self.resized.get(parameter, stored[0]), *stored[1:]) if stored else stored

    def stored_bytes(self, parameter: str) -> int:
        """Bytes that the parameter takes in this checkpoint, whatever form it has there."""
        stored = self.format.weights[self.names.stored[parameter]]
        if not stored.quantized:
            return torch.Size(stored.shape).numel() * stored.dtype.itemsize
        return sum(self.checkpoint.tensors[name].nbytes for name in stored.sources)

    def dense_dtype(self, parameter: str) -> torch.dtype:
        """The dtype a dense copy is written in: as stored, or the model's own if it is packed."""
        stored = self.format.weights[self.names.stored[parameter]]
        if not stored.quantized:
            return stored.dtype
        return model_dtype(self.checkpoint.config)

    def dense_bytes(self, parameter: str) -> int:
        return torch.Size(self.shape(parameter)).numel() * self.dense_dtype(parameter).itemsize

    def _lies_turned(self, parameter: str) -> bool:
        """Whether the parameter is stored as [I, O]."""
        return parameter in self.turned and not self.is_quantized(parameter)

    def _known(self, parameter: str) -> int:
        """Rows that are stored."""
        return int(self.format.weights[self.names.stored[parameter]].shape[0])

    def _fitted(self, parameter: str, stored: torch.Tensor) -> torch.Tensor:
        if self._lies_turned(parameter):
            return stored.T.contiguous()
        if parameter not in self.resized:
            return stored
        missing = self.resized[parameter] - stored.shape[0]
        if missing <= 0:
            return stored[: self.resized[parameter]]
        return torch.cat([stored, self._mean(parameter, missing).to(stored.dtype)])

    def _mean(self, parameter: str, rows: int) -> torch.Tensor:
        """The mean of the stored rows as so many rows, read in slices and kept."""
        if parameter not in self._means:
            name, known = self.names.stored[parameter], self._known(parameter)
            slices = (
                self.format.rows(name, start, min(start + ROWS_AT_ONCE, known)).sum(
                    0, dtype=torch.float64
                )
                for start in range(0, known, ROWS_AT_ONCE)
            )
            self._means[parameter] = (torch.stack([*slices]).sum(0) / known).float()
        mean = self._means[parameter]
        return mean.expand(rows, *mean.shape)


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The 16-bit dtype that a configuration names; float16 where it names none or a wider one."""
    named = config.get("dtype") or config.get("torch_dtype")
    return torch.bfloat16 if named == "bfloat16" else torch.float16
