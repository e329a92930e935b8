"""Requantizing a merged linear: nearest to what was trained, with the update kept whole.

What is done that plain GPTQ does not do, each measured to pay on more than one base and size of
update:

- Columns are first rounded on two grids, one fitted to the target and the base's own, on which the
  base has no error, and each row goes on with the one of less loss.
- Rounding shrinks a small update, and the shrinkage adds up over layers where noise does not. The
  target is pushed out by a factor κ that undoes what the first pass lost (*unit survival*).
- Steps are refitted once codes are chosen and the columns rounded again on them (*refining*); the
  last refit sets the update's survival to one.

Every grid is given before its pass, so columns are rounded in the order that is best for the loss,
whatever groups the release can express.

Shapes: O out features of all siblings stacked, I in features, G groups, P siblings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmerge.gptq.factor import DAMPING, factor
from qmerge.gptq.grid import Grid, GridSpec, fit_groups, group_width
from qmerge.gptq.hessian import output_squares
from qmerge.gptq.refine import Whole, per_part, per_row, refit
from qmerge.gptq.solver import Solution, solve
from qmerge.gptq.target import aim
from qmerge.recipe import ActOrder, GridChoice

# κ goes at most so far where the last refit can make up the rest: an update that rounding all but
# erased comes back in few codes and much noise. (Updates of 0.06 of an adapter: KL 0.099e-3 with
# 1.3, 0.104e-3 with 1.0 or 1.6, 0.167e-3 with 3.)
FURTHEST = 1.3
# On the base's grid as it is κ alone must do, by so many passes over the columns.
ANCHORED_FURTHEST, ANCHORED_PASSES = 3.0, 3


@dataclass(frozen=True, kw_only=True)
class Update:
    """How one linear was requantized; `solution.loss_O` is that of weight − merged.

    `anchored` is the share of rows that started from the base's grid, and `fresh_loss` and
    `anchored_loss` what the first pass would have lost with all rows on one grid, None where that
    was not tried. `kappa` says how far the target was pushed out. `survival` is ⟨E, D⟩_H / ⟨D, D⟩_H
    for E = weight − origin and D = merged − origin, `noise` is ‖E − D‖²_H / ‖D‖²_H; None where the
    adapter changed nothing that H can see. `energy` is ⟨D, D⟩_H.
    """

    solution: Solution
    anchored: float
    fresh_loss: float | None
    anchored_loss: float | None
    kappa: float
    energy: float
    survival: float | None
    noise: float | None


def solve_update(
    merged_OI: Tensor,
    origin_OI: Tensor,
    H_II: Tensor,
    spec: GridSpec,
    *,
    rows: tuple[int, ...],
    order: ActOrder = "group",
    damping: float = DAMPING,
    base: Grid | None = None,
    grid: GridChoice = "auto",
    unit_survival: bool = True,
    refine: bool = True,
    drift_II: Tensor | None = None,
    residual_OI: Tensor | None = None,
) -> tuple[Update, ...]:
    """Requantize siblings stacked along O, `rows` out features each; one Update for each.

    `origin_OI` is what the adapter was merged onto and `base` the grid that it lies on, if any; a
    grid that the release cannot express is passed over. A sibling that the adapter left alone keeps
    the base's codes where its grid may be used. Without `refine` steps stay as they were chosen
    before rounding, and κ alone brings survival near to one. `drift_II` and `residual_OI`, each
    with the two halves of `Drift.mean` in front, move the target (see `target`); without them it is
    the merged weight itself. Raises InputError for a weight that is not finite.
    """
    width = merged_OI.shape[1]
    usable = base if grid != "fresh" and base and expressible(base, spec, order, width) else None
    stack = _Stack(merged_OI, origin_OI, H_II, spec, rows, order, damping, usable)
    target_OI = stack.target(drift_II, residual_OI)
    if usable is not None and grid == "anchored":
        return stack.on_base(target_OI, usable, unit_survival)
    return stack.on_either(target_OI, unit_survival, refine)


def expressible(base: Grid, spec: GridSpec, order: ActOrder, width: int) -> bool:
    """Whether a release of `spec` can carry the base's steps, zero points and groups.

    A base of other bits is for the caller to leave out.
    """
    groups = width // group_width(spec.group_size, width)
    if base.scales_OG.shape[1] != groups or base.scales_OG.dtype != spec.scale_dtype:
        return False
    if spec.symmetric and not bool((base.zeros_OG == spec.middle).all()):
        return False
    if base.g_idx_I is None:
        return True
    return order == "full" and base.g_idx_I.bincount().tolist() == [width // groups] * groups


class _Stack:
    """Siblings, what the adapter did to them, and the passes over their columns."""

    def __init__(
        self,
        merged_OI: Tensor,
        origin_OI: Tensor,
        H_II: Tensor,
        spec: GridSpec,
        rows: tuple[int, ...],
        order: ActOrder,
        damping: float,
        base: Grid | None,
    ) -> None:
        self.factor = factor(H_II, desc_act=order != "none", damping=damping)
        self.spec, self.base, self.rows = spec, base, rows
        dtype = self.factor.lower_II.dtype
        self.merged_OI, self.origin_OI = merged_OI.to(dtype), origin_OI.to(dtype)
        self.update_OI = self.merged_OI - self.origin_OI
        self.H_II = torch.zeros_like(H_II) if self.factor.is_nearest else H_II
        self.damping_I = self.factor.own_order(self.factor.damping_I)
        self.still = not bool(self.update_OI.any())
        self.moved_OI = self.update_OI if self.still else self.update_OI @ self.H_II
        self.energy_P = self.along_update(self.update_OI)
        alone_P = per_part(self.update_OI.abs().sum(1), rows) == 0
        self.kept_O = per_row(alone_P, rows) & (base is not None)
        self.groups = H_II.shape[0] // group_width(spec.group_size, H_II.shape[0])
        self.g_idx_I = base.g_idx_I if base else self._sorted_groups() if order == "full" else None

    def _sorted_groups(self) -> Tensor | None:
        """Groups of columns that are rounded one after another, the first rounded in group 0."""
        width = self.factor.width
        if self.groups == 1:
            return None
        rounded_I = torch.arange(width - 1, -1, -1, device=self.H_II.device)
        return self.factor.own_order(rounded_I // (width // self.groups)).to(torch.int32)

    def along_update(self, E_OI: Tensor) -> Tensor:
        """⟨E, D⟩_H of each sibling, float64 [P]."""
        if self.still:
            return torch.zeros(len(self.rows), dtype=torch.float64, device=E_OI.device)
        return per_part((E_OI * self.moved_OI).sum(1), self.rows)

    def target(self, drift_II: Tensor | None, residual_OI: Tensor | None) -> Tensor:
        """What to aim at; rows that keep the base's codes aim at the base."""
        target_OI = aim(self.merged_OI, self.factor, drift_II, residual_OI)
        if not bool(self.kept_O.any()):
            return target_OI
        return torch.where(self.kept_O[:, None], self.origin_OI, target_OI)

    def on_base(self, target_OI: Tensor, base: Grid, unit_survival: bool) -> tuple[Update, ...]:
        """Codes on the base's grid as it is, by a few passes."""
        kappa_P, aimed_OI = torch.ones_like(self.energy_P), target_OI
        found = solve(target_OI, self.factor, base, bits=self.spec.bits)
        loss_P = per_part(found.loss_O, self.rows)
        for _ in range(ANCHORED_PASSES - 1 if unit_survival else 0):
            kappa_P = self.push(target_OI, found, kappa_P, ANCHORED_FURTHEST)
            aimed_OI = self.pushed(target_OI, kappa_P)
            found = solve(aimed_OI, self.factor, base, bits=self.spec.bits)
        every_O = torch.ones_like(self.kept_O)
        return self.updates(found, aimed_OI, every_O, None, loss_P, kappa_P)

    def on_either(self, target_OI: Tensor, unit_survival: bool, refine: bool) -> tuple[Update, ...]:
        """Each row's codes on the better of two grids, with steps refitted to them."""
        found, based_O, fresh_P, based_P = self.first_pass(target_OI)
        kappa_P, aimed_OI = torch.ones_like(self.energy_P), target_OI
        unit_survival = unit_survival and bool((self.energy_P > 0).any())
        if not self.factor.is_nearest and (unit_survival or refine):
            grid = grid_of(found)
            if unit_survival:
                kappa_P = self.push(target_OI, found, kappa_P, FURTHEST)
            if refine:
                pull_OI = torch.addcmul(target_OI @ self.H_II, target_OI, self.damping_I)
                grid = self.refitted(pull_OI, found.codes_OI, grid, whole=False)
            aimed_OI = self.pushed(target_OI, kappa_P)
            found = solve(aimed_OI, self.factor, grid, bits=self.spec.bits)
            if refine:
                grid = self.refitted(pull_OI, found.codes_OI, grid, whole=unit_survival)
                weight_OI = grid.decode(found.codes_OI)
                found = replace(found, scales_OG=grid.scales_OG, weight_OI=weight_OI)
        return self.updates(found, aimed_OI, based_O, fresh_P, based_P, kappa_P)

    def first_pass(self, target_OI: Tensor) -> tuple[Solution, Tensor, Tensor, Tensor | None]:
        """Rows on the better grid, which are on the base's, and the loss of either per sibling."""
        weight_I = self.factor.own_order(self.factor.weight_I)
        fresh = fit_groups(target_OI, weight_I, self.spec, self.g_idx_I, self.groups)
        on_fresh = solve(target_OI, self.factor, fresh, bits=self.spec.bits)
        if self.base is None:
            return on_fresh, self.kept_O, per_part(on_fresh.loss_O, self.rows), None
        on_base = solve(target_OI, self.factor, self.base, bits=self.spec.bits)
        based_O = self.kept_O | (on_base.loss_O < on_fresh.loss_O)
        losses = per_part(on_fresh.loss_O, self.rows), per_part(on_base.loss_O, self.rows)
        return chosen(based_O, on_base, on_fresh), based_O, *losses

    def push(self, target_OI: Tensor, found: Solution, kappa_P: Tensor, furthest: float) -> Tensor:
        """The κ at which the update would survive whole, if it shrank as it did in `found`.

        What was aimed at held c + κ of the update, c from what the target makes up for beside it,
        and e is left; the missing 1 − e has to be sent through the same shrinkage e / (c + κ).
        """
        energy_P = torch.where(self.energy_P > 0, self.energy_P, 1.0)
        aimed_P = self.along_update(target_OI - self.merged_OI) / energy_P + kappa_P
        kept_P = self.along_update(found.weight_OI - self.origin_OI) / energy_P
        shrinkage_P = (kept_P / aimed_P).nan_to_num_(nan=1.0).clamp_(1 / furthest, 1.0)
        pushed_P = kappa_P + (1 - kept_P) / shrinkage_P
        return torch.where(self.energy_P > 0, pushed_P.clamp_(1 / furthest, furthest), 1.0)

    def pushed(self, target_OI: Tensor, kappa_P: Tensor) -> Tensor:
        """The target with κ times the update in place of the update."""
        extra_O = per_row(kappa_P - 1, self.rows).to(target_OI.dtype)
        return torch.addcmul(target_OI, extra_O[:, None], self.update_OI)

    def refitted(self, pull_OI: Tensor, codes_OI: Tensor, grid: Grid, *, whole: bool) -> Grid:
        """Steps for the codes, refitted to the target whose product with the damped H is `pull_OI`;
        rows that keep the base's codes keep its steps."""
        condition = None
        if whole:
            wanted_P = self.energy_P + self.along_update(self.origin_OI)
            condition = Whole(update_OI=self.moved_OI, wanted_P=wanted_P, rows=self.rows)
        fitted = refit(pull_OI, codes_OI, grid, self.H_II, self.damping_I, condition)
        scales_OG = torch.where(self.kept_O[:, None], grid.scales_OG, fitted.scales_OG)
        return replace(grid, scales_OG=scales_OG)

    def updates(
        self,
        found: Solution,
        aimed_OI: Tensor,
        based_O: Tensor,
        fresh_P: Tensor | None,
        based_P: Tensor | None,
        kappa_P: Tensor,
    ) -> tuple[Update, ...]:
        """Split siblings apart, measured against the merged weight.

        Where that was `aimed_OI` itself, its loss is that of the pass.
        """
        if aimed_OI is not self.merged_OI:
            loss_O = output_squares(found.weight_OI - self.merged_OI, self.H_II)
            found = replace(found, loss_O=loss_O)
        kept_P = self.along_update(found.weight_OI - self.origin_OI)
        noise_P = per_part(found.loss_O, self.rows)
        anchored_P = per_part(based_O, self.rows)
        result = []
        for part, solution in enumerate(found.split(self.rows)):
            energy = float(self.energy_P[part])
            result.append(
                Update(
                    solution=solution,
                    anchored=float(anchored_P[part]) / self.rows[part],
                    fresh_loss=None if fresh_P is None else float(fresh_P[part]),
                    anchored_loss=None if based_P is None else float(based_P[part]),
                    kappa=float(kappa_P[part]),
                    energy=energy,
                    survival=float(kept_P[part]) / energy if energy > 0 else None,
                    noise=float(noise_P[part]) / energy if energy > 0 else None,
                )
            )
        return tuple(result)


def grid_of(solution: Solution) -> Grid:
    """The grid that a solution's codes are on."""
    return Grid(scales_OG=solution.scales_OG, zeros_OG=solution.zeros_OG, g_idx_I=solution.g_idx_I)


def chosen(mask_O: Tensor, yes: Solution, no: Solution) -> Solution:
    """Rows of one solution where the mask holds, of the other elsewhere."""
    mask_O1 = mask_O[:, None]
    return replace(
        no,
        codes_OI=torch.where(mask_O1, yes.codes_OI, no.codes_OI),
        scales_OG=torch.where(mask_O1, yes.scales_OG, no.scales_OG),
        zeros_OG=torch.where(mask_O1, yes.zeros_OG, no.zeros_OG),
        weight_OI=torch.where(mask_O1, yes.weight_OI, no.weight_OI),
        loss_O=torch.where(mask_O, yes.loss_O, no.loss_O),
    )
