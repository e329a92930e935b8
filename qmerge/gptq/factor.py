"""The order in which columns are rounded, and the factor that feeds their errors forward.

GPTQ's feedback is a triangular factorization: with H = L Lᵀ, L = L̂ diag(√d) and columns rounded
from the last to the first, the best target of column j given the errors E of the columns already
rounded is w_j + Σ_{k>j} E_k L̂_kj, and the whole loss is Σ_j d_j (target_j − q_j)². This is the
recursion of GPTQ (Frantar et al. 2022) without the inverse of H, in the form of LDLQ (Chee et al.
2023).

So columns are laid out in the reverse of the order in which they are rounded: the last row of the
layout is the first column to be rounded.

Shapes: I in features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.gptq.grid import all_finite

# Of the mean diagonal. Each failure multiplies it by ten, up to the mean itself.
DAMPING = 0.01
RAISE = 10.0


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A damped second moment, ordered and factored once for all linears that share the input.

    `layout_I` lists the columns, last rounded first; `lower_II` is L̂ (unit lower triangular, its
    diagonal not stored) and `weight_I` is d, both in that layout and in units of H. `damping_I`
    is what was added to the diagonal, `damping` the fraction of the mean diagonal that it took.
    `fallback` says what had to give way: None where damping sufficed.
    """

    layout_I: Tensor
    lower_II: Tensor
    weight_I: Tensor
    damping_I: Tensor
    damping: float
    fallback: str | None

    @property
    def width(self) -> int:
        """In features."""
        return self.layout_I.shape[0]

    @property
    def is_nearest(self) -> bool:
        """Whether there is no feedback, and every column is rounded on its own."""
        return self.lower_II.stride() == (0, 0)

    def own_order(self, values_I: Tensor) -> Tensor:
        """Values given in the layout's order along dim 0, in the columns' own order."""
        return values_I.index_select(0, self.layout_I.argsort())

    def divide(self, M_OI: Tensor) -> Tensor:
        """M H⁻¹ for the damped H, both in the columns' own order."""
        M_IO = M_OI.T.to(self.lower_II.dtype).index_select(0, self.layout_I)
        M_IO = torch.linalg.solve_triangular(self.lower_II, M_IO, upper=False, unitriangular=True)
        M_IO.div_(self.weight_I[:, None])
        M_IO = torch.linalg.solve_triangular(self.lower_II.T, M_IO, upper=True, unitriangular=True)
        return self.own_order(M_IO).T


def factor(H_II: Tensor, *, desc_act: bool = True, damping: float = DAMPING) -> Factor:
    """Damp, order and factor `H_II`, the mean of XᵀX; its dtype is that of the solve.

    With `desc_act` columns are rounded by decreasing diagonal, else in their own order. Where the
    damped matrix is not positive definite, damping rises tenfold up to the mean diagonal; after
    that each diagonal entry is raised to its row's absolute sum, which makes any finite matrix
    positive definite; a matrix that is not finite or is zero leaves nearest rounding.
    """
    mean = float(H_II.diagonal().double().mean())
    broken = _broken(H_II, mean)
    if broken is not None:
        return _nearest(H_II, _layout(H_II, desc_act=False), f"nearest rounding: {broken}")
    layout_I = _layout(H_II, desc_act=desc_act)
    info = torch.empty((), dtype=torch.int32, device=H_II.device)
    for fraction, floor_I, fallback in _attempts(H_II, layout_I, mean, damping):
        # Symmetric, so that its transpose is the same matrix laid out as LAPACK wants it: in place.
        lower_II = H_II[layout_I[:, None], layout_I].div_(mean).T
        lower_II.diagonal().add_(floor_I)
        torch.linalg.cholesky_ex(lower_II, out=(lower_II, info))
        root_I = lower_II.diagonal().clone()
        if int(info) == 0 and _sound(root_I):
            return Factor(
                layout_I=layout_I,
                lower_II=lower_II.div_(root_I),
                weight_I=root_I.square_().mul_(mean),
                damping_I=floor_I * mean,
                damping=fraction,
                fallback=fallback,
            )
    return _nearest(H_II, layout_I, "nearest rounding: the Hessian could not be factored")


def _layout(H_II: Tensor, *, desc_act: bool) -> Tensor:
    """Columns, last rounded first."""
    if desc_act:
        return H_II.diagonal().argsort(descending=True, stable=True).flip(0)
    return torch.arange(H_II.shape[0] - 1, -1, -1, device=H_II.device)


def _broken(H_II: Tensor, mean: float) -> str | None:
    if not all_finite(H_II):
        return "the Hessian is not finite"
    if mean <= 0.0:
        return "the input was never active in calibration"
    return None


def _sound(root_I: Tensor) -> bool:
    """Whether pivots stand above rounding noise; feedback through noise would be noise."""
    noise = torch.finfo(root_I.dtype).eps * math.sqrt(root_I.shape[0])
    return bool((root_I.square() > noise).all())


def _attempts(
    H_II: Tensor, layout_I: Tensor, mean: float, damping: float
) -> Iterator[tuple[float, Tensor, str | None]]:
    """(fraction, what to add to the diagonal, fallback) in order of preference; in the layout, in
    units of the mean diagonal."""
    diagonal_I = H_II.diagonal()[layout_I] / mean
    ones_I = torch.ones_like(diagonal_I)
    fraction = damping
    while fraction <= 1.0:
        yield fraction, ones_I * fraction, None
        fraction = fraction * RAISE if fraction > 0.0 else DAMPING / RAISE
    rest_I = H_II.abs().sum(1)[layout_I] / mean - diagonal_I.abs()
    floor_I = (rest_I - diagonal_I).clamp_(min=0).add_(damping + ones_I * 1e-3)
    yield damping, floor_I, "diagonal floor: the damped Hessian was not positive definite"


def _nearest(H_II: Tensor, layout_I: Tensor, reason: str) -> Factor:
    """A factor without feedback: every column of equal weight and rounded on its own.

    Damping is all there is of it, so that what is reported as loss is 0: nothing is known of it.
    """
    width = H_II.shape[0]
    return Factor(
        layout_I=layout_I,
        lower_II=H_II.new_zeros(()).expand(width, width),
        weight_I=H_II.new_ones(width),
        damping_I=H_II.new_ones(width),
        damping=0.0,
        fallback=reason,
    )
