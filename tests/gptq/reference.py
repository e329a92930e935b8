"""Textbook GPTQ in float64, one column at a time, with nothing shared with the package.

The recursion is that of Frantar et al. (2022): the inverse of the damped Hessian, its upper
Cholesky factor, and after each column the update of all columns to its right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = {2: 0.25, 3: 0.40, 4: 0.50, 8: 0.85}


class Reference(NamedTuple):
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    weight: Tensor
    loss: float


def columns_in_order(H: Tensor, order: str, group: int) -> list[int]:
    """Columns, first rounded first."""
    width = H.shape[0]
    diagonal = H.diagonal().tolist()
    if order == "none":
        return list(range(width))
    if order == "full":
        return sorted(range(width), key=lambda i: -diagonal[i])
    starts = sorted(range(0, width, group), key=lambda s: -sum(diagonal[s : s + group]))
    return [i for s in starts for i in sorted(range(s, s + group), key=lambda i: -diagonal[i])]


def stored(step: Tensor, dtype: torch.dtype) -> Tensor:
    """A step as it reads back, kept off zero and infinity."""
    lowest = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    highest = torch.finfo(dtype).max
    return step.clamp(lowest, highest).to(dtype).double()


def fit(
    w: Tensor, weight: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Steps and zero points of the rows of one group."""
    top = 2**bits - 1
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    if symmetric:
        zero = torch.full_like(low, 2 ** (bits - 1))
    else:
        zero = torch.where(high > low, torch.round(-low / (high - low) * top), 0.0)
    below = torch.where(zero > 0, -low / zero, 0.0)
    above = torch.where(zero < top, high / (top - zero), 0.0)
    widest = torch.maximum(below, above)
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)

    def attempt(shrinkage: Tensor) -> None:
        nonlocal best, least
        step = stored(widest * shrinkage, dtype)
        codes = torch.round(w / step[:, None])
        codes = torch.minimum(torch.maximum(codes, -zero[:, None]), (top - zero)[:, None])
        error = (weight * (codes * step[:, None] - w) ** 2).sum(1)
        best = torch.where(error < least, shrinkage, best)
        least = torch.minimum(error, least)

    spacing = (1 - SMALLEST[bits]) / 7
    for k in range(8):
        attempt(torch.ones_like(low) * (1 - spacing * k))
    for part in (3, 9):
        centre = best
        attempt(centre - spacing / part)
        attempt(centre + spacing / part)
    return stored(widest * best, dtype), zero


def gptq(
    W: Tensor,
    H: Tensor,
    *,
    bits: int = 4,
    group: int = -1,
    symmetric: bool = True,
    order: str = "none",
    damping: float = 0.01,
    dtype: torch.dtype = torch.float16,
    grid: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Reference:
    """Codes of `W` for the undamped `H`; `grid`: scales, zeros and the group of each column."""
    W, H = W.double(), H.double()
    out, width = W.shape
    group = width if group == -1 else group
    columns = columns_in_order(H, order, group)
    damped = H + damping * H.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    inverse = torch.linalg.inv(damped[columns][:, columns])
    U = torch.linalg.cholesky(inverse, upper=True)
    fed = W[:, columns].clone()
    codes = torch.zeros(out, width, dtype=torch.float64)
    decoded = torch.zeros_like(W)
    if grid is None:
        count = width // group
        scales, zeros = torch.zeros(out, count).double(), torch.zeros(out, count).double()
        g_idx = torch.zeros(width, dtype=torch.long)
    else:
        scales, zeros, g_idx = grid[0].double(), grid[1].double(), grid[2].long()
    for position, column in enumerate(columns):
        if grid is None:
            number = position // group if order == "full" else column // group
            g_idx[column] = number
            if position % group == 0:
                conditional = 1.0 / U.diagonal()[position : position + group] ** 2
                scales[:, number], zeros[:, number] = fit(
                    fed[:, position : position + group], conditional, bits, symmetric, dtype
                )
        scale, zero = scales[:, g_idx[column]], zeros[:, g_idx[column]]
        code = (torch.round(fed[:, position] / scale + zero)).clamp(0, 2**bits - 1)
        codes[:, column] = code
        decoded[:, column] = (code - zero) * scale
        error = (fed[:, position] - decoded[:, column]) / U[position, position]
        fed[:, position + 1 :] -= error[:, None] * U[position, position + 1 :]
    E = W - decoded
    return Reference(codes, scales, zeros, g_idx, decoded, float((E @ H * E).sum()))
