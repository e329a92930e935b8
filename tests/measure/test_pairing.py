from __future__ import annotations

import dataclasses
import json
import math

import pytest

from qmerge.errors import CorpusError
from qmerge.measure.pairing import compare_results, pair
from qmerge.results import Corpora, RunResult
from tests.samples import finished


def test_a_pair_from_stored_windows_equals_the_pair_while_scoring() -> None:
    result = finished()
    scores = {arm: found["plays"] for arm, found in result.arms.items()}
    direct, stored = scores["release"].change, pair(scores["trained"], scores["release"])
    assert direct is not None
    assert stored.ratio == pytest.approx(direct.ratio, rel=1e-7)
    assert stored.ratio_stderr == pytest.approx(direct.ratio_stderr, rel=1e-4)
    assert stored.ci95 == pytest.approx(direct.ci95, rel=1e-6)


def test_a_release_equals_itself() -> None:
    read = RunResult.from_dict(json.loads(json.dumps(finished().to_dict())))
    found = compare_results(finished(), read)
    assert found.verdict == "same"
    assert found.layers == ()
    for corpus in found.corpora.values():
        assert corpus.change.ratio == 1
        assert corpus.kl is not None
        assert corpus.kl.mean == 0


def test_a_planted_regression_is_worse_and_pointed_at() -> None:
    found = compare_results(finished(), finished(damage=1.0))
    assert found.verdict == "worse"
    assert found.layers == ("model.layers.2.mlp.down_proj",)
    back = compare_results(finished(damage=1.0), finished())
    assert back.verdict == "better"
    assert back.layers == ()


def test_worse_on_one_corpus_is_worse() -> None:
    old, bad = finished(), finished(damage=1.0)
    release = {
        "plays": old.arms["release"]["plays"],
        "encyclopedia": bad.arms["release"]["encyclopedia"],
    }
    new = dataclasses.replace(old, arms={**old.arms, "release": release})
    found = compare_results(old, new)
    assert found.verdict == "worse"
    assert {name: corpus.verdict for name, corpus in found.corpora.items()} == {
        "plays": "same",
        "encyclopedia": "worse",
    }


def test_other_tokens_are_refused() -> None:
    old = finished()
    record = dataclasses.replace(old.corpora.evaluation["plays"], sha256="9" * 64)
    new = dataclasses.replace(
        old, corpora=Corpora(evaluation={**old.corpora.evaluation, "plays": record})
    )
    with pytest.raises(CorpusError, match="plays"):
        compare_results(old, new)
    with pytest.raises(CorpusError, match="no corpus in common"):
        compare_results(old, dataclasses.replace(old, corpora=Corpora()))


def test_kl_is_not_compared_across_different_references() -> None:
    old = finished()
    plays = old.arms["trained"]["plays"]
    moved = dataclasses.replace(plays, window_nll=tuple(x + 0.1 for x in plays.window_nll))
    arms = {**old.arms, "trained": {**old.arms["trained"], "plays": moved}}
    found = compare_results(old, dataclasses.replace(old, arms=arms))
    assert found.corpora["plays"].kl is None
    assert found.corpora["encyclopedia"].kl is not None


def with_scores(result: RunResult, **changes: object) -> RunResult:
    """The release's scores on plays, changed."""
    release = result.arms["release"]
    changed = {**release, "plays": dataclasses.replace(release["plays"], **changes)}  # type: ignore[arg-type]
    return dataclasses.replace(result, arms={**result.arms, "release": changed})


def broken() -> RunResult:
    """As a report reads back whose release gave no numbers on plays."""
    score = finished().arms["release"]["plays"]
    assert score.kl is not None
    assert score.change is not None
    lost = with_scores(
        finished(),
        perplexity=math.nan,
        window_nll=(math.nan,) * len(score.window_nll),
        window_kl=(math.nan,) * len(score.window_kl),
        kl=dataclasses.replace(score.kl, mean=math.nan),
        change=dataclasses.replace(score.change, ratio=math.nan),
    )
    return RunResult.from_dict(json.loads(json.dumps(lost.to_dict())))


def test_scores_that_are_not_finite_are_worse() -> None:
    found = compare_results(finished(), broken())
    assert found.verdict == "worse"
    assert [(c.verdict, c.finite) for c in found.corpora.values()] == [
        ("worse", False),
        ("same", True),
    ]


@pytest.mark.parametrize("figure", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["window_nll", "window_kl"])
def test_one_window_that_is_not_finite_is_worse(which: str, figure: float) -> None:
    windows = getattr(finished().arms["release"]["plays"], which)
    found = compare_results(finished(), with_scores(finished(), **{which: (figure, *windows[1:])}))
    assert found.verdict == "worse"
    assert not found.corpora["plays"].finite


def test_nothing_compares_with_scores_that_are_not_finite() -> None:
    for new in (finished(), broken()):
        with pytest.raises(CorpusError, match="'plays': the old scores are not finite"):
            compare_results(broken(), new)


def test_windows_without_a_token_that_both_can_score_are_left_out() -> None:
    score = finished().arms["release"]["plays"]
    short = with_scores(
        finished(), unscored_tokens=40, window_nll=(math.nan, *score.window_nll[1:])
    )
    assert compare_results(short, short).verdict == "same"


def test_one_window_tells_nothing_from_noise() -> None:
    arms = {
        arm: {
            corpus: dataclasses.replace(
                score, window_nll=score.window_nll[:1], window_kl=score.window_kl[:1]
            )
            for corpus, score in found.items()
        }
        for arm, found in finished(damage=1.0).arms.items()
    }
    result = dataclasses.replace(finished(), arms=arms)
    with pytest.raises(CorpusError, match="one window cannot tell") as caught:
        compare_results(result, result)
    assert "--sequence-length" in str(caught.value.hint)


def test_a_corpus_of_one_side_is_named() -> None:
    texts = dict(finished().corpora.evaluation)
    del texts["plays"]
    fewer = dataclasses.replace(finished(), corpora=Corpora(evaluation=texts))
    lost = compare_results(finished(), fewer)
    assert (lost.verdict, lost.missing, lost.added) == ("incomplete", ("plays",), ())
    more = compare_results(fewer, finished())
    assert (more.verdict, more.missing, more.added) == ("same", (), ("plays",))
    hurt = dataclasses.replace(finished(damage=1.0), corpora=Corpora(evaluation=texts))
    assert compare_results(finished(), hurt).verdict == "worse"
