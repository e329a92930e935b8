"""What quantizing cost: pure functions on tensors, from logits to `qmerge.results` records."""

from __future__ import annotations

from qmerge.measure.gate import Limits, check_limits, limits_of
from qmerge.measure.pairing import FEWEST_WINDOWS, compare_results, pair, too_few_windows
from qmerge.measure.statistics import paired_estimate, score_arms
from qmerge.measure.survival import (
    error_ratio,
    linear_survival,
    output_power,
    pool_survival,
    relative_error,
    survival_of,
)
from qmerge.measure.tokens import TokenAccumulator, TokenStats, join
from qmerge.measure.worst import worst_windows

__all__ = [
    "FEWEST_WINDOWS",
    "Limits",
    "TokenAccumulator",
    "TokenStats",
    "check_limits",
    "compare_results",
    "error_ratio",
    "join",
    "limits_of",
    "linear_survival",
    "output_power",
    "pair",
    "paired_estimate",
    "pool_survival",
    "relative_error",
    "score_arms",
    "survival_of",
    "too_few_windows",
    "worst_windows",
]
