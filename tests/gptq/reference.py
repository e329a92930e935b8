"""Textbook GPTQ in float64, one column at a time, with nothing shared with the package.

The recursion is that of Frantar et al. (2022): the inverse of the damped Hessian, its upper
Cholesky factor, and after each column the update of all columns to its right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = {2: 0.25, 3: 0.40, 4: 0.50, 8: 0.85}


class Steps(NamedTuple):
    """Steps and zero points of each group, and the group of each column."""

    scales: Tensor
    zeros: Tensor
    g_idx: Tensor


class Reference(NamedTuple):
    codes: Tensor
    steps: Steps
    weight: Tensor
    loss: float


def columns_in_order(H: Tensor, desc_act: bool) -> list[int]:
    """Columns, first rounded first."""
    diagonal = H.diagonal().tolist()
    return sorted(range(len(diagonal)), key=lambda i: -diagonal[i] if desc_act else i)


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


def grid(
    W: Tensor,
    *,
    bits: int = 4,
    group: int = -1,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    weight: Tensor | None = None,
    g_idx: Tensor | None = None,
) -> Steps:
    """Every group fitted on its own; `g_idx` None is equal runs of columns in order."""
    width = W.shape[1]
    weight = torch.ones(width).double() if weight is None else weight
    if g_idx is None:
        g_idx = torch.arange(width) // (width if group == -1 else group)
    fitted = [
        fit(W[:, g_idx == k].double(), weight[g_idx == k], bits, symmetric, dtype)
        for k in range(int(g_idx.max()) + 1)
    ]
    scales, zeros = (torch.stack(each, 1) for each in zip(*fitted, strict=True))
    return Steps(scales, zeros, g_idx)


def gptq(
    W: Tensor,
    H: Tensor,
    steps: Steps,
    *,
    bits: int = 4,
    desc_act: bool = False,
    damping: float = 0.01,
) -> Reference:
    """Codes of `W` for the undamped `H`."""
    W, H = W.double(), H.double()
    out, width = W.shape
    columns = columns_in_order(H, desc_act)
    damped = H + damping * H.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    inverse = torch.linalg.inv(damped[columns][:, columns])
    U = torch.linalg.cholesky(inverse, upper=True)
    fed = W[:, columns].clone()
    codes = torch.zeros(out, width, dtype=torch.float64)
    decoded = torch.zeros_like(W)
    for position, column in enumerate(columns):
        group = steps.g_idx[column]
        scale, zero = steps.scales[:, group], steps.zeros[:, group]
        code = (torch.round(fed[:, position] / scale + zero)).clamp(0, 2**bits - 1)
        codes[:, column] = code
        decoded[:, column] = (code - zero) * scale
        error = (fed[:, position] - decoded[:, column]) / U[position, position]
        fed[:, position + 1 :] -= error[:, None] * U[position, position + 1 :]
    E = W - decoded
    return Reference(codes, steps, decoded, float((E @ H * E).sum()))
