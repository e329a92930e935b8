"""Settings that would keep more of an adapter: what is tried, and that a run with one gets it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qmerge import demo
from qmerge.gptq import GridSpec
from qmerge.job import Settings
from qmerge.pipeline import run
from qmerge.recipe import Recipe
from qmerge.report import render
from qmerge.results import LayerResult, RunResult, decode, encode
from qmerge.stages.remedies import alternatives

PLAIN = Settings(
    spec=GridSpec(bits=4, group_size=128),
    order="group",
    damping=0.01,
    format="gptq",
    grid="auto",
    unit_survival=True,
    refine=True,
    asymmetric=True,
)


@pytest.mark.parametrize(
    ("settings", "width", "anchorable", "options"),
    [
        (PLAIN, 256, False, ["group:64", "bits:8"]),
        (
            replace(PLAIN, unit_survival=False),
            256,
            False,
            ["--unit-survival", "group:64", "bits:8"],
        ),
        (replace(PLAIN, refine=False), 96, False, ["--refine", "group:32", "bits:8"]),
        (PLAIN, 256, True, ["--grid anchored", "group:64", "bits:8"]),
        (replace(PLAIN, grid="anchored"), 256, True, ["--grid auto", "group:64", "bits:8"]),
        (replace(PLAIN, spec=GridSpec(bits=2, group_size=32)), 256, False, ["bits:4", "bits:8"]),
        (replace(PLAIN, spec=GridSpec(bits=8, group_size=-1)), 96, False, ["group:32"]),
        (replace(PLAIN, spec=GridSpec(bits=8, group_size=-1)), 100, False, []),
    ],
)
def test_what_is_tried(settings: Any, width: int, anchorable: bool, options: list[str]) -> None:
    asked: list[Settings] = []

    def solve(other: Settings) -> float:
        asked.append(other)
        return 0.5

    found = alternatives(settings, (64, width), anchorable=anchorable, solve=solve)
    assert [each.option for each in found] == options
    assert all((each.extra_bytes == 0) == each.option.startswith("--") for each in found)
    for each in found:
        each.solve()
        key, _, value = each.option.partition(":")
        changed = {"group": {"group_size": value}, "bits": {"bits": value}}.get(key, {})
        spec = replace(settings.spec, **{name: int(number) for name, number in changed.items()})
        assert asked.pop().spec == spec


@pytest.fixture(scope="module")
def weak_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunResult]:
    """Little of the demo's adapter, and nothing pushed out: the base's own grid rounds it off."""
    texts = tmp_path_factory.mktemp("weak")
    demo.write_texts(texts)
    recipe = Recipe(
        base=demo.BASE,
        adapter=(f"{demo.ADAPTER}@0.03",),
        out=texts / "release",
        calibration=str(texts / "calibration.txt"),
        calibration_samples=8,
        eval=(str(texts / "python-code.txt"),),
        eval_windows=2,
        sequence_length=128,
        unit_survival=False,
        objective="symmetric",
    )
    return recipe, run(recipe)


def lowest(layer: LayerResult, where: tuple[str, ...]) -> float:
    found = [x.survival.survival for x in layer.linears if x.name in where and x.survival]
    return min(kept for kept in found if kept is not None)


def test_a_remedy_is_what_a_run_with_it_gets(
    weak_run: tuple[Recipe, RunResult], tmp_path: Path
) -> None:
    recipe, result = weak_run
    first = result.layers[0]
    remedy = next(found for found in first.remedies if found.where[0].endswith("q_proj"))
    assert remedy.option == "--unit-survival"
    assert lowest(first, remedy.where) < 0.9
    assert decode(LayerResult, encode(first), where="journal") == first
    again = run(replace(recipe, out=tmp_path / "again", unit_survival=True))
    # Nothing before the first linears differs, so they see the very same text.
    assert lowest(again.layers[0], remedy.where) == pytest.approx(remedy.survival, abs=1e-5)
    assert not any(layer.remedies for layer in again.layers)
    assert not any("survival" in warning for warning in again.warnings)

    told = [warning for warning in result.warnings if "adapter survival" in warning]
    assert len(told) == 1
    assert "--unit-survival would bring" in told[0]
    (found,) = (each for each in result.remedies if each.option == "--unit-survival")
    weak = {
        x.name
        for layer in result.layers
        for x in layer.linears
        if x.survival and x.survival.survival is not None and x.survival.survival < 0.9
    }
    assert weak <= {name for each in result.remedies for name in each.where}
    for form in ("text", "md", "html"):
        assert "unit" in render(result, form)
    assert f"Would help: {found.option} ({len(found.where)} linears" in render(result, "text")
