"""Refitting steps by least squares once codes are chosen, with the update's survival held.

For fixed codes the release's weight is linear in its steps, so each row's best steps solve a system
as wide as its groups. One linear condition over all rows, such as an update surviving whole, costs
one more right-hand side.

Shapes: O out features, I in features, G groups, C columns of a group, R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from qmerge.gptq.grid import Grid, row_chunks, storable

# Of a row's mean squared group norm; it decides only where a group's codes are all zero.
RIDGE = 1e-10
# Refitted steps stay within these multiples of the steps that the codes were chosen on.
SHRINK, GROW = 0.5, 1.5


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The condition that ⟨weight − origin, D⟩_H is ⟨D, D⟩_H, summed over the rows of each linear.

    `update_OI` is D H, `wanted_P` is ⟨origin + D, D⟩_H of each of the P linears that are stacked
    along O, `rows` out features each.
    """

    update_OI: Tensor
    wanted_P: Tensor
    rows: tuple[int, ...]


def per_part(values_O: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Sums over the rows of each stacked linear, float64 [P]."""
    ends = accumulate(rows, initial=0)
    return torch.stack([values_O[start:end].double().sum() for start, end in pairwise(ends)])


def per_row(values_P: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The value of each stacked linear on all of its rows, [O]."""
    return values_P.repeat_interleave(torch.tensor(rows, device=values_P.device))


def refit(
    pull_OI: Tensor,
    codes_OI: Tensor,
    grid: Grid,
    H_II: Tensor,
    damping_I: Tensor,
    whole: Whole | None = None,
) -> Grid:
    """The grid with the steps that bring the codes' weight nearest to a target under `H_II`, with
    `damping_I` on its diagonal; `pull_OI` is the target times that sum.

    With `whole`, nearest among those that meet its condition. Steps come back in the dtype of the
    grid's; a row whose refitted steps cannot be trusted keeps the steps it had. Groups are of equal
    width.
    """
    old_OG = grid.scales_OG.double()
    group_I = grid.groups_of_columns(codes_OI.shape[1])
    order_I = group_I.argsort(stable=True)
    damped_II = H_II[order_I[:, None], order_I]
    damped_II.diagonal().add_(damping_I[order_I])
    moved_OI = whole.update_OI if whole else pull_OI.new_zeros(()).expand(pull_OI.shape)

    def by_group(values_RI: Tensor) -> Tensor:
        values_RI = values_RI.to(H_II.dtype)
        return values_RI if grid.g_idx_I is None else values_RI.index_select(1, order_I)

    parts = []
    for rows in row_chunks(codes_OI):
        centred_RI = codes_OI[rows] - grid.zeros_OG[rows].to(H_II.dtype).index_select(1, group_I)
        pull_RI, moved_RI = by_group(pull_OI[rows]), by_group(moved_OI[rows])
        parts.append(
            _normal_equations(pull_RI, by_group(centred_RI), old_OG[rows], damped_II, moved_RI)
        )
    best_OG, push_OG, slope_OG = (torch.cat(part) for part in zip(*parts, strict=True))
    if whole is not None:
        best_OG = best_OG + _lift(best_OG, push_OG, slope_OG, whole)
    inside_OG = (best_OG > SHRINK * old_OG) & (best_OG < GROW * old_OG)
    kept_OG = torch.where(inside_OG.all(1, keepdim=True), best_OG, old_OG)
    dtype = grid.scales_OG.dtype
    return Grid(
        scales_OG=storable(kept_OG, dtype).to(dtype), zeros_OG=grid.zeros_OG, g_idx_I=grid.g_idx_I
    )


def _normal_equations(
    pull_RI: Tensor, centred_RI: Tensor, old_RG: Tensor, H_II: Tensor, moved_RI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Best steps; how they move per unit of the condition; the condition's value per step.

    Columns come sorted by group, and groups are equally wide.
    """
    rows, groups = old_RG.shape
    width = H_II.shape[1] // groups
    centred_RGC = centred_RI.reshape(rows, groups, width)
    normal_RGG = old_RG.new_empty(rows, groups, groups)
    for group in range(groups):  # with itself and those behind it: the equations are symmetric
        start = group * width
        moment_RI = centred_RGC[:, group] @ H_II[start : start + width, start:]
        others_RGC = moment_RI.reshape(rows, -1, width).mul_(centred_RGC[:, group:])
        normal_RGG[:, group, group:] = others_RGC.sum(2)
        normal_RGG[:, group:, group] = normal_RGG[:, group, group:]
    pull_RG, slope_RG = (
        (side_RI.reshape(centred_RGC.shape) * centred_RGC).sum(2).double()
        for side_RI in (pull_RI, moved_RI)
    )
    diagonal_RG = normal_RGG.diagonal(dim1=1, dim2=2)
    ridge_R1 = diagonal_RG.mean(1, keepdim=True) * RIDGE + torch.finfo(torch.float32).tiny
    diagonal_RG += ridge_R1
    sides_RG2 = torch.stack([pull_RG + ridge_R1 * old_RG, slope_RG], 2)
    best_RG, push_RG = torch.linalg.solve(normal_RGG, sides_RG2).unbind(2)
    return best_RG, push_RG, slope_RG


def _lift(best_OG: Tensor, push_OG: Tensor, slope_OG: Tensor, whole: Whole) -> Tensor:
    """The least change of the steps that meets the condition of each linear."""

    missing_P = whole.wanted_P - per_part((slope_OG * best_OG).sum(1), whole.rows)
    gain_P = per_part((slope_OG * push_OG).sum(1), whole.rows)
    amount_P = torch.where(gain_P > 0, missing_P / gain_P, 0.0)
    return per_row(amount_P, whole.rows)[:, None] * push_OG
