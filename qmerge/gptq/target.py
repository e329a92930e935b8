"""The asymmetric objective: aim at what the reference computes on its own inputs.

By the time a linear is quantized, the layers before it are, so what the release feeds it, X, has
drifted from the reference's X̃. Rounding towards the reference's output W X̃ is the same
least-squares problem as before with another target, T = W + W Δ H⁻¹ for Δ = (X̃ − X)ᵀX / N; this is
the objective of GPTAQ (Li et al. 2025), solved by moving the target once instead of in the pass.

A linear whose output is added to a residual stream can also make up for what that stream has lost:
its target output is W X̃ + (R̃ − R), with R̃ and R the streams it is added to. That adds Γ H⁻¹ to the
target for Γ = (R̃ − R)ᵀX / N.

Both are regressions on the calibration tokens, and with few tokens for a wide input they fit noise,
which does harm on other text. So both moments are kept for two halves of the tokens, and the target
moves only as far as what one half says holds on the other.

Shapes: N tokens, O out features, I in features, 2 halves of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.gptq.factor import Factor
from qmerge.gptq.grid import all_finite

# Rows, evenly taken, by which it is judged how far the halves agree.
JUDGES = 256


class Drift:
    """Running sums of (Ã − A)ᵀX, what the reference has and the release lacks, seen from X.

    With A the input X itself it is Δ [I, I], with A a residual stream Γ [O, I]. The first half of
    each batch is summed apart from the second, so batches should not be single windows where that
    can be helped. The difference is taken token by token, so that a small drift is not lost in two
    large moments. A token that is not finite in any of the three is left out.
    """

    def __init__(
        self,
        out: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sum_2OI = torch.zeros(2, out, width, dtype=dtype, device=device)
        self.tokens = [0, 0]

    def add(self, reference_NO: Tensor, release_NO: Tensor, X_NI: Tensor) -> None:
        """Add the same tokens of both streams and of the release's input, [..., O] and [..., I]."""
        X_NI = X_NI.reshape(-1, X_NI.shape[-1]).to(self.sum_2OI)
        drift_NO = reference_NO.to(self.sum_2OI) - release_NO.to(self.sum_2OI)
        drift_NO = drift_NO.reshape(-1, drift_NO.shape[-1])
        if not (all_finite(drift_NO) and all_finite(X_NI)):
            finite_N = torch.isfinite(drift_NO).all(1) & torch.isfinite(X_NI).all(1)
            X_NI, drift_NO = X_NI[finite_N], drift_NO[finite_N]
        middle = X_NI.shape[0] // 2
        for half, tokens in enumerate((slice(0, middle), slice(middle, None))):
            self.sum_2OI[half].addmm_(drift_NO[tokens].T, X_NI[tokens])
            self.tokens[half] += X_NI[tokens].shape[0]

    def mean(self) -> Tensor:
        """The means of the two halves of the tokens so far, [2, O, I]; zeros without tokens."""
        count_2 = torch.tensor(self.tokens, device=self.sum_2OI.device).clamp_(min=1)
        return self.sum_2OI / count_2[:, None, None]


def aim(
    W_OI: Tensor,
    factor: Factor,
    drift_2II: Tensor | None = None,
    residual_2OI: Tensor | None = None,
) -> Tensor:
    """W + t (W Δ + Γ) H⁻¹ with the factor's damped H, [O, I]: what to round in place of `W_OI`.

    Both moments come as the means of two halves of the tokens; t in 0..1 is how far the halves
    agree (`trust`). Damping keeps the target near W where calibration says little. Without a
    factor's feedback to go by (nearest rounding), and where the target would not be finite, that is
    W itself.
    """
    W_OI = W_OI.to(factor.lower_II.dtype)
    if factor.is_nearest or (drift_2II is None and residual_2OI is None):
        return W_OI
    judges = slice(None, None, -(-W_OI.shape[0] // JUDGES))
    shares_2OI = torch.stack(
        [
            _pull(
                W_OI[judges],
                None if drift_2II is None else drift_2II[half],
                None if residual_2OI is None else residual_2OI[half, judges],
            )
            for half in range(2)
        ]
    )
    pull_OI = _pull(
        W_OI,
        None if drift_2II is None else drift_2II.mean(0),
        None if residual_2OI is None else residual_2OI.mean(0),
    )
    target_OI = W_OI + factor.divide(pull_OI).mul_(trust(shares_2OI, factor))
    return target_OI if all_finite(target_OI) else W_OI


def trust(pull_2OI: Tensor, factor: Factor) -> float:
    """How much of the mean of two independent estimates of a pull to believe, 0..1.

    Each half moves the target by signal and noise. Their product under H is the signal S, either's
    own square is S + 2V for a mean of noise V, and the mean is best taken times S / (S + V).
    """
    first_OI, second_OI = (factor.divide(pull_OI) for pull_OI in pull_2OI)
    signal = float((first_OI * pull_2OI[1]).sum(dtype=torch.float64))
    squares = float((first_OI * pull_2OI[0] + second_OI * pull_2OI[1]).sum(dtype=torch.float64))
    return min(1.0, 2 * signal / (signal + squares / 2)) if signal > 0 else 0.0


def _pull(W_OI: Tensor, drift_II: Tensor | None, residual_OI: Tensor | None) -> Tensor:
    """W Δ + Γ."""
    pull_OI = torch.zeros_like(W_OI) if drift_II is None else W_OI @ drift_II.to(W_OI)
    return pull_OI if residual_OI is None else pull_OI.add_(residual_OI.to(W_OI))
