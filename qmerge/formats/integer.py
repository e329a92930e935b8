"""Weights on an integer grid: codes, steps and zero points, and the weight that they stand for.

Shapes: O out features, I in features, G groups along I.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from qmerge.errors import CheckpointError

# Elements decoded at a time, so that the passes over them stay in cache.
CHUNK = 1 << 19

ALL = slice(None)


def group_count(width: int, group_size: int) -> int:
    """Groups of an input `width` wide, the last of which may have fewer columns."""
    return 1 if group_size == -1 else -(-width // group_size)


def groups_in_order(width: int, group_size: int) -> Tensor:
    """The group of each column as int64, where columns are grouped as they stand."""
    return torch.arange(width) // (width if group_size == -1 else group_size)


@dataclass(frozen=True, kw_only=True)
class IntegerGrid:
    """Where the codes of a weight lie: W[o, i] = scale[o, g(i)] · (code[o, i] − zero[o, g(i)])."""

    scales_OG: Tensor
    """In the dtype they are stored in."""
    zeros_OG: Tensor
    """int32, the true zero point on the scale of the codes."""
    g_idx_I: Tensor | None
    """int32 group of each column; None where column i lies in group i // group_size."""
    bits: int
    group_size: int
    """Columns per group; −1 is one group over the whole input."""
    symmetric: bool

    def columns(self, width: int) -> Tensor:
        """The group of each of `width` columns as int64, whether it is written down or not."""
        if self.g_idx_I is not None:
            return self.g_idx_I.long()
        return groups_in_order(width, self.group_size)

    def decode(
        self, shape: tuple[int, int], codes: Callable[[slice], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The weight of `shape` whose codes are asked for some rows at a time: computed in fp32,
        and rounded once if `dtype` is narrower.

        In fp32 it is exact for scales of 16 bits: code − zero has at most 9.
        """
        width = shape[1]
        scales, zeros = self.scales_OG.float(), self.zeros_OG.float()
        groups = scales.shape[1]
        if self.g_idx_I is None and (groups == 1 or groups * self.group_size == width):
            scales, zeros = scales.unsqueeze(2), zeros.unsqueeze(2)

            def fill(rows: slice, out: Tensor) -> None:
                part = out.copy_(codes(rows)).view(-1, groups, width // groups)
                part.sub_(zeros[rows]).mul_(scales[rows])
        else:
            columns = self.columns(width)

            def fill(rows: slice, out: Tensor) -> None:
                offsets, steps = (of[rows].index_select(1, columns) for of in (zeros, scales))
                out.copy_(codes(rows)).sub_(offsets).mul_(steps)

        return by_rows(shape, dtype, fill)


@dataclass(frozen=True, kw_only=True)
class IntegerWeight(IntegerGrid):
    """A weight on an integer grid."""

    codes_OI: Tensor
    """uint8, 0 to 2^bits − 1."""

    @property
    def group_of_column(self) -> Tensor:
        """The group of each column as int64, whether it is written down or not."""
        return self.columns(self.codes_OI.shape[1])

    def rows(self, start: int, stop: int) -> IntegerWeight:
        """Some of the rows, on the same groups."""
        part = slice(start, stop)
        return replace(
            self,
            codes_OI=self.codes_OI[part],
            scales_OG=self.scales_OG[part],
            zeros_OG=self.zeros_OG[part],
        )

    def to(self, device: torch.device | str) -> IntegerWeight:
        """A copy on a device."""
        tensors = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]."""
        high, wide = self.codes_OI.shape
        return self.decode((high, wide), lambda rows: self.codes_OI[rows], dtype)


@dataclass(frozen=True, kw_only=True)
class PackedWeight(IntegerGrid):
    """A weight on an integer grid whose codes are unpacked some rows at a time, so that what lies
    between stays in cache."""

    shape: tuple[int, int]
    codes: Callable[[slice], Tensor]
    """Some rows of the codes, uint8."""

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]."""
        return self.decode(self.shape, self.codes, dtype)

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Some of the rows."""
        return replace(
            self,
            shape=(stop - start, self.shape[1]),
            codes=lambda part: self.codes(slice(start + part.start, start + part.stop)),
            scales_OG=self.scales_OG[start:stop],
            zeros_OG=self.zeros_OG[start:stop],
        )

    def unpacked(self) -> IntegerWeight:
        grid = {each.name: getattr(self, each.name) for each in fields(IntegerGrid)}
        return IntegerWeight(codes_OI=self.codes(ALL), **grid)


def by_rows(
    shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[slice, Tensor], None]
) -> Tensor:
    """A new tensor, made some rows at a time.

    `fill` is given the rows and an fp32 tensor to put them in, small enough to stay in cache.
    """
    out = torch.empty(shape, dtype=dtype)
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    buffer = torch.empty(min(step, shape[0]), *shape[1:])
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        part = out[rows] if dtype == torch.float32 else buffer[: rows.stop - start]
        fill(rows, part)
        if dtype != torch.float32:
            out[rows] = part
    return out


def real_group_index(
    name: str, g_idx_I: Tensor | None, group_size: int, groups: int
) -> Tensor | None:
    """The group of each column, or None where it says what the group size says.

    An index of one and the same value beside several groups is one that was never filled in;
    servers that look at it only under act-order read such files right, and so do we.
    CheckpointError where it names a group that is not there.
    """
    if g_idx_I is None:
        return None
    g_idx_I = g_idx_I.to(torch.int32)
    in_order_I = groups_in_order(len(g_idx_I), group_size)
    if torch.equal(g_idx_I, in_order_I.to(torch.int32)) or bool((g_idx_I == g_idx_I[0]).all()):
        return None
    if int(g_idx_I.min()) < 0 or int(g_idx_I.max()) >= groups:
        raise CheckpointError(
            f"{name}: names a group outside 0 to {groups - 1}",
            hint="the file is damaged or was written by an incompatible program",
        )
    return g_idx_I
