"""The asymmetric objective: aim at what the reference computes on its own inputs.

By the time a linear is quantized, the layers before it are, so what the release feeds it, X, has
drifted from the reference's X̃. Rounding towards the reference's output W X̃ is the same
least-squares problem as before with another target, T = W + W Δ H⁻¹ for Δ = (X̃ − X)ᵀX / N; this is
the objective of GPTAQ (Li et al. 2025), solved by moving the target once instead of in the pass.

A linear whose output is added to a residual stream can also make up for what that stream has lost:
its target output is W X̃ + (R̃ − R), with R̃ and R the streams it is added to. That adds Γ H⁻¹ to the
target for Γ = (R̃ − R)ᵀX / N.

Shapes: N tokens, O out features, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.gptq.factor import Factor
from qmerge.gptq.grid import all_finite


class Drift:
    """Running sum of (Ã − A)ᵀX, what the reference has and the release lacks, seen from X.

    With A the input X itself it is Δ [I, I], with A a residual stream Γ [O, I]. The difference is
    taken token by token, so that a small drift is not lost in two large moments. Sums of several
    accumulators add up (`merge`). A token that is not finite in any of the three is left out.
    """

    def __init__(
        self,
        out: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sum_OI = torch.zeros(out, width, dtype=dtype, device=device)
        self.tokens = 0

    def add(self, reference_NO: Tensor, release_NO: Tensor, X_NI: Tensor) -> None:
        """Add the same tokens of both streams and of the release's input, [..., O] and [..., I]."""
        X_NI = X_NI.reshape(-1, X_NI.shape[-1]).to(self.sum_OI)
        drift_NO = reference_NO.to(self.sum_OI) - release_NO.to(self.sum_OI)
        drift_NO = drift_NO.reshape(-1, drift_NO.shape[-1])
        if not (all_finite(drift_NO) and all_finite(X_NI)):
            finite_N = torch.isfinite(drift_NO).all(1) & torch.isfinite(X_NI).all(1)
            X_NI, drift_NO = X_NI[finite_N], drift_NO[finite_N]
        self.tokens += X_NI.shape[0]
        self.sum_OI.addmm_(drift_NO.T, X_NI)

    def merge(self, other: Drift) -> None:
        """Add the tokens that `other` has seen."""
        self.sum_OI += other.sum_OI
        self.tokens += other.tokens

    def mean(self) -> Tensor:
        """The mean over all tokens so far, [O, I]; zeros without tokens."""
        return self.sum_OI / max(self.tokens, 1)


def aim(
    W_OI: Tensor,
    factor: Factor,
    drift_II: Tensor | None = None,
    residual_OI: Tensor | None = None,
) -> Tensor:
    """W + (W Δ + Γ) H⁻¹ with the factor's damped H, [O, I]: what to round in place of `W_OI`.

    Damping keeps the target near W where calibration says little. Without a factor's feedback to go
    by (nearest rounding), and where the target would not be finite, that is W itself.
    """
    W_OI = W_OI.to(factor.lower_II.dtype)
    if factor.is_nearest or (drift_II is None and residual_OI is None):
        return W_OI
    pull_OI = torch.zeros_like(W_OI) if drift_II is None else W_OI @ drift_II.to(W_OI)
    if residual_OI is not None:
        pull_OI += residual_OI.to(W_OI)
    target_OI = W_OI + factor.divide(pull_OI)
    return target_OI if all_finite(target_OI) else W_OI
