"""What quantizing cost: pure functions on tensors, from logits to `qmerge.results` records."""

from __future__ import annotations

from qmerge.measure.gate import Limits, check_limits, limits_of
from qmerge.measure.pairing import compare_results, pair
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
    "worst_windows",
]
