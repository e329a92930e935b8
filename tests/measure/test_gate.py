from __future__ import annotations

import dataclasses
import math

import pytest

from qmerge.measure.gate import Limits, check_limits
from qmerge.results import ArmScore, MergeCheck, Survival
from tests.samples import finished, without_adapter_figures


def test_every_limit_is_checked_on_every_corpus() -> None:
    result = finished()
    limits = Limits(max_ppl_increase=0.5, max_kl=1.0, min_survival=0.5, min_same_top=0.5)
    verdicts = check_limits(result, limits)
    assert [(v.limit, v.corpus) for v in verdicts] == [
        *[(name, corpus) for corpus in ("plays", "encyclopedia")
          for name in ("max_ppl_increase", "max_kl", "min_same_top")],
        ("min_survival", None),
    ]  # fmt: skip
    assert all(v.passed for v in verdicts)
    assert check_limits(result, Limits()) == ()


def test_a_limit_falls_on_one_corpus_alone() -> None:
    result = finished()
    values = {v.corpus: v.value for v in check_limits(result, Limits(max_kl=1.0))}
    low, high = sorted(value for value in values.values() if value is not None)
    verdicts = check_limits(result, Limits(max_kl=(low + high) / 2))
    fallen = [v for v in verdicts if not v.passed]
    assert len(fallen) == 1
    assert fallen[0].value == high
    assert "over the limit" in fallen[0].text
    assert str(fallen[0].corpus) in fallen[0].text


def test_a_planted_regression_is_caught() -> None:
    limits = Limits(max_ppl_increase=0.05, max_kl=0.05)
    assert all(v.passed for v in check_limits(finished(), limits))
    assert not any(v.passed for v in check_limits(finished(damage=2.0), limits))


def test_an_increase_is_that_of_the_paired_ratio() -> None:
    result = finished()
    verdict = check_limits(result, Limits(max_ppl_increase=0.0))[0]
    change = result.change["plays"]
    assert verdict.value == pytest.approx(change.ratio - 1)


def test_every_model_but_the_reference_is_checked_where_no_one_is_the_subject() -> None:
    result = without_adapter_figures(finished())
    verdicts = check_limits(result, Limits(max_kl=0.05))
    named = [arm for arm in result.arms if arm != "trained"]
    assert [v.text.partition(" is ")[0] for v in verdicts] == [
        f"mean KL of {arm} on {corpus}" for arm in named for corpus in ("plays", "encyclopedia")
    ]
    for verdict, (arm, corpus) in zip(
        verdicts, ((a, c) for a in named for c in ("plays", "encyclopedia")), strict=True
    ):
        assert verdict.value == result.arms[arm][corpus].kl.mean
        assert verdict.passed == (verdict.value <= 0.05)


def test_what_was_not_measured_does_not_pass() -> None:
    limits = Limits(max_ppl_increase=0.5, max_kl=1.0, min_survival=0.0, min_same_top=0.0)
    alone = {arm: {c: _bare(s) for c, s in found.items()} for arm, found in finished().arms.items()}
    for arms, count in ((alone, 7), ({}, 4)):
        verdicts = check_limits(dataclasses.replace(finished(), arms=arms, survival=None), limits)
        assert len(verdicts) == count
        assert not any(v.passed for v in verdicts)
        assert all("not measured" in v.text for v in verdicts)


def test_what_is_no_number_does_not_pass() -> None:
    score = finished().arms["release"]["plays"]
    assert score.kl is not None
    broken = dataclasses.replace(score, kl=dataclasses.replace(score.kl, mean=math.nan))
    result = dataclasses.replace(finished(), arms={"release": {"plays": broken}})
    limit, own = check_limits(result, Limits(max_kl=1.0))
    assert not limit.passed
    assert check_limits(result, Limits()) == (own,)


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_scores_that_are_not_finite_fail_without_any_limit(figure: float) -> None:
    result = finished()
    score = result.arms["release"]["plays"]
    broken = dataclasses.replace(score, perplexity=figure)
    arms = {**result.arms, "release": {**result.arms["release"], "plays": broken}}
    (verdict,) = check_limits(dataclasses.replace(result, arms=arms), Limits())
    assert not verdict.passed
    assert verdict.text == "score on plays is not finite"
    several = without_adapter_figures(dataclasses.replace(result, arms=arms))
    assert [v.text for v in check_limits(several, Limits())] == [
        "score of release on plays is not finite"
    ]
    others = dataclasses.replace(result, arms={**arms, "release": result.arms["release"]})
    assert check_limits(others, Limits()) == ()


def _bare(score: ArmScore) -> ArmScore:
    return dataclasses.replace(score, change=None, kl=None, same_top=None)


def test_survival_of_several_models_is_each_one_s_own() -> None:
    kept = {"old": Survival(survival=0.95), "new": Survival(survival=0.5), "other": None}
    verdicts = check_limits(finished(), Limits(min_survival=0.9), kept)
    assert [verdict.passed for verdict in verdicts] == [True, False, False]
    assert verdicts[1].text == "adapter survival of new is 0.5, under the limit of 0.9"


@pytest.mark.parametrize("worst", [0.02, math.nan])
def test_a_merge_that_is_not_the_trained_model_fails_without_any_limit(worst: float) -> None:
    check = MergeCheck(
        tokens=64, dtype="bfloat16", rounding=2**-8, worst=0.001, where="model.layers.1", logits=0.0
    )
    result = dataclasses.replace(finished(), merge=check)
    assert check_limits(result, Limits()) == ()
    moved = dataclasses.replace(result, merge=dataclasses.replace(check, worst=worst))
    (verdict,) = check_limits(moved, Limits())
    assert not verdict.passed
    assert "model.layers.1" in verdict.text
