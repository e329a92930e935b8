from __future__ import annotations

import pytest
import torch

from qmerge.gptq import Drift, aim, factor
from tests.gptq.problems import inputs, weight

TOKENS, OUT, WIDTH = 200, 9, 24


@pytest.mark.parametrize("order", ["none", "group", "full"])
@pytest.mark.parametrize("beside", ["inputs", "residual", "both"])
def test_is_the_least_squares_target(order: str, beside: str) -> None:
    """The target's output on the release's input is nearest to the reference's output, where
    damping is a pull towards the weight itself."""
    X, W = inputs(TOKENS, WIDTH, seed=1), weight(OUT, WIDTH, seed=1)
    reference = X + 0.1 * inputs(TOKENS, WIDTH, seed=2) + 0.05 * X.roll(1, dims=1)
    stream, lost = inputs(TOKENS, OUT, seed=3), 0.1 * X[:, :OUT] + inputs(TOKENS, OUT, seed=4)
    drift = Drift(WIDTH, WIDTH, dtype=torch.float64)
    residual = Drift(OUT, WIDTH, dtype=torch.float64)
    for half in (slice(0, 77), slice(77, None)):
        drift.add(reference[half], X[half], X[half])
        residual.add((stream + lost)[half], stream[half], X[half])

    H = X.T @ X / TOKENS
    found = factor(H, order=order, group_size=8)  # type: ignore[arg-type]
    target = aim(
        W,
        found,
        drift.mean() if beside != "residual" else None,
        residual.mean() if beside != "inputs" else None,
    )
    wanted = (reference if beside != "residual" else X) @ W.T
    wanted = wanted + (lost if beside != "inputs" else 0.0)
    pull = (0.01 * H.diagonal().mean() * TOKENS).sqrt() * torch.eye(WIDTH).double()
    solution = torch.linalg.lstsq(torch.cat([X, pull]), torch.cat([wanted, pull @ W.T])).solution
    torch.testing.assert_close(target, solution.T, rtol=1e-9, atol=1e-10)


def test_without_drift_the_target_is_the_weight() -> None:
    X, W = inputs(TOKENS, WIDTH, seed=5), weight(OUT, WIDTH, seed=5)
    found = factor(X.T @ X / TOKENS, order="none")
    assert torch.equal(aim(W, found), W)
    assert torch.equal(aim(W, found, Drift(WIDTH, WIDTH).mean(), Drift(OUT, WIDTH).mean()), W)


def test_nearest_rounding_and_bad_drift_aim_at_the_weight() -> None:
    X, W = inputs(TOKENS, WIDTH, seed=6), weight(OUT, WIDTH, seed=6)
    drift = torch.ones(WIDTH, WIDTH, dtype=torch.float64)
    assert torch.equal(aim(W, factor(torch.zeros(WIDTH, WIDTH).double(), order="none"), drift), W)
    drift[3, 4] = torch.nan
    assert torch.equal(aim(W, factor(X.T @ X / TOKENS, order="none"), drift), W)


def test_tokens_that_are_not_finite_are_left_out() -> None:
    X, A = inputs(TOKENS, WIDTH, seed=7), inputs(TOKENS, OUT, seed=7)
    B = A + inputs(TOKENS, OUT, seed=8)
    bad_X, bad_B = X.clone(), B.clone()
    bad_X[3, 1], bad_B[5, 2] = torch.inf, torch.nan
    drift = Drift(OUT, WIDTH, dtype=torch.float64)
    drift.add(bad_B, A, bad_X)
    kept = [token for token in range(TOKENS) if token not in (3, 5)]
    wanted = (B - A)[kept].T @ X[kept] / len(kept)
    torch.testing.assert_close(drift.mean(), wanted, rtol=1e-12, atol=1e-12)
    assert drift.tokens == TOKENS - 2


def test_sums_of_parts_merge() -> None:
    X, A, B = (inputs(TOKENS, WIDTH, seed=seed) for seed in (9, 10, 11))
    parts = [Drift(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2)]
    parts[0].add(A[:50], B[:50], X[:50])
    parts[1].add(A[50:], B[50:], X[50:])
    parts[0].merge(parts[1])
    torch.testing.assert_close(parts[0].mean(), (A - B).T @ X / TOKENS, rtol=1e-12, atol=1e-12)
