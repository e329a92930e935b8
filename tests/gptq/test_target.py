from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qmerge.gptq import Drift, aim, factor
from tests.gptq.problems import inputs, weight

TOKENS, OUT, WIDTH = 200, 9, 24
# Two batches; the first half of each makes the first half of the tokens.
BATCHES = (slice(0, 80), slice(80, 200))
FIRST = torch.tensor([*range(40), *range(80, 140)])
SECOND = torch.tensor([*range(40, 80), *range(140, 200)])


def gathered(reference: Tensor, release: Tensor, X: Tensor) -> Drift:
    drift = Drift(release.shape[1], X.shape[1], dtype=torch.float64)
    for batch in BATCHES:
        drift.add(reference[batch], release[batch], X[batch])
    return drift


def damped(X: Tensor) -> Tensor:
    H = X.T @ X / len(X)
    return H + 0.01 * H.diagonal().mean() * torch.eye(WIDTH).double()


def naive_trust(X: Tensor, missing: Tensor) -> float:
    """2S / (S + Q) from ridge regressions of what is missing, one on each half of the tokens."""
    H = damped(X)
    moves = [
        torch.linalg.solve(H, X[half].T @ missing[half] / len(half)).T for half in (FIRST, SECOND)
    ]
    signal = torch.trace(moves[0] @ H @ moves[1].T)
    square = sum(torch.trace(move @ H @ move.T) for move in moves) / 2
    return float(2 * signal / (signal + square))


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("beside", ["inputs", "residual", "both"])
def test_goes_towards_the_least_squares_target(desc_act: bool, beside: str) -> None:
    """All the way would be where the output on the release's input is nearest to the reference's,
    with damping as a pull towards the weight itself."""
    X, W = inputs(TOKENS, WIDTH, seed=1), weight(OUT, WIDTH, seed=1)
    reference = X + 0.1 * inputs(TOKENS, WIDTH, seed=2) + 0.05 * X.roll(1, dims=1)
    stream, lost = inputs(TOKENS, OUT, seed=3), 0.1 * X[:, :OUT] + inputs(TOKENS, OUT, seed=4) / 9
    use_drift, use_residual = beside != "residual", beside != "inputs"
    target = aim(
        W,
        factor(X.T @ X / TOKENS, desc_act=desc_act),
        gathered(reference, X, X).mean() if use_drift else None,
        gathered(stream + lost, stream, X).mean() if use_residual else None,
    )
    wanted = (reference if use_drift else X) @ W.T + (lost if use_residual else 0.0)
    pull = (damped(X) - X.T @ X / TOKENS).diagonal().mul(TOKENS).sqrt().diag()
    right = torch.cat([wanted, pull @ W.T])
    best = torch.linalg.lstsq(torch.cat([X, pull]), right).solution.T
    trust = naive_trust(X, wanted - X @ W.T)
    assert 0.2 < trust < 1.0
    torch.testing.assert_close(target, W + trust * (best - W), rtol=1e-9, atol=1e-10)


def test_noise_is_not_followed() -> None:
    """With hardly more tokens than inputs, what is missing at random must not move the target."""
    X, W = inputs(TOKENS, WIDTH, seed=5), weight(OUT, WIDTH, seed=5)
    stream, lost = inputs(TOKENS, OUT, seed=6), inputs(TOKENS, OUT, seed=7)
    few = slice(0, 30)
    drift = Drift(OUT, WIDTH, dtype=torch.float64)
    drift.add((stream + lost)[few], stream[few], X[few])
    found = factor(X[few].T @ X[few] / 30, desc_act=False)
    moved = aim(W, found, residual_2OI=drift.mean()) - W
    everything = found.divide(drift.mean().mean(0))
    assert moved.norm() < 0.5 * everything.norm()


def test_rows_beyond_the_judges_move_as_well() -> None:
    X, W = inputs(TOKENS, WIDTH, seed=8), weight(600, WIDTH, seed=8)
    found = factor(X.T @ X / TOKENS)
    drift = gathered(1.1 * X, X, X).mean()
    target = aim(W, found, drift)
    ratio = (target - W).norm(dim=1) / W.norm(dim=1)
    assert ((ratio > 0.05) & (ratio < 0.12)).all()


def test_without_drift_the_target_is_the_weight() -> None:
    X, W = inputs(TOKENS, WIDTH, seed=9), weight(OUT, WIDTH, seed=9)
    found = factor(X.T @ X / TOKENS, desc_act=False)
    assert torch.equal(aim(W, found), W)
    assert torch.equal(aim(W, found, Drift(WIDTH, WIDTH).mean(), Drift(OUT, WIDTH).mean()), W)


def test_nearest_rounding_and_bad_drift_aim_at_the_weight() -> None:
    X, W = inputs(TOKENS, WIDTH, seed=10), weight(OUT, WIDTH, seed=10)
    drift = torch.ones(2, WIDTH, WIDTH, dtype=torch.float64)
    assert torch.equal(aim(W, factor(torch.zeros(WIDTH, WIDTH).double(), desc_act=False), drift), W)
    drift[0, 3, 4] = torch.nan
    assert torch.equal(aim(W, factor(X.T @ X / TOKENS, desc_act=False), drift), W)


def test_tokens_that_are_not_finite_are_left_out() -> None:
    X, A = inputs(TOKENS, WIDTH, seed=11), inputs(TOKENS, OUT, seed=11)
    B = A + inputs(TOKENS, OUT, seed=12)
    bad_X, bad_B = X.clone(), B.clone()
    bad_X[3, 1], bad_B[5, 2] = torch.inf, torch.nan
    drift = Drift(OUT, WIDTH, dtype=torch.float64)
    drift.add(bad_B, A, bad_X)
    kept = torch.tensor([token for token in range(TOKENS) if token not in (3, 5)])
    wanted = (B - A)[kept].T @ X[kept] / len(kept)
    torch.testing.assert_close(drift.mean().mean(0), wanted, rtol=1e-12, atol=1e-12)
    assert drift.tokens == [99, 99]


def test_halves_of_batches_are_summed_apart() -> None:
    X, A, B = (inputs(TOKENS, WIDTH, seed=seed) for seed in (13, 14, 15))
    drift = Drift(WIDTH, WIDTH, dtype=torch.float64)
    for batch in BATCHES:
        drift.add(A[batch], B[batch], X[batch])
    for half, tokens in enumerate((FIRST, SECOND)):
        wanted = (A - B)[tokens].T @ X[tokens] / len(tokens)
        torch.testing.assert_close(drift.mean()[half], wanted, rtol=1e-12, atol=1e-12)
