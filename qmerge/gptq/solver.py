"""GPTQ: rounding a weight column by column, each error fed to the columns still to come.

Shapes: O out features (siblings that share an input may be stacked along O), I in features,
G groups, C columns of a group or leaf. W_IO is a weight laid out as its factor says, one contiguous
row per column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qmerge.errors import InputError
from qmerge.gptq.factor import Factor
from qmerge.gptq.grid import Grid, all_finite

# Columns rounded one after another before their errors are fed on by a matrix product.
LEAF = 32
# Rows are independent of one another; so many at once keep what a pass holds small, and a column's
# vector long enough to cost more than the call.
ROWS = {"cpu": 1 << 13, "cuda": 1 << 15}


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Codes on a grid. `g_idx_I` None is the trivial one; `weight_OI` is what they decode to.

    `loss_O` is diag(E H Eᵀ) for E = W − weight, the mean squared output error of each row; 0 where
    the fallback is nearest rounding for want of a Hessian.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor
    g_idx_I: Tensor | None
    weight_OI: Tensor
    loss_O: Tensor
    damping: float
    fallback: str | None

    @property
    def loss(self) -> float:
        """trace(E H Eᵀ)."""
        return float(self.loss_O.sum())

    def split(self, rows: tuple[int, ...]) -> tuple[Solution, ...]:
        """The solutions of siblings that were stacked along O, `rows` out features each."""
        bounds = [sum(rows[:part]) for part in range(len(rows) + 1)]
        return tuple(self._rows(slice(*ends)) for ends in pairwise(bounds))

    def _rows(self, rows: slice) -> Solution:
        return replace(
            self,
            codes_OI=self.codes_OI[rows],
            scales_OG=self.scales_OG[rows],
            zeros_OG=self.zeros_OG[rows],
            weight_OI=self.weight_OI[rows],
            loss_O=self.loss_O[rows],
        )


def solve(W_OI: Tensor, factor: Factor, grid: Grid, *, bits: int) -> Solution:
    """Round `W_OI` onto `grid` with error feedback, to codes of `bits` bits.

    Columns are rounded in the factor's order, whatever groups the grid has. Raises InputError for a
    weight that is not finite.
    """
    if not all_finite(W_OI):
        raise InputError("the weight holds values that are not finite")
    parts = []
    at_once = ROWS.get(W_OI.device.type, ROWS["cuda"])
    for start in range(0, W_OI.shape[0], at_once):
        rows = slice(start, start + at_once)
        walk = _Walk(W_OI[rows], factor, grid.rows(rows), (1 << bits) - 1)
        walk.round(0, factor.width)
        parts.append(walk.solution())
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: list[Solution]) -> Solution:
    return replace(
        parts[0],
        codes_OI=torch.cat([part.codes_OI for part in parts]),
        scales_OG=torch.cat([part.scales_OG for part in parts]),
        zeros_OG=torch.cat([part.zeros_OG for part in parts]),
        weight_OI=torch.cat([part.weight_OI for part in parts]),
        loss_O=torch.cat([part.loss_O for part in parts]),
    )


class _Walk:
    """One pass over the columns, from the last row of the layout to the first."""

    def __init__(self, W_OI: Tensor, factor: Factor, grid: Grid, top: int) -> None:
        self.factor, self.grid, self.top = factor, grid, top
        # Targets, to become fed error; weights, to become error; codes.
        self.target_IO = W_OI.T.to(factor.lower_II.dtype).index_select(0, factor.layout_I)
        self.error_IO = self.target_IO.clone()
        self.codes_IO = torch.empty_like(self.target_IO, dtype=torch.uint8)
        self.scales_GO = grid.scales_OG.T.to(self.target_IO.dtype).contiguous()
        self.offsets_GO = self.scales_GO * grid.zeros_OG.T
        self.group_of_I = grid.groups_of_columns(factor.width)[factor.layout_I]

    def round(self, start: int, stop: int) -> None:
        """Round rows start..stop, the later half first; nearly all the work is the product."""
        if stop - start <= LEAF:
            self._leaf(start, stop)
            return
        middle = (start + stop) // 2
        self.round(middle, stop)
        self.target_IO[start:middle].addmm_(
            self.factor.lower_II[middle:stop, start:middle].T, self.error_IO[middle:stop]
        )
        self.round(start, middle)

    def _leaf(self, start: int, stop: int) -> None:
        """Round a few columns one by one, on vectors over all rows."""
        rows = slice(start, stop)
        scale_CO = self.scales_GO.index_select(0, self.group_of_I[rows])
        # Both are moved by the zero point, so that a code is a plain quotient.
        offset_CO = self.offsets_GO.index_select(0, self.group_of_I[rows])
        target_CO = self.target_IO[rows].add_(offset_CO)
        error_CO = self.error_IO[rows].add_(offset_CO)
        code_CO = torch.empty_like(target_CO)
        feed_CC = self.factor.lower_II[rows, rows].T.triu(1)
        round_columns = round_by_numpy if target_CO.device.type == "cpu" else round_by_torch
        round_columns(Leaf(target_CO, error_CO, code_CO, scale_CO, feed_CC), self.top)
        target_CO.addcmul_(code_CO, scale_CO, value=-1)
        self.codes_IO[rows] = code_CO

    def solution(self) -> Solution:
        """The finished pass in the columns' own order."""
        loss_O = self.factor.weight_I @ self.target_IO.square_()
        loss_O -= self.factor.damping_I @ self.error_IO.square_()
        del self.target_IO, self.error_IO
        codes_OI = self.factor.own_order(self.codes_IO).T.contiguous()
        return Solution(
            codes_OI=codes_OI,
            scales_OG=self.grid.scales_OG,
            zeros_OG=self.grid.zeros_OG,
            g_idx_I=self.grid.g_idx_I,
            weight_OI=self.grid.decode(codes_OI),
            loss_O=loss_O.clamp_(min=0),
            damping=self.factor.damping,
            fallback=self.factor.fallback,
        )


class Leaf(NamedTuple):
    """A few columns that are rounded one by one: targets, which take up errors; weights, which
    become errors; codes, which are filled in; steps; and what each column is fed by those rounded
    before it, zero for the others."""

    target_CO: Tensor
    error_CO: Tensor
    code_CO: Tensor
    scale_CO: Tensor
    feed_CC: Tensor


def round_by_torch(leaf: Leaf, top: int) -> None:
    """Round the columns of a leaf from the last to the first, in place, to codes 0 to `top`."""
    for target_O, error_O, code_O, scale_O, feed_C in reversed(list(zip(*leaf, strict=True))):
        target_O.addmv_(leaf.error_CO.T, feed_C)
        torch.div(target_O, scale_O, out=code_O).round_().clamp_(0, top)
        error_O.addcmul_(code_O, scale_O, value=-1)


def round_by_numpy(leaf: Leaf, top: int) -> None:
    """As `round_by_torch`, for tensors on the host: a call of numpy costs a quarter of torch's
    before it begins, which for some thousand rows is most of it."""
    targets, errors, codes, scales, feeds = (tensor.numpy() for tensor in leaf)
    buffer = np.empty_like(targets[0])
    lowest, highest = np.zeros_like(buffer), np.full_like(buffer, top)
    columns = list(zip(targets, errors, codes, scales, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        for column in range(len(columns) - 1, -1, -1):
            target, error, code, scale = columns[column]
            before = slice(column + 1, None)
            target += np.matmul(feeds[column, before], errors[before], out=buffer)
            np.rint(np.divide(target, scale, out=code), out=code)
            np.maximum(np.minimum(code, highest, out=code), lowest, out=code)
            error -= np.multiply(code, scale, out=buffer)
