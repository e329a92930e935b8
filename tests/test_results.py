from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from qmerge.errors import InputError
from qmerge.results import SCHEMA_VERSION, ArmScore, Change, LayerResult, RunResult, decode, encode
from tests.samples import finished, without_adapter_figures


def written(result: RunResult) -> dict[str, Any]:
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("result", [finished(), without_adapter_figures(finished())])
def test_a_result_reads_back_equal(result: RunResult) -> None:
    assert RunResult.from_dict(written(result)) == result


def test_the_keys_that_readers_rely_on() -> None:
    found = written(finished())
    top = {
        "schema_version", "qmerge_version", "recipe", "strategy", "corpora", "arms", "change",
        "survival", "layers", "timings", "peak_rss_bytes",
    }  # fmt: skip
    assert top <= set(found)
    assert {"chosen", "why", "candidates"} <= set(found["strategy"])
    assert {"calibration", "evaluation"} <= set(found["corpora"])
    text = found["corpora"]["evaluation"]["plays"]
    assert {"source", "tokens", "sha256", "role"} <= set(text)
    score = found["arms"]["release"]["plays"]
    assert {"perplexity", "stderr", "tokens", "kl", "same_top"} <= set(score)
    assert {"mean", "stderr", "median", "p90", "p95", "p99", "p999", "max"} == set(score["kl"])
    assert {"ratio", "ratio_stderr", "difference", "ci95"} <= set(found["change"]["plays"])
    assert {"survival", "noise", "step_ratio", "codes_changed"} <= set(found["survival"])
    assert found["schema_version"] == SCHEMA_VERSION


def test_what_is_not_finite_is_null_and_reads_back_as_nan() -> None:
    score = ArmScore(perplexity=math.inf, tokens=2, stderr=math.nan, window_nll=(1.0, math.nan))
    data = encode(score)
    assert data["perplexity"] is None
    assert data["stderr"] is None
    read = decode(ArmScore, data, where="score")
    assert math.isnan(read.perplexity)
    assert read.stderr is None
    assert math.isnan(read.window_nll[1])


def test_records_of_a_journal_read_back_alone() -> None:
    layer = finished().layers[1]
    assert decode(LayerResult, json.loads(json.dumps(encode(layer))), where="layer") == layer


def test_later_keys_are_ignored() -> None:
    data = written(finished())
    data["invented_later"] = {"x": 1}
    data["arms"]["release"]["plays"]["invented_later"] = 2
    assert RunResult.from_dict(data) == finished()


@pytest.mark.parametrize("data", [None, [], "text", {}, {"schema_version": "1"}])
def test_something_else_is_no_report(data: object) -> None:
    with pytest.raises(InputError, match=r"here\.json is not a qmerge report"):
        RunResult.from_dict(data, source="here.json")


def test_a_later_schema_is_refused() -> None:
    with pytest.raises(InputError, match="schema_version"):
        RunResult.from_dict({"schema_version": SCHEMA_VERSION + 1})


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("arms",), [], "r.arms"),
        (("arms", "release", "plays", "perplexity"), "low", "r.arms.release.plays.perplexity"),
        (("arms", "release", "plays", "tokens"), 1.5, "r.arms.release.plays.tokens"),
        (("layers", 0, "linears", 0, "name"), 3, r"r.layers\[0\].linears\[0\].name"),
        (("peak_rss_bytes",), True, "r.peak_rss_bytes"),
        (("survival",), 0.9, "r.survival"),
    ],
)
def test_damage_is_named(path: tuple[Any, ...], value: object, named: str) -> None:
    data = copy.deepcopy(written(finished()))
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=named):
        RunResult.from_dict(data, source="r")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match="'difference' is missing"):
        decode(Change, {"ratio": 1.0}, where="change")
