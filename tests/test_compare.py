"""Two releases: equal ones are equal, a worse one is caught, other text is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge import cli, demo
from qmerge.compare import compare
from qmerge.errors import CorpusError, InputError, PlanError
from qmerge.evaluate import evaluate
from qmerge.job import Settings
from qmerge.recipe import CompareRecipe, EvaluateRecipe
from qmerge.results import Corpora, RunResult
from qmerge.stages.requantize import Requantizer
from qmerge.walk import Walk
from tests.samples import finished, without_adapter_figures

REPORT = "qmerge_report.json"


def reported(folder: Path, result: RunResult) -> str:
    folder.mkdir(exist_ok=True)
    (folder / REPORT).write_text(json.dumps(result.to_dict()))
    return str(folder)


@pytest.fixture
def old(tmp_path: Path) -> str:
    return reported(tmp_path / "old", finished())


@pytest.fixture
def worse(tmp_path: Path) -> str:
    return reported(tmp_path / "worse", finished(damage=1.0))


def test_equal_releases_are_equal(old: str, tmp_path: Path) -> None:
    again = reported(tmp_path / "again", finished())
    found = compare(CompareRecipe(old=old, new=f"{again}/{REPORT}", max_ppl_increase=0.0))
    assert found.comparison.verdict == "same"
    assert found.passed
    assert [verdict.value for verdict in found.new.gate] == [0.0, 0.0]


def test_a_regression_does_not_pass_and_is_pointed_at(old: str, worse: str) -> None:
    found = compare(CompareRecipe(old=old, new=worse))
    assert found.comparison.verdict == "worse"
    assert found.comparison.layers == ("model.layers.2.mlp.down_proj",)
    assert not found.passed
    assert compare(CompareRecipe(old=worse, new=old)).passed


def test_perplexity_is_limited_against_the_old_release(old: str, worse: str) -> None:
    found = compare(CompareRecipe(old=old, new=worse, max_ppl_increase=0.01))
    scores = {
        name: [
            result.arms["release"][name].perplexity for result in (finished(), finished(damage=1.0))
        ]
        for name in ("plays", "encyclopedia")
    }
    for verdict in found.new.gate:
        before, after = scores[str(verdict.corpus)]
        assert verdict.value == pytest.approx(after / before - 1, rel=1e-6)
        assert not verdict.passed


def test_other_limits_are_those_of_the_new_report(old: str, worse: str) -> None:
    asked = CompareRecipe(old=old, new=old, max_kl=0.05, min_same_top=0.5, min_survival=0.999)
    verdicts = compare(asked).new.gate
    release = finished().arms["release"]
    assert {v.corpus: v.value for v in verdicts if v.limit == "max_kl"} == {
        name: score.kl.mean for name, score in release.items()
    }
    assert [v.passed for v in verdicts if v.limit == "min_survival"] == [False]
    assert not compare(asked).passed


def test_text_that_differs_is_refused_by_its_name(old: str, tmp_path: Path) -> None:
    record = dataclasses.replace(finished().corpora.evaluation["plays"], sha256="9" * 64)
    texts = Corpora(evaluation={**finished().corpora.evaluation, "plays": record})
    new = reported(tmp_path / "new", dataclasses.replace(finished(), corpora=texts))
    with pytest.raises(CorpusError, match="plays"):
        compare(CompareRecipe(old=old, new=new))


def test_an_evaluation_speaks_of_its_only_model(old: str, tmp_path: Path) -> None:
    result = without_adapter_figures(finished())
    alone = dataclasses.replace(
        result, arms={name: result.arms[name] for name in ("trained", "release")}
    )
    found = compare(CompareRecipe(old=old, new=reported(tmp_path / "alone", alone)))
    assert found.comparison.verdict == "same"
    assert found.comparison.corpora["plays"].kl is not None
    with pytest.raises(CorpusError, match="no score"):
        compare(CompareRecipe(old=old, new=reported(tmp_path / "many", result)))


def test_a_model_without_a_report_needs_text(old: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=REPORT) as caught:
        compare(CompareRecipe(old=str(tmp_path), new=old))
    assert "--eval" in str(caught.value.hint)


def test_survival_is_not_scored() -> None:
    with pytest.raises(PlanError, match="--min-survival"):
        compare(CompareRecipe(old="a", new="b", eval=("t.txt",), min_survival=0.9))


@pytest.mark.parametrize("given", [["--eval-windows", "4"], ["--sequence-length", "64"]])
def test_options_of_scoring_are_not_ignored(
    given: list[str], old: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.status(["compare", old, old, *given]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {given[0]}: is for scoring")
    assert "--eval" in told.splitlines()[1]


def test_scoring_names_the_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = CompareRecipe(old="a+b", new="c=d", eval=("t.txt",), eval_windows=7, max_kl=0.1)
    scoring = asked.scoring()
    assert [(m.name, str(m.folder)) for m in scoring.contestants()] == [
        ("old", "a"),
        ("new", "c=d"),
    ]
    assert (scoring.reference, scoring.eval_windows, scoring.max_kl) == ("old", 7, 0.1)


def without(result: RunResult, corpus: str) -> RunResult:
    """The same, never scored on `corpus`."""
    texts = {name: x for name, x in result.corpora.evaluation.items() if name != corpus}
    arms = {
        arm: {name: score for name, score in found.items() if name != corpus}
        for arm, found in result.arms.items()
    }
    return dataclasses.replace(result, corpora=Corpora(evaluation=texts), arms=arms)


def test_a_corpus_that_the_new_release_lacks_fails_by_name(
    old: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, junit = reported(tmp_path / "new", without(finished(), "plays")), tmp_path / "gate.xml"
    assert cli.status(["compare", old, new, "--junit", str(junit)]) == 1
    told = capsys.readouterr().out
    assert told.startswith("The new release was not scored on plays, as the old one was.")
    assert "plays: missing" in told
    assert 'failures="1"' in junit.read_text()
    assert 'name="no regression on plays"' in junit.read_text()
    verdicts = compare(CompareRecipe(old=old, new=new, max_kl=1.0, max_ppl_increase=1.0)).new.gate
    assert {(v.limit, v.corpus): v.passed for v in verdicts} == {
        ("max_ppl_increase", "encyclopedia"): True,
        ("max_kl", "encyclopedia"): True,
        ("max_ppl_increase", "plays"): False,
        ("max_kl", "plays"): False,
    }


def test_a_corpus_that_is_new_is_told_and_its_own_limits_hold(
    old: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = reported(tmp_path / "before", without(finished(), "plays"))
    assert cli.status(["compare", before, old]) == 0
    assert "plays: added, only the new one was scored on it" in capsys.readouterr().out
    asked = CompareRecipe(old=before, new=old, max_kl=0.0, max_ppl_increase=1.0)
    assert {(v.limit, v.corpus): v.passed for v in compare(asked).new.gate} == {
        ("max_ppl_increase", "encyclopedia"): True,
        ("max_kl", "encyclopedia"): False,
        ("max_kl", "plays"): False,
    }


def test_scores_that_are_not_finite_do_not_pass(
    old: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {
        **finished().arms,
        "release": {
            corpus: dataclasses.replace(score, perplexity=math.nan)
            for corpus, score in finished().arms["release"].items()
        },
    }
    broken = reported(tmp_path / "broken", dataclasses.replace(finished(), arms=arms))
    assert cli.status(["compare", old, broken]) == 1
    sentence = "worse than the old one: its scores are not finite on plays, encyclopedia."
    assert sentence in capsys.readouterr().out.splitlines()[0]
    assert cli.status(["compare", broken, old]) == 2
    assert "error: corpus 'plays': the old scores are not finite" in capsys.readouterr().err


# On real models


@pytest.mark.parametrize("short", [["--eval-windows", "1"], ["--sequence-length", "256"]])
def test_one_window_is_refused_before_it_is_scored(
    short: list[str], tiny_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Who's there? " * 40, encoding="utf-8")
    scoring = ["--eval", str(text), "--sequence-length", "64", *short]
    assert cli.status(["compare", str(tiny_original), str(tiny_original), *scoring]) == 2
    assert "one window cannot tell a difference from noise" in capsys.readouterr().err


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a short run on the demo's model, whose layers matter as a trained model's do."""
    texts = tmp_path_factory.mktemp("demo")
    demo.write_texts(texts)
    given = ["--base", demo.BASE, "--adapter", demo.ADAPTER]
    given += ["--calibration", texts / "calibration.txt", "--calibration-samples", 32]
    scoring = ["--eval", texts / "python-code.txt", "--eval-windows", 12, "--sequence-length", 256]
    return list(map(str, [*given, *scoring]))


@pytest.fixture(scope="module")
def release(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "release"
    assert cli.status(["run", *options, "--out", str(out)]) == 0
    return out


def scored(folder: Path) -> Any:
    return json.loads((folder / REPORT).read_text())


def test_one_layer_at_two_bits_is_caught_and_pointed_at(
    options: list[str],
    release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layer, settings_of = Walk.layer, Requantizer._settings_of

    def at_two_bits(self: Requantizer, group: tuple[str, ...]) -> Settings:
        settings = settings_of(self, group)
        return dataclasses.replace(settings, spec=dataclasses.replace(settings.spec, bits=2))

    def hurt(self: Walk, unit: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if unit.index == 1:
                patch.setattr(Requantizer, "_settings_of", at_two_bits)
            layer(self, unit)

    monkeypatch.setattr(Walk, "layer", hurt)
    planted, junit = tmp_path / "planted", tmp_path / "gate.xml"
    bound = 2 * scored(release)["arms"]["release"]["python-code"]["kl"]["mean"]
    limits = ["--max-kl", str(bound), "--junit", str(junit)]
    assert cli.status(["run", *options, "--out", str(planted), *limits]) == 1
    told = capsys.readouterr().out
    assert "does not pass: mean KL on python-code" in told
    assert "Largest error: model.layers.1." in told
    assert 'failures="1"' in junit.read_text()
    assert [verdict["passed"] for verdict in scored(planted)["gate"]] == [False]

    assert cli.status(["compare", str(release), str(planted)]) == 1
    told = capsys.readouterr().out
    assert "worse" in told.splitlines()[0]
    grown = [line.split()[-1] for line in told.splitlines() if "larger error" in line]
    assert len(grown) >= 7
    assert all(name.startswith("model.layers.1.") for name in grown[:7])


def test_names_that_are_there_as_a_whole_are_not_taken_apart(
    tiny_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m+1", "n=2"):
        Path(name).symlink_to(tiny_original)
    Path("a=b.txt").write_text("Who's there? " * 40, encoding="utf-8")
    scoring: dict[str, Any] = {"eval": ("a=b.txt",), "sequence_length": 64}
    result = evaluate(EvaluateRecipe(models=("m+1", "n=2", "x=m+1"), **scoring))
    folders = {name: record.path for name, record in result.inputs.items()}
    assert folders == {"m+1": "m+1", "n": "n=2", "x": "m+1"}
    assert [record.source for record in result.corpora.evaluation.values()] == ["a=b.txt"]
    assert compare(CompareRecipe(old="m+1", new="n=2", **scoring)).comparison.verdict == "same"


def test_checkpoints_are_scored_side_by_side(
    options: list[str],
    release: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    twin, planted = tmp_path / "twin", tmp_path / "planted"
    for folder in (twin, planted):
        shutil.copytree(release, folder)
        (folder / REPORT).unlink()
    _two_bits(planted, "model.layers.1.")
    scoring = options[options.index("--eval") :]
    assert cli.status(["compare", str(release), str(twin), *scoring]) == 0
    assert capsys.readouterr().out.startswith("No difference beyond noise.")
    assert cli.status(["compare", str(release), str(planted), *scoring]) == 1
    assert capsys.readouterr().out.startswith("The new release is worse")
    models = [f"good={release}", f"twin={twin}", f"bad={planted}", "--reference", "good"]
    limits = ["--max-ppl-increase", "0.1%", "--max-kl", "0.001", "--min-same-top", "99%"]
    assert cli.status(["evaluate", *models, *scoring, *limits]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gate")]
    assert told[0] == "gate: 3 of 6 limits hold"
    assert all(" of bad on python-code is " in line for line in told[1:])
    assert cli.status(["evaluate", *models[:2], *models[3:], *scoring, *limits]) == 0


def _two_bits(folder: Path, prefix: str) -> None:
    """Leave the packed codes of one layer only four values: the upper two of their four bits."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, packed in tensors.items():
            if name.startswith(prefix) and name.endswith(".qweight"):
                upper = torch.tensor(0xCCCCCCCC - (1 << 32), dtype=torch.int32)
                tensors[name] = (packed & upper) | 0x22222222
        save_file(tensors, file, metadata={"format": "pt"})
