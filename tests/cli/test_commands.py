"""Commands parse, call and print: data to stdout, all else to stderr. The calls are stand-ins."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qmerge import cli
from qmerge.cli.demo import FOLDER, MARK, make_room
from qmerge.errors import Fault, RecipeError, StorageError
from qmerge.options import options
from qmerge.progress import Progress
from qmerge.recipe import EvaluateRecipe, Recipe
from qmerge.results import GateVerdict

GIVEN = ["--base", "b", "--adapter", "a", "--out", "o"]


class Calls:
    """What the stand-ins were given, and the faults that the plan will find."""

    recipe: Any = None
    gate: tuple[GateVerdict, ...] = ()
    faults: tuple[Fault, ...] = ()
    summary: Any = None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()

    def conduct(recipe: Any, progress: Progress | None = None) -> Any:
        seen.recipe = recipe
        print("a library's banner")
        if progress is not None:
            progress.stage("walk", 2)
            progress.step("layer 0")
        return seen

    def stand_in(name: str, **attributes: Any) -> None:
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    stand_in("qmerge.pipeline", run=conduct)
    stand_in("qmerge.plan", make_plan=conduct)
    stand_in("qmerge.evaluate", evaluate=conduct)
    stand_in("qmerge.report", render=lambda _, form: f"table as {form}\n")
    stand_in("qmerge.report.plan", render=lambda _: "plan as text")
    return seen


def test_run(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.status(["run", *GIVEN, "--eval", "x.txt", "--eval", "n=y.txt", "--asym"]) == 0
    told = capsys.readouterr()
    assert told.out == "table as text\n"
    assert "a library's banner" in told.err
    assert "layer 0" in told.err
    assert calls.recipe == Recipe(
        base=Path("b"),
        adapter=("a",),
        out=Path("o"),
        eval=("x.txt", "n=y.txt"),
        symmetric=False,
    )


def test_flags_win_over_the_recipe_file(calls: Calls, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("base: b\nadapter: a\nout: o\nbits: 8\nsymmetric: false\neval: [x.txt]\n")
    assert cli.status(["run", str(file), "--bits", "3"]) == 0
    assert (calls.recipe.bits, calls.recipe.symmetric) == (3, False)
    assert calls.recipe.eval == ("x.txt",)
    assert cli.status(["run", str(file), "--sym", "--eval", "y.txt"]) == 0
    assert (calls.recipe.symmetric, calls.recipe.eval) == (True, ("y.txt",))


def test_every_field_is_a_flag(calls: Calls) -> None:
    words = {"": [], "X": ["0.5"], "X|X%": ["1%"], "SIZE": ["1GiB"], "DEVICE": ["cpu"]}
    for each in options(Recipe):
        flag = each.flag.split("/")[0]
        choices = each.kind.metavar.split("|")
        value = words.get(each.kind.metavar, [choices[0].strip("N") or "7"])
        assert cli.status(["run", *GIVEN, flag, *value]) == 0, flag
        assert getattr(calls.recipe, each.name) is not None


def test_json_is_for_programs(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.status(["run", *GIVEN, "--json"]) == 0
    assert capsys.readouterr().out == "table as json\n"


def test_plan_tells_faults_by_its_exit_code(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.status(["plan", *GIVEN]) == 0
    assert capsys.readouterr().out == "plan as text\n"
    calls.faults = (Fault(where="--out", message="exists"),)
    assert cli.status(["plan", *GIVEN, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) is None


def test_evaluate(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.status(["evaluate", "b", "t=b+a", "--reference", "t"]) == 0
    assert calls.recipe == EvaluateRecipe(models=("b", "t=b+a"), reference="t")
    assert capsys.readouterr().out == "table as text\n"


def test_quantize(calls: Calls) -> None:
    assert cli.status(["quantize", "dense", "o", "--bits", "3"]) == 0
    assert calls.recipe == Recipe(base=Path("dense"), out=Path("o"), bits=3)


def test_a_recipe_may_say_that_there_is_no_adapter(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    asked = Recipe(base=Path("dense"), out=Path("o"))
    file.write_text(asked.to_yaml())
    assert cli.status(["run", str(file)]) == 0
    assert calls.recipe == asked
    capsys.readouterr()
    file.write_text("base: dense\nout: o\n")
    assert cli.status(["run", str(file)]) == 2
    assert capsys.readouterr().err.startswith("error: missing: --adapter")


@pytest.mark.parametrize("option", [["--min-survival", "0.9"], ["--no-unit-survival"]])
def test_quantize_has_no_options_of_adapters(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.status(["quantize", "dense", "o", *option]) == 2
    assert "No such option" in capsys.readouterr().err


def test_merge_says_which_argument_is_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.status(["merge", "base", "adapter"]) == 2
    told = capsys.readouterr().err
    assert "error: missing: ADAPTER or OUT: the last argument is the output folder" in told


@pytest.mark.parametrize("command", [["evaluate", "a", "b"], ["compare", "a", "b"]])
def test_what_scores_plans_for_no_memory(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.status([*command, "--memory", "2GiB"]) == 2
    assert "No such option" in capsys.readouterr().err


def test_limits_are_kept_against_another_checkpoint() -> None:
    asked = EvaluateRecipe(models=("b", "a"), reference="b", max_kl=0.1)
    assert asked.faults() == ()
    for alone in (replace(asked, reference=None), replace(asked, models=("b",))):
        assert [fault.where for fault in alone.faults()] == ["--max-kl"]
    assert EvaluateRecipe(models=("b",), min_survival=0.9).faults() == ()


def test_inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"is": "adapter", "group_size": None, "targets": ["q", "v"], "sym": True, "n": {"a": 1}}
    module = ModuleType("qmerge.inspect")
    vars(module)["inspect"] = lambda folder: {"folder": str(folder), **facts}
    monkeypatch.setitem(sys.modules, "qmerge.inspect", module)
    assert cli.status(["inspect", "f"]) == 0
    assert capsys.readouterr().out == (
        "folder   f\nis       adapter\ntargets  q, v\nsym      yes\nn        a 1\n"
    )
    assert cli.status(["inspect", "f", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": "f", **facts}


def test_the_demo_replaces_only_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_room(FOLDER)
    (FOLDER / "release").mkdir()
    make_room(FOLDER)
    assert [file.name for file in FOLDER.iterdir()] == [MARK]
    (FOLDER / MARK).unlink()
    with pytest.raises(RecipeError, match="was not made by qmerge demo"):
        make_room(FOLDER)
    FOLDER.rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MARK).touch()
    FOLDER.symlink_to("elsewhere")
    with pytest.raises(RecipeError, match="was not made by qmerge demo"):
        make_room(FOLDER)


def test_a_place_that_the_demo_cannot_write_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        make_room(tmp_path / "file" / FOLDER)
