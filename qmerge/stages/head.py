"""Quantize the output embedding, where that is asked for: one linear with very many rows.

Its Hessian is gathered once, and rows are solved some at a time, each like a sibling of the others.

S: tokens, I: in features, O: rows, of which there are as many as the vocabulary has tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from qmerge.formats.integer import IntegerWeight
from qmerge.gptq import Drift, Hessian
from qmerge.job import Settings
from qmerge.measure import output_power, pool_survival
from qmerge.model.frame import ROWS_AT_ONCE
from qmerge.model.streams import batches
from qmerge.results import LinearResult
from qmerge.stages.requantize import (
    Means,
    Moments,
    Weight,
    grid_name,
    on_grid,
    solve_stacked,
    told,
)

Inputs = tuple[torch.Tensor, torch.Tensor | None]


def gather(inputs: Iterator[Inputs], width: int, device: torch.device, *, paired: bool) -> Means:
    """Means of what the head reads [W, S, I]: of the release's inputs, and where they are `paired`
    with the reference's also of the drift between both, which all earlier layers have left."""
    drift = Drift(width, width, device=device) if paired else None
    moments = Moments(hessian=Hessian(width, device=device), drift=drift)
    for release, reference in inputs:
        moments.hessian.add(release)
        if drift is not None and reference is not None:
            drift.add(reference, release, release)
    return moments.means()


def requantize_head(
    name: str, rows: Callable[[int, int], Weight], count: int, means: Means, settings: Settings
) -> tuple[IntegerWeight, LinearResult]:
    """The head on its grid, and how it came out; `rows` gives its weight from row to row."""
    parts, results, power = [], [], 0.0
    for start, stop in batches(count, ROWS_AT_ONCE):
        weight = rows(start, stop)
        own = replace(settings, spec=weight.spec)
        (update,) = solve_stacked([weight], means, own)
        parts.append(on_grid(update.solution, weight.spec))
        results.append(told(name, weight, update, means))
        power += output_power(weight.merged_OI, means.H_II)
    shares = [part.codes_OI.shape[0] / count for part in parts]
    return _stacked(parts), _pooled(results, shares, power)


def _stacked(parts: Sequence[IntegerWeight]) -> IntegerWeight:
    """Columns are ordered by the Hessian alone, so that all parts have the same groups."""
    return replace(
        parts[0],
        codes_OI=torch.cat([part.codes_OI for part in parts]),
        scales_OG=torch.cat([part.scales_OG for part in parts]),
        zeros_OG=torch.cat([part.zeros_OG for part in parts]),
    )


def _pooled(results: Sequence[LinearResult], shares: Sequence[float], power: float) -> LinearResult:
    pairs = [*zip(results, shares, strict=True)]
    anchored = sum(share * (result.anchored or 0.0) for result, share in pairs)
    loss = sum(result.loss or 0.0 for result in results)
    return replace(
        results[0],
        grid=grid_name(anchored),
        anchored=anchored,
        kappa=sum(share * (result.kappa or 1.0) for result, share in pairs),
        loss=loss,
        error=loss / power if power > 0 else None,
        survival=pool_survival([result.survival for result in results]),
    )
