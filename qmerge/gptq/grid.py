"""Integer grids: what a group of columns is rounded onto, and the search for its step.

Shapes: O out features, I in features, G groups along I, C columns of one group. A column of the
weight is kept as a contiguous row, so that a group is W_CO.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import RecipeError

BITS = (2, 3, 4, 8)

# Where the search for a step ends, as a fraction of the step that clips nothing. Fewer bits clip
# more: with four levels the best step of a normal sample is near 0.4 of the widest, with 256 there
# is hardly anything to gain.
SMALLEST = {2: 0.25, 3: 0.40, 4: 0.50, 8: 0.85}
# Steps tried evenly from the widest to the smallest, then a third and a ninth of their spacing to
# both sides of the best. Twelve trials in all; within 0.2 % of the error of 400 even ones.
EVEN_TRIALS = 8
NEAR_TRIALS = (1 / 3, 1 / 9)
# Weights of rows that are worked on at once: fit a core's cache on a CPU, fill a GPU.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """The grids a release may use. `group_size` −1 is one group over the whole input.

    Raises RecipeError for a width of codes that no format stores.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            known = ", ".join(map(str, BITS))
            raise RecipeError(f"bits: {self.bits} is not a code width", hint=f"use one of {known}")

    @property
    def top(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)


def group_width(group_size: int, width: int) -> int:
    """Columns in a group of an input `width` wide; RecipeError where groups do not tile it."""
    if group_size == -1:
        return width
    if group_size < 1 or width % group_size:
        raise RecipeError(
            f"group size: {group_size} does not divide the input width {width}",
            hint="use a divisor of the width, or -1 for one group",
        )
    return group_size


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Steps and zero points that are given and not fitted, such as those of a quantized base.

    `g_idx_I` names the group of each column; None is the trivial one, equal runs in order.
    """

    scales_OG: Tensor
    zeros_OG: Tensor
    g_idx_I: Tensor | None = None

    def rows(self, rows: slice) -> Grid:
        """The grid of some of the rows."""
        return replace(self, scales_OG=self.scales_OG[rows], zeros_OG=self.zeros_OG[rows])

    def groups_of_columns(self, width: int) -> Tensor:
        """The group of each column, int64, the trivial one spelled out."""
        if self.g_idx_I is not None:
            return self.g_idx_I.long()
        groups = self.scales_OG.shape[1]
        return torch.arange(width, device=self.scales_OG.device) // (width // groups)

    def decode(self, codes_OI: Tensor) -> Tensor:
        """Weights of the codes in fp32, [O, I]: scale · (code − zero)."""
        scales_OG, zeros_OG = self.scales_OG.float(), self.zeros_OG.float()
        if self.g_idx_I is None:
            codes_OGC = codes_OI.reshape(*scales_OG.shape, -1)
            return (codes_OGC - zeros_OG[:, :, None]).mul_(scales_OG[:, :, None]).flatten(1)
        group_I = self.groups_of_columns(codes_OI.shape[1])
        weight_OI = scales_OG.new_empty(codes_OI.shape)
        for rows in row_chunks(codes_OI):
            torch.sub(
                codes_OI[rows], zeros_OG[rows].index_select(1, group_I), out=weight_OI[rows]
            ).mul_(scales_OG[rows].index_select(1, group_I))
        return weight_OI


def row_chunks(M_OI: Tensor) -> Iterator[slice]:
    """Rows, CHUNK weights at a time."""
    rows, width = M_OI.shape
    at_once = max(1, CHUNK.get(M_OI.device.type, CHUNK["cuda"]) // width)
    for start in range(0, rows, at_once):
        yield slice(start, start + at_once)


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is inf or NaN; one pass over the tensor in the usual case."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Steps as they read back from `dtype`, in the dtype they came in, never zero and never inf.

    A step that would be stored as zero becomes the smallest one that survives both the stored
    dtype and a reader that flushes fp32 subnormals.
    """
    limits = torch.finfo(dtype)
    floor = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
    return scales.clamp(floor, limits.max).to(dtype).to(scales.dtype)


def fit(W_CO: Tensor, weight_C: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Step and zero point of one group of columns, for each row of the weight: ([O], [O]).

    The step is searched over shrinkages of the one that clips nothing, each rounded to the stored
    dtype before it is judged, for the least squared rounding error weighted by `weight_C`.
    """
    low_O = W_CO.amin(0).clamp_(max=0)
    high_O = W_CO.amax(0).clamp_(min=0)
    if spec.symmetric:
        zero_O = torch.full_like(low_O, spec.middle)
    else:
        span_O = (high_O - low_O).clamp_(min=torch.finfo(low_O.dtype).tiny)
        zero_O = (-low_O / span_O * spec.top).round_()
    below_O = -low_O / zero_O.clamp(min=1)
    above_O = high_O / (spec.top - zero_O).clamp(min=1)
    return _search(W_CO, weight_C, torch.maximum(below_O, above_O), zero_O, spec), zero_O


def fit_groups(
    W_OI: Tensor, weight_I: Tensor, spec: GridSpec, g_idx_I: Tensor | None, groups: int
) -> Grid:
    """A grid for a weight as it stands, every group fitted on its own; see `fit`. Groups are of
    equal width."""
    if g_idx_I is not None:
        sorted_I = g_idx_I.argsort(stable=True)
        W_OI, weight_I = W_OI.index_select(1, sorted_I), weight_I[sorted_I]
    wide = W_OI.shape[1] // groups
    scales, zeros = [], []
    W_IO = W_OI.T.contiguous()  # whole: group by group it takes three times as long
    for start in range(0, wide * groups, wide):
        columns = slice(start, start + wide)
        scale_O, zero_O = fit(W_IO[columns], weight_I[columns], spec)
        scales.append(scale_O)
        zeros.append(zero_O)
    return Grid(
        scales_OG=torch.stack(scales, 1).to(spec.scale_dtype),
        zeros_OG=torch.stack(zeros, 1).to(torch.int32),
        g_idx_I=g_idx_I,
    )


def _search(
    W_CO: Tensor, weight_C: Tensor, widest_O: Tensor, zero_O: Tensor, spec: GridSpec
) -> Tensor:
    spacing = (1 - SMALLEST[spec.bits]) / (EVEN_TRIALS - 1)
    ones_O = torch.ones_like(widest_O)
    # Numbers where they are the same for all rows, which takes half the time of two tensors.
    zero: Any = spec.middle if spec.symmetric else zero_O
    best = _Best(W_CO, weight_C, -zero, spec.top - zero, ones_O)
    for trial in range(EVEN_TRIALS):
        best.attempt(widest_O, ones_O * (1 - spacing * trial), spec.scale_dtype)
    for part in NEAR_TRIALS:
        centre_O = best.shrinkage_O
        for offset in (-part * spacing, part * spacing):
            best.attempt(widest_O, centre_O + offset, spec.scale_dtype)
    return storable(widest_O * best.shrinkage_O, spec.scale_dtype)


class _Best:
    """The shrinkage of least error so far, for each row."""

    def __init__(
        self, W_CO: Tensor, weight_C: Tensor, lowest: Any, highest: Any, shrinkage_O: Tensor
    ) -> None:
        self.W_CO, self.weight_C = W_CO, weight_C
        self.lowest, self.highest = lowest, highest
        self.shrinkage_O = shrinkage_O
        self.error_O = torch.full_like(shrinkage_O, torch.inf)
        self.buffer_CO = torch.empty_like(W_CO)

    def attempt(self, widest_O: Tensor, shrinkage_O: Tensor, dtype: torch.dtype) -> None:
        step_O = storable(widest_O * shrinkage_O, dtype)
        torch.div(self.W_CO, step_O, out=self.buffer_CO).round_()
        self.buffer_CO.clamp_(self.lowest, self.highest)
        torch.addcmul(self.W_CO, self.buffer_CO, step_O, value=-1, out=self.buffer_CO)
        error_O = self.weight_C @ self.buffer_CO.square_()
        better_O = error_O < self.error_O
        self.shrinkage_O = torch.where(better_O, shrinkage_O, self.shrinkage_O)
        self.error_O = torch.where(better_O, error_O, self.error_O)
