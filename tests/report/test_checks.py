"""Checks: a name that lasts, and the words of what was found."""

from __future__ import annotations

import dataclasses
import math

from qmerge.measure import Limits, check_limits, compare_results
from qmerge.report.checks import Check, of_comparison, of_result
from qmerge.results import Corpora, RunResult
from tests.samples import finished, without_adapter_figures

LIMITS = Limits(max_ppl_increase=0.05, max_kl=0.05, min_survival=0.5)


def gated(result: RunResult, limits: Limits = LIMITS) -> RunResult:
    return dataclasses.replace(result, gate=check_limits(result, limits))


def test_names_last_from_run_to_run() -> None:
    good, bad = of_result(gated(finished())), of_result(gated(finished(damage=2.0)))
    assert [check.name for check in good.checks] == [check.name for check in bad.checks]
    assert [check.name for check in good.checks] == [
        "scored",
        "perplexity increase on plays",
        "mean KL on plays",
        "perplexity increase on encyclopedia",
        "mean KL on encyclopedia",
        "adapter survival",
    ]
    assert all(check.passed for check in good.checks)
    assert [check.passed for check in bad.checks] == [True, False, False, False, False, True]


def test_names_differ_where_several_models_are_checked() -> None:
    result = gated(without_adapter_figures(finished()), Limits(max_kl=0.05))
    names = [check.name for check in of_result(result).checks]
    assert len(set(names)) == len(names) == 1 + 2 * (len(result.arms) - 1)


def test_a_result_brings_its_words() -> None:
    found = of_result(gated(finished(damage=2.0)))
    assert found.command == "qmerge run"
    assert found.sentence.startswith("The release does not pass")
    assert found.warnings == finished().warnings
    assert "FAILED mean KL on plays" in found.text
    assert "| release |" in found.markdown


def test_scores_that_are_not_finite_are_a_check_that_fails() -> None:
    release = {
        corpus: dataclasses.replace(score, perplexity=math.nan)
        for corpus, score in finished().arms["release"].items()
    }
    broken = dataclasses.replace(finished(), arms={**finished().arms, "release": release})
    (found,) = of_result(gated(broken, Limits())).checks
    assert (found.name, found.passed) == ("scored", False)
    assert found.text == "score on plays is not finite; score on encyclopedia is not finite"


def test_a_comparison_checks_each_text() -> None:
    old, new = finished(), finished(damage=1.0)
    found = of_comparison(compare_results(old, new), gated(new, Limits(min_survival=0.5)))
    assert [check.name for check in found.checks] == [
        "no regression on plays",
        "no regression on encyclopedia",
        "adapter survival",
    ]
    assert [check.passed for check in found.checks] == [False, False, True]
    assert found.sentence == "The new release is worse than the old one."
    assert "larger error: model.layers.2.mlp.down\\_proj" in found.markdown
    assert "gate: 1 of 1 limits hold" in found.text
    assert "16 × 41 tokens" not in found.text


def test_models_that_were_scored_side_by_side_are_in_the_text() -> None:
    scored = dataclasses.replace(
        without_adapter_figures(finished()), reference="trained", subject="release"
    )
    found = of_comparison(compare_results(scored, scored), scored)
    assert found.sentence == "No difference beyond noise."
    assert "16 × 41 tokens" in found.text
    assert "trained (reference)" in found.text


def test_a_text_that_is_missing_fails_and_one_that_is_new_is_told() -> None:
    texts = dict(finished().corpora.evaluation)
    del texts["plays"]
    fewer = dataclasses.replace(finished(), corpora=Corpora(evaluation=texts))
    lost = of_comparison(compare_results(finished(), fewer), fewer)
    assert {check.name: check.passed for check in lost.checks} == {
        "no regression on encyclopedia": True,
        "no regression on plays": False,
    }
    assert "| plays | missing |" in lost.markdown
    more = of_comparison(compare_results(fewer, finished()), finished())
    assert all(check.passed for check in more.checks)
    assert "| plays | added |" in more.markdown


def test_a_verdict_of_other_words_keeps_a_name() -> None:
    (verdict, *_) = gated(finished()).gate
    odd = dataclasses.replace(finished(), gate=(dataclasses.replace(verdict, text="no"),))
    assert of_result(odd).checks[1] == Check(name="max_ppl_increase", passed=True, text="no")
