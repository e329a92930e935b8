from __future__ import annotations

import dataclasses

import pytest

from qmerge.errors import RecipeError
from qmerge.measure.gate import Limits, check_limits, parse_limit
from tests.samples import finished, without_adapter_figures


@pytest.mark.parametrize(
    ("text", "value"), [("1%", 0.01), ("0.01", 0.01), (" 95 %", 0.95), ("0", 0.0), ("0.05", 0.05)]
)
def test_limits_are_shares_or_per_cent(text: str, value: float) -> None:
    assert parse_limit(text, option="--max-kl") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "one", "-1%", "nan", "inf"])
def test_a_limit_that_is_no_number_names_its_option(text: str) -> None:
    with pytest.raises(RecipeError, match="--max-kl"):
        parse_limit(text, option="--max-kl")


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


def test_what_was_not_measured_does_not_pass() -> None:
    limits = Limits(max_ppl_increase=0.5, max_kl=1.0, min_survival=0.0, min_same_top=0.0)
    for result in (
        without_adapter_figures(finished()),
        dataclasses.replace(finished(), arms={}, survival=None),
    ):
        verdicts = check_limits(result, limits)
        assert len(verdicts) == 4
        assert not any(v.passed for v in verdicts)
        assert all("not measured" in v.text for v in verdicts)
