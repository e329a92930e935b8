"""The requantizing of a merged weight in float64, spelled out with nothing shared with the package.

Rounding is `reference.gptq`; refits are one dense linear system over all steps of all rows, with
the survival of each sibling as a Lagrange condition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.gptq import reference


class Wanted(NamedTuple):
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    weight: Tensor
    based: Tensor
    kappa: Tensor


def inner(A: Tensor, H: Tensor, B: Tensor) -> float:
    """trace(A H Bᵀ)."""
    return float((A @ H * B).sum())


def refit(
    target: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    damped: Tensor,
    conditions: list[tuple[Tensor, float]],
    dtype: torch.dtype,
) -> Tensor:
    """Steps of least ‖target − weight‖² under `damped`, given ⟨weight, A⟩ = b for each (A, b)."""
    out, groups = scales.shape
    unknowns = out * groups
    pieces = torch.zeros(unknowns, out, codes.shape[1]).double()
    for row in range(out):
        for group in range(groups):
            columns = g_idx == group
            pieces[row * groups + group, row, columns] = codes[row, columns] - zeros[row, group]
    flat, moved = pieces.flatten(1), (pieces @ damped).flatten(1)
    system = torch.zeros(unknowns + len(conditions), unknowns + len(conditions)).double()
    right = torch.zeros(unknowns + len(conditions)).double()
    system[:unknowns, :unknowns] = flat @ moved.T
    right[:unknowns] = moved @ target.flatten()
    for number, (direction, value) in enumerate(conditions):
        slope = flat @ direction.flatten()
        system[unknowns + number, :unknowns] = system[:unknowns, unknowns + number] = slope
        right[unknowns + number] = value
    steps = torch.linalg.solve(system, right)[:unknowns].reshape(out, groups)
    return reference.stored(steps, dtype)


def requantize(
    merged: Tensor,
    origin: Tensor,
    H: Tensor,
    *,
    rows: tuple[int, ...],
    bits: int,
    group: int,
    symmetric: bool,
    target: Tensor,
    base: reference.Steps | None,
    unit_survival: bool,
    refine: bool,
    desc_act: bool,
    dtype: torch.dtype = torch.float16,
) -> Wanted:
    """What `solve_update` is to return for all siblings together, on trivial groups."""
    width, update = merged.shape[1], merged - origin
    damping = 0.01 * H.diagonal().mean() * torch.eye(width).double()
    damped = H + damping
    columns = reference.columns_in_order(H, desc_act)
    inverse = torch.linalg.inv(damped[columns][:, columns])
    conditional = torch.zeros(width).double()
    conditional[columns] = 1 / torch.linalg.cholesky(inverse, upper=True).diagonal() ** 2
    parts = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))

    def rounded(aim: Tensor, steps: reference.Steps) -> tuple[Tensor, Tensor, Tensor]:
        found = reference.gptq(aim, H, steps, bits=bits, desc_act=desc_act)
        error = aim - found.weight
        return found.codes, found.weight, (error @ H * error).sum(1)

    scales, zeros, g_idx = fitted = reference.grid(
        target, bits=bits, group=group, symmetric=symmetric, dtype=dtype, weight=conditional
    )
    codes, weight, loss = rounded(target, fitted)
    based = torch.zeros(len(merged), dtype=torch.bool)
    if base is not None:
        base_codes, base_weight, base_loss = rounded(target, base)
        based = base_loss < loss
        mask = based[:, None]
        codes, weight = torch.where(mask, base_codes, codes), torch.where(mask, base_weight, weight)
        scales, zeros = torch.where(mask, base.scales, scales), torch.where(mask, base.zeros, zeros)
    kappa = torch.ones(len(rows)).double()
    for part in range(len(rows)) if unit_survival else ():
        own = parts == part
        energy = inner(update[own], H, update[own])
        beside = inner((target - merged)[own], H, update[own]) / energy
        kept = inner((weight - origin)[own], H, update[own]) / energy
        shrinkage = min(max(kept / (beside + 1), 1 / 1.3), 1)
        kappa[part] = min(max(1 + (1 - kept) / shrinkage, 1 / 1.3), 1.3)
    if not refine and not unit_survival:
        return Wanted(codes, scales, zeros, weight, based, kappa)
    if refine:
        scales = refit(target, codes, scales, zeros, g_idx, damped, [], dtype)
    pushed = target + (kappa[parts] - 1)[:, None] * update
    codes, _, _ = rounded(pushed, reference.Steps(scales, zeros, g_idx))
    conditions = []
    for part in range(len(rows)) if unit_survival else ():
        direction = (update @ H) * (parts == part)[:, None]
        conditions.append((direction, float((direction * merged).sum())))
    if refine:
        scales = refit(target, codes, scales, zeros, g_idx, damped, conditions, dtype)
    weight = scales[:, g_idx] * (codes - zeros[:, g_idx])
    return Wanted(codes, scales, zeros, weight, based, kappa)
