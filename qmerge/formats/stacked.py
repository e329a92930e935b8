"""Experts that a checkpoint holds fused, read as the weights of single experts.

Since transformers 5 a model is also published as it is in memory: one tensor `experts.gate_up_proj`
for all experts of a block. Servers know packed experts one by one, by the names of older
checkpoints.

E: experts, R: rows of one expert in a fused tensor, I: in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.formats.base import Format, StoredWeight
from qmerge.formats.integer import IntegerWeight


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What a fused tensor [E, R, I], or [E, I, R] where it is `turned`, is made of."""

    experts: tuple[tuple[str, ...], ...]
    """For each expert, the names of its weights in their order along R."""
    rows: tuple[int, ...]
    """Rows of each of those weights."""
    turned: bool

    def shape(self, width: int) -> tuple[int, int, int]:
        """Shape of the fused tensor, for `width` in features."""
        experts, rows = len(self.experts), sum(self.rows)
        return (experts, width, rows) if self.turned else (experts, rows, width)

    def pieces(self, weight: Callable[[str], Tensor]) -> Iterator[Tensor]:
        """The tensor of its weights [O, I], one expert after the other."""
        for names in self.experts:
            expert_RI = torch.cat([weight(name) for name in names])
            yield (expert_RI.T.contiguous() if self.turned else expert_RI)[None]


class StackedReader:
    """A checkpoint seen through the weights of single experts, in place of `stacks` of them."""

    def __init__(self, inner: Format, stacks: Mapping[str, Stack]) -> None:
        self.name, self.summary = inner.name, inner.summary
        self.stacks = stacks
        self._inner = inner
        self._places: dict[str, tuple[str, int, int]] = {}
        weights = {name: weight for name, weight in inner.weights.items() if name not in stacks}
        for source, stack in stacks.items():
            fused = inner.weights[source]
            width = fused.shape[1 if stack.turned else 2]
            for expert, names in enumerate(stack.experts):
                for place, (name, rows) in enumerate(zip(names, stack.rows, strict=True)):
                    self._places[name] = source, expert, sum(stack.rows[:place])
                    weights[name] = StoredWeight(
                        name=name,
                        shape=(rows, width),
                        dtype=fused.dtype,
                        quantized=False,
                        sources=(source,),
                    )
        self.weights: Mapping[str, StoredWeight] = weights

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        if name not in self._places:
            return self._inner.dense(name, dtype)
        return self.rows(name, 0, self.weights[name].shape[0], dtype)

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if name not in self._places:
            return self._inner.rows(name, start, stop, dtype)
        source, expert, first = self._places[name]
        found = self._inner.rows(source, expert, expert + 1, self.weights[name].dtype)[0]
        expert_RI = found.T if self.stacks[source].turned else found
        part_OI = expert_RI[first + start : first + stop]
        return part_OI.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def pieces(self, name: str, rows: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        if name not in self._places:
            return self._inner.pieces(name, rows, dtype)
        return iter(torch.split(self.dense(name, dtype), rows))

    def integer(self, name: str) -> IntegerWeight | None:
        return None if name in self._places else self._inner.integer(name)
