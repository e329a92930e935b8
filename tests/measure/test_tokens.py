"""TokenAccumulator against sums over full logits in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qmerge.measure.tokens import TokenAccumulator, TokenStats, join

R, V = 37, 501


def direct(reference_RV: Tensor, logits_RV: Tensor) -> Tensor:
    p, q = reference_RV.double().log_softmax(1), logits_RV.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def accumulate(
    logits: dict[str, Tensor], reference: str | None, targets_R: Tensor, widths: list[int]
) -> dict[str, TokenStats]:
    accumulator = TokenAccumulator(tuple(logits), reference, targets_R)
    first = 0
    for width in widths:
        part = {arm: values[:, first : first + width] for arm, values in logits.items()}
        part = {arm: values for arm, values in part.items() if values.shape[1]}
        if part:
            accumulator.add(first, part)
        first += width
    return accumulator.finish()


def problem(seed: int = 0, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(R, V, generator=generator) * scale
    return logits, torch.randint(0, V, (R,), generator=generator)


@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-4, 1e-2, 0.3, 5.0, 60.0])
@pytest.mark.parametrize("offset", [0.0, 7.0, -300.0])
def test_kl_equals_the_direct_sum(distance: float, offset: float) -> None:
    trained, targets = problem()
    generator = torch.Generator().manual_seed(1)
    release = trained + offset + distance * torch.randn(R, V, generator=generator)
    found = accumulate({"trained": trained, "release": release}, "trained", targets, [100] * 6)
    expected = direct(trained, release)
    kl = found["release"].kl_R
    assert kl is not None
    torch.testing.assert_close(kl, expected.clamp(min=0), atol=1e-11, rtol=1e-11)
    nll = -release.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found["release"].nll_R, nll, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(found["release"].probability_R, (-nll).exp(), atol=1e-12, rtol=1e-9)
    top = release.double().softmax(1).amax(1)
    torch.testing.assert_close(found["release"].confidence_R, top, atol=1e-12, rtol=1e-9)
    same = found["release"].same_top_R
    assert same is not None
    assert torch.equal(same, trained.argmax(1) == release.argmax(1))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_slices_of_any_width_and_order_agree(widths: list[int], random: object) -> None:
    trained, targets = problem(2)
    release = trained + 0.1 * problem(3)[0]
    logits = {"trained": trained, "release": release}
    whole = accumulate(logits, "trained", targets, [V])["release"]
    bounds = [0]
    for width in widths:
        bounds.append(min(V, bounds[-1] + width))
    bounds.append(V)
    spans = [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
    random.shuffle(spans)  # type: ignore[attr-defined]
    accumulator = TokenAccumulator(("trained", "release"), "trained", targets)
    for start, stop in spans:
        accumulator.add(start, {arm: values[:, start:stop] for arm, values in logits.items()})
    sliced = accumulator.finish()["release"]
    for name in ("nll_R", "probability_R", "confidence_R", "kl_R"):
        torch.testing.assert_close(
            getattr(sliced, name), getattr(whole, name), atol=1e-11, rtol=1e-9
        )
    assert torch.equal(sliced.same_top_R, whole.same_top_R)  # type: ignore[arg-type]


@pytest.mark.parametrize("grown", ["trained", "release"])
@pytest.mark.parametrize("width", [1, 64, V])
def test_grown_vocabularies_compare_over_the_tokens_both_have(grown: str, width: int) -> None:
    shared = V - 9
    full, targets = problem(4)
    near = full + 0.2 * problem(5)[0]
    full[:, shared:] += 6.0  # the new tokens are often the likeliest
    logits = {"trained": full, "release": near[:, :shared]}
    if grown == "release":
        near[:, shared:] += 6.0
        logits = {"trained": full[:, :shared], "release": near}
    targets[:3] = V - 1
    steps = [width] * (V // width + 1)
    found = accumulate(logits, "trained", targets, steps)
    release = found["release"]
    expected = direct(full[:, :shared], near[:, :shared])
    torch.testing.assert_close(release.kl_R, expected, atol=1e-11, rtol=1e-9)
    same = full[:, :shared].argmax(1) == near[:, :shared].argmax(1)
    assert torch.equal(release.same_top_R, same)  # type: ignore[arg-type]
    for arm, values in logits.items():
        known = targets < values.shape[1]
        assert torch.equal(found[arm].scored_R, known)
        nll = (
            -values.double()
            .log_softmax(1)
            .gather(1, targets.clamp(max=values.shape[1] - 1)[:, None])
        )
        torch.testing.assert_close(found[arm].nll_R[known], nll[known, 0], atol=1e-10, rtol=1e-9)
        assert found[arm].nll_R[~known].isnan().all()


def test_rows_are_worked_in_blocks_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, targets = problem(6)
    release = trained + problem(7)[0]
    logits = {"trained": trained, "release": release}
    whole = accumulate(logits, "trained", targets, [V])["release"].kl_R
    monkeypatch.setattr("qmerge.measure.tokens.BLOCK", {"cpu": 4 * V, "cuda": 1})
    torch.testing.assert_close(accumulate(logits, "trained", targets, [V])["release"].kl_R, whole)


def test_one_model_alone_has_its_likelihood_in_fp32() -> None:
    logits, targets = problem(8)
    found = accumulate({"a": logits}, None, targets, [77] * 7)["a"]
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(found.nll_R.double(), expected, atol=3e-6, rtol=1e-6)
    assert found.kl_R is None
    assert found.same_top_R is None


def test_half_precision_logits_are_taken_as_they_are() -> None:
    trained, targets = problem(9)
    half = {"trained": trained.bfloat16(), "release": (trained + 0.5).bfloat16()}
    found = accumulate(half, "trained", targets, [V])["release"].kl_R
    torch.testing.assert_close(
        found, direct(half["trained"], half["release"]), atol=1e-11, rtol=1e-9
    )


def test_a_broken_token_disturbs_no_other() -> None:
    trained, targets = problem(10)
    release = trained + 0.1
    release[5, 17] = float("nan")
    release[6, 18] = float("inf")
    found = accumulate({"trained": trained, "release": release}, "trained", targets, [50] * 11)
    broken = found["release"].nll_R.isnan()
    assert broken.nonzero().flatten().tolist() == [5, 6]
    assert found["release"].scored_R.all()
    kl = found["release"].kl_R
    assert kl is not None
    assert kl.isnan().nonzero().flatten().tolist() == [5, 6]


def test_join_makes_windows_in_order() -> None:
    trained, targets = problem(11)
    parts = []
    for rows in (slice(0, 12), slice(12, 24), slice(24, 36)):
        logits = {"a": trained[rows], "b": trained[rows] + problem(12)[0][rows]}
        parts.append(accumulate(logits, "a", targets[rows], [V])["b"])
    joined = join(parts, 6)
    assert joined.nll_R.shape == (6, 6)
    assert joined.kl_R is not None
    assert joined.same_top_R is not None
    assert joined.same_top_R.dtype == torch.bool
    torch.testing.assert_close(joined.nll_R[2].double(), parts[1].nll_R[:6], atol=1e-5, rtol=1e-6)
