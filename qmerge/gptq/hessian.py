"""The second moment of a linear's input, summed over calibration tokens.

Shapes: N tokens, O out and I in features of the linear, P columns of a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.gptq.grid import all_finite

# Columns of one panel of a symmetric matrix. Narrower panels compute fewer of the mirrored
# products, wider ones run nearer to the machine's rate; 256 was best or equal from 256 to 3072
# columns.
PANEL = 256


class Hessian:
    """Running sum of XᵀX; only the upper half's products are computed.

    Tokens may be seen in any parts. One with a value that is not finite is left out and counted in
    `dropped`: one bad sample must not cost the linear its calibration.
    """

    def __init__(
        self, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.sum_II = torch.zeros(width, width, dtype=dtype, device=device)
        self.tokens = 0
        self.dropped = 0

    def add(self, X_NI: Tensor) -> None:
        """Add the tokens of [..., I]; leading dimensions are all tokens."""
        X_NI = X_NI.reshape(-1, X_NI.shape[-1]).to(self.sum_II)
        if not all_finite(X_NI):
            finite_N = torch.isfinite(X_NI).all(1)
            self.dropped += int((~finite_N).sum())
            X_NI = X_NI[finite_N]
        self.tokens += X_NI.shape[0]
        for start in range(0, X_NI.shape[1], PANEL):
            panel = slice(start, start + PANEL)
            self.sum_II[panel, start:].addmm_(X_NI[:, panel].T, X_NI[:, start:])

    def mean(self) -> Tensor:
        """XᵀX / N of all tokens so far, [I, I], symmetric to the last bit; zeros without tokens."""
        for start in range(0, self.sum_II.shape[0], PANEL):
            panel, after = slice(start, start + PANEL), slice(start + PANEL, None)
            corner_PP = self.sum_II[panel, panel]
            corner_PP.copy_(corner_PP.triu() + corner_PP.triu(1).T)
            self.sum_II[after, panel] = self.sum_II[panel, after].T
        return self.sum_II / max(self.tokens, 1)


def output_squares(W_OI: Tensor, H_II: Tensor) -> Tensor:
    """diag(W H Wᵀ), each output's mean square [O]; only the upper half of `H_II` is read."""
    W_OI = W_OI.to(H_II.dtype)
    squares_O = H_II.new_zeros(W_OI.shape[0])
    for start in range(0, H_II.shape[0], PANEL):
        panel = slice(start, start + PANEL)
        moved_OP = W_OI[:, panel] @ H_II[panel, panel]
        moved_OP.addmm_(W_OI[:, :start], H_II[:start, panel], alpha=2)
        squares_O += moved_OP.mul_(W_OI[:, panel]).sum(1)
    return squares_O
