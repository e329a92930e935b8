"""From per-token statistics to scores with standard errors.

W: windows, T: targets per window. Windows are the sampling unit: tokens of one window are not
independent, so every standard error is that of per-window means (or of the delta method on them).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qmerge.measure.tokens import TokenStats
from qmerge.results import (
    ArmScore,
    Change,
    ConfidenceBin,
    Divergence,
    Estimate,
    ProbabilityChange,
)

CONFIDENCE_BINS = 10
# The quantile of more degrees of freedom is within 0.1 per cent of this many's.
MOST_FREEDOM = 2000


def score_arms(stats: Mapping[str, TokenStats], reference: str | None) -> dict[str, ArmScore]:
    """Scores of every model on one corpus from statistics [W, T] (`join`)."""
    base = stats[reference] if reference is not None else None
    return {arm: _score(found, base, is_base=arm == reference) for arm, found in stats.items()}


def _score(stats: TokenStats, base: TokenStats | None, *, is_base: bool) -> ArmScore:
    nll_W = _window_means(stats.nll_R, stats.scored_R)
    tokens = int(stats.scored_R.sum())
    perplexity = _exp(_mean(stats.nll_R, stats.scored_R))
    error = _stderr(nll_W)
    plain = ArmScore(
        perplexity=perplexity,
        stderr=None if error is None else perplexity * error,
        tokens=tokens,
        unscored_tokens=stats.scored_R.numel() - tokens,
        window_nll=_rounded(nll_W),
    )
    if base is None or is_base or stats.kl_R is None or stats.same_top_R is None:
        return plain
    kl_W = stats.kl_R.double().mean(dim=1)
    return replace(
        plain,
        kl=_divergence(stats.kl_R, kl_W),
        same_top=estimate(stats.same_top_R.double().mean(dim=1)),
        probability_change=_probability_change(stats, base),
        change=change(stats, base),
        kl_by_confidence=_by_confidence(stats.kl_R, base.confidence_R),
        window_kl=_rounded(kl_W),
    )


def change(subject: TokenStats, base: TokenStats) -> Change:
    """Paired change of perplexity from `base` to `subject`, over the tokens both can score."""
    both = subject.scored_R & base.scored_R
    return paired_change(_window_means(subject.nll_R, both), _window_means(base.nll_R, both))


def paired_change(subject_W: Tensor, base_W: Tensor) -> Change:
    """Change of perplexity from per-window mean nll [W] of the same windows, float64.

    Delta method for the ratio and the difference; the interval is exp of the t interval of the
    mean log-likelihood difference.
    """
    keep = ~(subject_W.isnan() & base_W.isnan())  # windows without a token both can score
    subject_W, base_W = subject_W[keep], base_W[keep]
    log_W = subject_W - base_W
    new, old = _exp(_average(subject_W)), _exp(_average(base_W))
    centre, error = _average(log_W), _stderr(log_W)
    ratio = _exp(centre)
    if error is None:
        return Change(ratio=ratio, difference=new - old)
    reach = student_quantile(len(log_W) - 1) * error
    return Change(
        ratio=ratio,
        ratio_stderr=ratio * error,
        difference=new - old,
        difference_stderr=_stderr(new * subject_W - old * base_W),
        ci95=(_exp(centre - reach), _exp(centre + reach)),
    )


def estimate(values_W: Tensor) -> Estimate:
    """Mean of per-window means [W] and its standard error."""
    return Estimate(mean=_average(values_W), stderr=_stderr(values_W))


def paired_estimate(first_W: Tensor, second_W: Tensor) -> Estimate:
    """Mean of `first - second` over the same windows [W], with its paired standard error."""
    return estimate(first_W.double() - second_W.double())


def percentile(sorted_N: Tensor, share: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    place = share * (len(sorted_N) - 1)
    low = math.floor(place)
    high = min(low + 1, len(sorted_N) - 1)
    below, above = float(sorted_N[low]), float(sorted_N[high])
    return below + (above - below) * (place - low)


@functools.cache
def student_quantile(freedom: int, confidence: float = 0.95) -> float:
    """Two-sided quantile of Student's t, by bisection on its closed form for whole degrees of
    freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    freedom = min(freedom, MOST_FREEDOM)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _student_inside(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _student_inside(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) * tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for step in range(freedom // 2):
        total += term
        term *= (
            cosine
            * cosine
            * ((2 * step + 2) / (2 * step + 3) if odd else (2 * step + 1) / (2 * step + 2))
        )
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _divergence(kl_WT: Tensor, kl_W: Tensor) -> Divergence:
    sorted_N = kl_WT.double().flatten().sort().values
    centre = estimate(kl_W)
    if sorted_N.isnan().any():
        sorted_N = torch.full_like(sorted_N, math.nan)
    return Divergence(
        mean=centre.mean,
        stderr=centre.stderr,
        median=percentile(sorted_N, 0.5),
        p90=percentile(sorted_N, 0.9),
        p95=percentile(sorted_N, 0.95),
        p99=percentile(sorted_N, 0.99),
        p999=percentile(sorted_N, 0.999),
        max=float(sorted_N[-1]),
    )


def _probability_change(stats: TokenStats, base: TokenStats) -> ProbabilityChange:
    both = stats.scored_R & base.scored_R
    squares_WT = (stats.probability_R.double() - base.probability_R.double()) ** 2
    rms = math.sqrt(_mean(squares_WT, both))
    error = _stderr(_window_means(squares_WT, both))
    return ProbabilityChange(
        rms=rms, stderr=None if error is None or rms == 0 else error / (2 * rms)
    )


def _by_confidence(kl_WT: Tensor, confidence_WT: Tensor) -> tuple[ConfidenceBin, ...]:
    place_WT = (confidence_WT * CONFIDENCE_BINS).nan_to_num(0.0).long()
    place_WT.clamp_(0, CONFIDENCE_BINS - 1)
    bins = []
    for index in range(CONFIDENCE_BINS):
        inside_WT = place_WT == index
        count_W = inside_WT.sum(dim=1).double()
        tokens = int(count_W.sum())
        if tokens == 0:
            continue
        sum_W = torch.where(inside_WT, kl_WT.double(), 0.0).sum(dim=1)
        mean = float(sum_W.sum()) / tokens
        windows = len(sum_W)
        spread = float(((sum_W - mean * count_W) ** 2).sum())
        error = math.sqrt(spread * windows / (windows - 1)) / tokens if windows > 1 else None
        low, high = index / CONFIDENCE_BINS, (index + 1) / CONFIDENCE_BINS
        bins.append(ConfidenceBin(low=low, high=high, tokens=tokens, kl=mean, stderr=error))
    return tuple(bins)


def _window_means(values_WT: Tensor, keep_WT: Tensor) -> Tensor:
    kept_WT = torch.where(keep_WT, values_WT.double(), 0.0)
    return kept_WT.sum(dim=1) / keep_WT.sum(dim=1)


def _mean(values_WT: Tensor, keep_WT: Tensor) -> float:
    return _average(values_WT[keep_WT])


def _average(values_N: Tensor) -> float:
    return float(values_N.double().mean()) if len(values_N) else math.nan


def _stderr(values_W: Tensor) -> float | None:
    found = values_W[~values_W.isnan()] if values_W.isnan().any() else values_W
    if len(found) < 2:
        return None
    return float(found.double().std(correction=1)) / math.sqrt(len(found))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf if value == value else math.nan


def _rounded(values_W: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.9g}") for value in values_W.tolist())
