"""Scores against numpy, and the interval by simulation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from qmerge.measure.statistics import (
    paired_change,
    paired_estimate,
    percentile,
    score_arms,
    student_quantile,
)
from qmerge.measure.tokens import TokenAccumulator, TokenStats, join

W, T, V = 12, 31, 60


def stats(
    distance: float = 0.3, windows: int = W, seed: int = 0
) -> tuple[dict[str, TokenStats], Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    trained = 3 * torch.randn(windows * T, V, generator=generator)
    release = trained + distance * torch.randn(windows * T, V, generator=generator)
    targets = torch.randint(0, V, (windows * T,), generator=generator)
    accumulator = TokenAccumulator(("trained", "release"), "trained", targets)
    accumulator.add(0, {"trained": trained, "release": release})
    found = {arm: join([part], T) for arm, part in accumulator.finish().items()}
    return found, trained, release, targets


def nll(logits: Tensor, targets: Tensor) -> npt.NDArray[np.float64]:
    loss = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    return np.asarray(loss.view(-1, T), dtype=np.float64)


def test_scores_equal_numpy_on_full_logits() -> None:
    found, trained, release, targets = stats()
    score = score_arms(found, "trained")["release"]
    loss, base = nll(release, targets), nll(trained, targets)
    assert score.perplexity == pytest.approx(np.exp(loss.mean()), rel=1e-6)
    means = loss.mean(axis=1)
    error = means.std(ddof=1) / math.sqrt(W)
    assert score.stderr == pytest.approx(np.exp(loss.mean()) * error, rel=1e-5)
    assert score.tokens == W * T
    assert score.window_nll == pytest.approx(means, rel=1e-6)

    p, q = trained.double().log_softmax(1), release.double().log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).view(W, T).numpy()
    assert score.kl is not None
    assert score.kl.mean == pytest.approx(kl.mean(), rel=1e-6)
    assert score.kl.stderr == pytest.approx(kl.mean(axis=1).std(ddof=1) / math.sqrt(W), rel=1e-5)
    assert score.kl.max == pytest.approx(kl.max(), rel=1e-6)
    for name, share in (("median", 50), ("p90", 90), ("p95", 95), ("p99", 99), ("p999", 99.9)):
        assert getattr(score.kl, name) == pytest.approx(np.percentile(kl, share), rel=1e-5)
    assert score.window_kl == pytest.approx(kl.mean(axis=1), rel=1e-6)

    same = (trained.argmax(1) == release.argmax(1)).double().view(W, T).mean(dim=1).numpy()
    assert score.same_top is not None
    assert score.same_top.mean == pytest.approx(same.mean())
    assert score.same_top.stderr == pytest.approx(same.std(ddof=1) / math.sqrt(W))

    rms = math.sqrt(((np.exp(-loss) - np.exp(-base)) ** 2).mean())
    assert score.probability_change is not None
    assert score.probability_change.rms == pytest.approx(rms, rel=1e-5)

    log = loss.mean(axis=1) - base.mean(axis=1)
    assert score.change is not None
    assert score.change.ratio == pytest.approx(np.exp(loss.mean() - base.mean()), rel=1e-6)
    difference = np.exp(loss.mean()) - np.exp(base.mean())
    assert score.change.difference == pytest.approx(difference, rel=1e-4)
    assert score.change.ratio_stderr is not None
    expected = score.change.ratio * log.std(ddof=1) / math.sqrt(W)
    assert score.change.ratio_stderr == pytest.approx(expected, rel=1e-4)


def test_kl_by_confidence_equals_a_loop_over_tokens() -> None:
    found, trained, release, _ = stats()
    p, q = trained.double().log_softmax(1), release.double().log_softmax(1)
    kl, top = (p.exp() * (p - q)).sum(1), p.exp().amax(1)
    bins = score_arms(found, "trained")["release"].kl_by_confidence
    assert sum(part.tokens for part in bins) == W * T
    for part in bins:
        inside = [float(k) for k, c in zip(kl, top, strict=True) if part.low <= c < part.high]
        assert part.tokens == len(inside)
        assert part.kl == pytest.approx(sum(inside) / len(inside), rel=1e-5)


def test_the_reference_has_no_figures_against_itself() -> None:
    trained = score_arms(stats()[0], "trained")["trained"]
    assert trained.kl is None
    assert trained.change is None
    assert trained.same_top is None
    assert not trained.window_kl
    alone = score_arms(stats()[0], None)["release"]
    assert alone.kl is None
    assert alone.stderr is not None


def test_equal_models_are_equal_without_doubt() -> None:
    found, *_ = stats(distance=0.0)
    score = score_arms(found, "trained")["release"]
    assert score.change is not None
    assert score.change.ratio == 1
    assert score.change.ci95 == pytest.approx((1, 1), abs=0)
    assert score.kl is not None
    assert score.kl.max == 0
    assert score.same_top is not None
    assert score.same_top.mean == 1


def test_one_window_has_no_error() -> None:
    score = score_arms(stats(windows=1)[0], "trained")["release"]
    assert score.stderr is None
    assert score.change is not None
    assert score.change.ci95 is None
    assert score.kl is not None
    assert score.kl.stderr is None


def test_targets_outside_a_vocabulary_are_left_out_of_both_sides_of_a_pair() -> None:
    found, trained, release, targets = stats()
    targets = targets.clone()
    targets[::7] = V - 1
    accumulator = TokenAccumulator(("trained", "release"), "trained", targets)
    accumulator.add(0, {"trained": trained, "release": release[:, : V - 1]})
    found = {arm: join([part], T) for arm, part in accumulator.finish().items()}
    score = score_arms(found, "trained")["release"]
    known = (targets < V - 1).view(W, T).numpy()
    assert score.unscored_tokens == (~known).sum()
    kept = targets.clamp(max=V - 2)
    loss, base = nll(release[:, : V - 1], kept), nll(trained, targets)
    assert score.perplexity == pytest.approx(np.exp(loss[known].mean()), rel=1e-5)
    log = [(loss[w] - base[w])[known[w]].mean() for w in range(W)]
    assert score.change is not None
    assert score.change.ratio == pytest.approx(np.exp(np.mean(log)), rel=1e-5)


def test_not_finite_logits_show_as_not_finite_scores() -> None:
    found, *_ = stats()
    broken = found["release"].nll_R.clone()
    broken[3, 4] = float("nan")
    kl = found["release"].kl_R
    assert kl is not None
    hurt = kl.clone()
    hurt[3, 4] = float("nan")
    fields = {**vars(found["release"]), "nll_R": broken, "kl_R": hurt}
    score = score_arms({**found, "release": TokenStats(**fields)}, "trained")["release"]
    assert math.isnan(score.perplexity)
    assert score.kl is not None
    assert math.isnan(score.kl.mean)
    assert math.isnan(score.kl.p99)


# Two-sided 95 and 99 per cent points as in any printed table.
@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),
    [
        (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (7, 0.95, 2.365),
        (10, 0.95, 2.228), (30, 0.95, 2.042), (63, 0.95, 1.998), (120, 0.95, 1.980),
        (1000, 0.95, 1.962), (100000, 0.95, 1.960), (1, 0.99, 63.657), (10, 0.99, 3.169),
    ],
)  # fmt: skip
def test_student_quantile(freedom: int, confidence: float, expected: float) -> None:
    assert student_quantile(freedom, confidence) == pytest.approx(expected, rel=8e-4, abs=5.1e-4)


def test_percentile_interpolates() -> None:
    values = torch.tensor([0.0, 1.0, 5.0, 7.0], dtype=torch.float64)
    for share in (0, 10, 50, 99, 100):
        expected = np.percentile(values.numpy(), share)
        assert percentile(values, share / 100) == pytest.approx(expected)


@pytest.mark.parametrize("windows", [3, 8, 64])
@pytest.mark.parametrize("tail", ["normal", "heavy"])
def test_the_interval_covers_what_it_says(windows: int, tail: str) -> None:
    """Per-window log-likelihoods share a large part (the text), and differ by a small one."""
    generator = torch.Generator().manual_seed(windows)
    true, runs, covered, narrower = 0.004, 2000, 0, 0
    draw = {"dtype": torch.float64, "generator": generator}
    text = 3.2 + 0.4 * torch.randn(runs, windows, **draw)  # type: ignore[call-overload]
    noise = 0.006 * torch.randn(runs, windows, **draw)  # type: ignore[call-overload]
    if tail == "heavy":
        noise *= 0.5 + torch.rand(runs, windows, **draw)  # type: ignore[call-overload]
    for base, lost in zip(text, noise, strict=True):
        change = paired_change(base + true + lost, base)
        assert change.ci95 is not None
        low, high = change.ci95
        covered += low <= math.exp(true) <= high
        assert change.ratio_stderr is not None
        narrower += change.ratio_stderr < float(base.std()) / math.sqrt(windows)
    assert 0.93 <= covered / runs <= 0.97
    assert narrower / runs > 0.99


def test_a_paired_difference_of_kl_is_tighter_than_two_separate_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.rand(40, generator=generator)
    first, second = 0.01 + 0.02 * shared, 0.012 + 0.02 * shared
    second += 1e-4 * torch.randn(40, generator=generator)
    found = paired_estimate(first, second)
    assert found.mean == pytest.approx(float((first - second).mean()), rel=1e-4)
    assert found.stderr is not None
    assert found.stderr < 5e-5
