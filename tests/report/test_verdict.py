from __future__ import annotations

import dataclasses
import html
import math
from pathlib import Path

import pytest
import torch

from qmerge.formats.base import FormatSummary
from qmerge.measure import Limits, check_limits
from qmerge.report import render, render_card
from qmerge.report.checks import of_result
from qmerge.report.figures import STATISTICS, change_cell, duration, rows, size, statistics
from qmerge.report.glossary import OF_LINEARS, OTHER_STRATEGY, WORDS, legend, words
from qmerge.report.lines import findings, loud, weakest
from qmerge.report.verdict import gain_kept, verdict
from qmerge.results import ArmScore, Change, Remedy, RunResult, Survival
from qmerge.training import decide
from tests.samples import finished, quantized, without_adapter_figures

DENSE = FormatSummary(method="none", checkpoint_format="bfloat16", dtype=torch.bfloat16)


def with_release(result: RunResult, **changes: object) -> RunResult:
    release = {
        name: dataclasses.replace(score, **changes)  # type: ignore[arg-type]
        for name, score in result.arms["release"].items()
    }
    return dataclasses.replace(result, arms={**result.arms, "release": release})


def changed(ratio: float, low: float, high: float) -> Change:
    return Change(ratio=ratio, ratio_stderr=0.001, difference=0.1, ci95=(low, high))


KEPT = Survival(survival=0.98, noise=0.01, elements=1, energy=1.0)


def test_a_good_verdict_says_where_another_text_is_hurt() -> None:
    good = with_release(finished(), change=changed(1.002, 1.001, 1.003))
    assert verdict(good).tone == "good"
    release = dict(good.arms["release"])
    worse = changed(1.03, 1.02, 1.04)
    release["encyclopedia"] = dataclasses.replace(release["encyclopedia"], change=worse)
    found = verdict(dataclasses.replace(good, arms={**good.arms, "release": release}))
    assert found.tone == "fair"
    assert "as good as what you trained on plays only: on plays" in found.sentence
    assert "on encyclopedia perplexity +3.00" in found.sentence


@pytest.mark.parametrize(
    ("change", "survival", "tone", "opinion"),
    [
        (changed(1.002, 1.001, 1.003), 0.98, "good", "is as good as what you trained"),
        (changed(1.04, 0.99, 1.09), 0.98, "good", "within noise"),
        (changed(1.03, 1.02, 1.04), 0.98, "fair", "is somewhat worse than what you trained"),
        (changed(1.002, 1.001, 1.003), 0.8, "fair", "adapter survival 0.80"),
        (changed(1.3, 1.2, 1.4), 0.98, "poor", "lost much of what you trained"),
        (changed(0.98, 0.97, 0.99), 0.98, "good", "-2.00"),
    ],
)
def test_the_verdict_follows_its_figures(
    change: Change, survival: float, tone: str, opinion: str
) -> None:
    result = with_release(finished(), change=change)
    result = dataclasses.replace(result, survival=dataclasses.replace(KEPT, survival=survival))
    found = verdict(result)
    assert found.tone == tone
    assert opinion in found.sentence


def test_a_fallen_limit_is_the_verdict() -> None:
    result = finished()
    gate = check_limits(result, Limits(max_kl=1e-9, min_same_top=0.0))
    found = verdict(dataclasses.replace(result, gate=gate))
    assert found.tone == "poor"
    assert "does not pass: mean KL" in found.sentence
    assert "and 1 more" in found.sentence


def test_a_broken_release_is_called_so() -> None:
    nan = changed(math.nan, math.nan, math.nan)
    found = verdict(with_release(finished(), change=nan, perplexity=math.nan))
    assert found.tone == "poor"
    assert "not finite" in found.sentence


def test_without_a_subject_the_nearest_or_the_lowest_is_named() -> None:
    evaluated = without_adapter_figures(finished())
    assert "Nearest to trained on plays: merged" in verdict(evaluated).sentence
    plain = {
        arm: {
            name: ArmScore(perplexity=score.perplexity, tokens=1) for name, score in scores.items()
        }
        for arm, scores in evaluated.arms.items()
    }
    alone = dataclasses.replace(evaluated, reference=None, arms=plain)
    assert "Lowest perplexity on plays" in verdict(alone).sentence
    broken = ArmScore(perplexity=math.nan, tokens=1)
    beside = dataclasses.replace(alone, arms={"broken": dict.fromkeys(["plays"], broken), **plain})
    assert verdict(beside).sentence == verdict(alone).sentence
    assert verdict(dataclasses.replace(alone, arms={})).sentence == "Nothing was scored."


def test_gain_kept_is_a_share_of_log_likelihood() -> None:
    result = finished()
    scores = {arm: found["plays"] for arm, found in result.arms.items()}
    base, trained, release = (
        math.log(scores[arm].perplexity) for arm in ("quantized_base", "trained", "release")
    )
    assert gain_kept(result, "plays") == pytest.approx((base - release) / (base - trained))
    without = {arm: found for arm, found in result.arms.items() if arm != "quantized_base"}
    assert gain_kept(dataclasses.replace(result, arms=without), "plays") is None


def test_rows_say_what_merged_must_be() -> None:
    notes = {row.arm: row.note for row in rows(finished(), "plays")}
    assert notes["merged"] == "equals trained"
    result = finished()
    wrong = {**result.arms, "merged": result.arms["original"]}
    notes = {row.arm: row.note for row in rows(dataclasses.replace(result, arms=wrong), "plays")}
    assert notes["merged"] == "differs from trained"
    assert list(notes)[-1] == "noise_floor"


def test_a_dense_base_is_not_called_quantized() -> None:
    result = finished()
    assert "`quantized base` the base that training ran on" in legend(result)
    base = dataclasses.replace(result.inputs["base"], format="dense")
    plain = dataclasses.replace(result, inputs={**result.inputs, "base": base})
    assert "`base` the base as it is stored, without adapter" in legend(plain)
    for form in ("text", "md", "html"):
        assert "quantized base" in render(result, form)
        assert "quantized base" not in render(plain, form)
    simulated = dataclasses.replace(base, format="nf4 simulated, block 64")
    quantized = dataclasses.replace(result, inputs={**result.inputs, "base": simulated})
    assert legend(quantized) == legend(result)


def test_a_doubt_about_the_reference_stands_right_below_the_verdict() -> None:
    (doubt,) = decide(None, DENSE, (Path("adapter"),)).notes
    result = dataclasses.replace(finished(), warnings=(*finished().warnings, doubt))
    for form in ("text", "md", "html"):
        text = " ".join(html.unescape(render(result, form)).split())
        told = text.index(verdict(result).sentence)
        assert told < text.index("this is not what you trained") < text.index("Would help")
        assert text.count("this is not what you trained") == 1
        assert text.index("this is not what you trained") < text.index("calibration and plays")
    assert "this is not the model that was trained" in render_card(result)
    assert "this is not what you trained" in of_result(result).markdown


def test_the_words_are_told_where_they_are_used() -> None:
    result = finished()
    told = words(result, linears=False)
    assert {"±", "KL", "noise", "update of a step", "codes changed"} <= told.keys()
    assert OTHER_STRATEGY not in told  # there was one strategy
    assert "error" not in told
    assert words(result, linears=True).keys() - told.keys() == set(OF_LINEARS)
    assert words(quantized(), linears=False).keys() == {"±", "change", "KL", "same top token"}
    for form in ("md", "html"):
        text = " ".join(html.unescape(render(result, form)).split())
        assert all(meaning in text for meaning in told.values())


def test_the_words_are_the_readme_s() -> None:
    readme = Path(__file__).resolve().parents[2] / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines()
    for word, meaning in WORDS.items():
        assert f"| **{word}** | {meaning} |" in lines


def test_the_layer_that_hurts_is_pointed_at() -> None:
    assert loud(finished()) == []
    hurt = loud(finished(damage=1.0))
    assert [linear.name for linear, _ in hurt] == ["model.layers.2.mlp.down_proj"]
    weak = weakest(finished())
    assert weak is not None
    assert weak.name == "model.layers.1.self_attn.v_proj"
    lines = " ".join(findings(finished(damage=1.0)))
    assert "model.layers.2.mlp.down_proj" in lines
    assert "model.layers.1.self_attn.v_proj" in lines
    assert "--bits 8" in lines


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(1.0026, "+0.26"), (0.5, "-50.00"), (1.0, "0.00"), (0.9999999, "0.00"), (12.0, "+1100.0")],
)
def test_changes_are_signed(ratio: float, shown: str) -> None:
    assert change_cell(Change(ratio=ratio, difference=0.0)).value == shown


def test_sizes_and_times() -> None:
    assert [size(n) for n in (5, 2048, 3 << 20, 5 << 40)] == [
        "5 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
    assert [duration(s) for s in (0.5, 75, 4000)] == ["0.5 s", "1 min 15 s", "1 h 06 min"]


@pytest.mark.parametrize(
    ("change", "kl", "told"),
    [
        (changed(1.05, 1.04, 1.06), 0.001, "; on encyclopedia perplexity +5.00 ± 0.10%, KL 0.001."),
        (changed(1.05, 0.99, 1.11), 0.001, None),
        (changed(1.0, 0.99, 1.01), 0.2, "; on encyclopedia perplexity 0.00 ± 0.10% (within noise)"),
    ],
)
def test_another_text_is_in_the_verdict_where_it_is_hurt(
    change: Change, kl: float, told: str | None
) -> None:
    result = with_release(finished(), change=changed(1.0, 0.99, 1.01))
    score = result.arms["release"]["encyclopedia"]
    assert score.kl is not None
    score = dataclasses.replace(score, change=change, kl=dataclasses.replace(score.kl, mean=kl))
    scores = {**result.arms["release"], "encyclopedia": score}
    sentence = verdict(
        dataclasses.replace(result, arms={**result.arms, "release": scores})
    ).sentence
    assert told in sentence if told else "encyclopedia" not in sentence


def test_every_figure_of_an_arm_is_told() -> None:
    result = finished()
    found = {row.arm: row for row in statistics(result, "plays")}
    assert set(found) == {*result.arms, "noise_floor"} - {"trained"}
    score = result.arms["previous"]["plays"]
    assert score.kl is not None
    assert score.change is not None
    values = dict(zip(STATISTICS, found["previous"].values, strict=True))
    assert float(values["KL median"]) == pytest.approx(score.kl.median, rel=1e-2)
    assert float(values["99.9%"]) == pytest.approx(score.kl.p999, rel=1e-2)
    assert values["difference"].startswith(f"{score.change.difference:.3f} ± ")
    page = render(result, "html")
    assert all(value in page for value in values.values())


def test_the_legend_speaks_of_the_arms_that_there_are() -> None:
    result = finished()
    assert "`previous`" in legend(result)
    arms = {name: result.arms[name] for name in ("trained", "release")}
    told = legend(dataclasses.replace(result, arms=arms))
    assert "`previous`" not in told
    assert "`trained`" in told
    assert "strategy" not in told
    assert "strategy" in legend(
        dataclasses.replace(result, arms={**arms, "release_substitute": arms["release"]})
    )
    assert legend(without_adapter_figures(result)) == ""


def test_options_are_told_as_code_to_paste() -> None:
    option = r"--override 're:m\.layers\.(0|1)\.<q>=bits:8'"
    remedy = Remedy(option=option, where=("a", "b"), survival=0.95, extra_bytes=2048)
    warning = f"adapter survival is under 0.9: {option} would bring it to 0.95"
    result = dataclasses.replace(finished(), remedies=(remedy,), warnings=(warning,))
    assert render(result, "md").count(f"`{option}`") == 2
    page = render(result, "html")
    assert (
        page.count(f'<code class="option">{html.escape(option)}</code>'.replace("&#x27;", "&#39;"))
        == 2
    )
    assert any(option in line for line in render(result, "text").splitlines())
