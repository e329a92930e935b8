from __future__ import annotations

import dataclasses
import json

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
