"""What was asked: defaults, names and roles, contradictions, and the way to disk and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmerge.documents import split_column
from qmerge.errors import RecipeError
from qmerge.options import build, options
from qmerge.recipe import EvaluateRecipe, Recipe
from qmerge.specs import Contestant

PATHS = {"base": "b", "adapter": "a", "out": "o"}


def recipe(**flags: object) -> Recipe:
    return build(Recipe, PATHS | flags)


def test_defaults() -> None:
    asked = recipe()
    assert (asked.base, asked.adapter, asked.out) == (Path("b"), ("a",), Path("o"))
    assert (asked.bits, asked.group_size, asked.symmetric) == (None, None, None)
    assert (asked.strategy, asked.act_order, asked.format) == ("dequantize", "group", None)
    assert (asked.calibration, asked.calibration_samples) == (None, 128)
    assert (asked.eval, asked.eval_windows, asked.sequence_length) == ((), 256, None)
    assert asked.faults() == ()


def test_what_is_missing_is_named_at_once() -> None:
    with pytest.raises(RecipeError, match="missing: --base, --out"):
        build(Recipe, {"adapter": "a"})


def test_every_option_is_documented() -> None:
    for each in (*options(Recipe), *options(EvaluateRecipe)):
        assert each.help.endswith("."), each.name
        assert each.default is not None or each.unset, f"{each.name}: what does None mean?"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        (["texts/wiki.txt"], [("wiki", "texts/wiki.txt", "in_domain")]),
        (
            ["chat.jsonl:messages", "wiki=w.parquet:text"],
            [
                ("chat", "chat.jsonl:messages", "in_domain"),
                ("wiki", "w.parquet:text", "general"),
            ],
        ),
        (
            ["wiki.txt", "in_domain=own.txt"],
            [("wiki", "wiki.txt", "general"), ("in_domain", "own.txt", "in_domain")],
        ),
        (
            ["general=wiki.txt", "own.txt"],
            [("general", "wiki.txt", "general"), ("own", "own.txt", "in_domain")],
        ),
        (["general=wiki.txt"], [("general", "wiki.txt", "general")]),
        (["a/b.jsonl:column"], [("b", "a/b.jsonl:column", "in_domain")]),
        (["pydoc-eval"], [("pydoc-eval", "pydoc-eval", "in_domain")]),
        (
            ["hub:Org/wikitext@main/raw/test:text", "dir/a=b.txt"],
            [
                ("wikitext", "hub:Org/wikitext@main/raw/test:text", "in_domain"),
                ("a=b", "dir/a=b.txt", "general"),
            ],
        ),
    ],
)
def test_names_and_roles_of_evaluation_texts(
    given: list[str], expected: list[tuple[str, str, str]]
) -> None:
    texts = recipe(eval=given).eval_texts()
    assert [(text.name, text.spec, text.role) for text in texts] == expected


def test_equal_names_are_a_fault() -> None:
    (fault,) = recipe(eval=["a/text.txt", "b/text.txt"]).faults()
    assert fault.where == "--eval"
    assert "'text'" in fault.message
    assert "NAME=" in (fault.hint or "")


def test_all_contradictions_are_listed_together() -> None:
    assert len(recipe(override=["q_proj=loud"], eval=["t.txt", "t.txt"]).faults()) == 2


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("models/base", Contestant(name="base", folder=Path("models/base"), adapter=None)),
        ("m/base/", Contestant(name="base", folder=Path("m/base"), adapter=None)),
        (
            "m/base+out/ada",
            Contestant(name="base+ada", folder=Path("m/base"), adapter=Path("out/ada")),
        ),
        ("tuned=m/b+a", Contestant(name="tuned", folder=Path("m/b"), adapter=Path("a"))),
        ("c+", Contestant(name="c+", folder=Path("c+"), adapter=None)),
    ],
)
def test_contestants(spec: str, expected: Contestant) -> None:
    assert EvaluateRecipe(models=(spec,)).contestants() == (expected,)


def test_a_folder_with_signs_in_its_name_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run+1/base").mkdir(parents=True)
    expected = Contestant(name="base", folder=Path("run+1/base"), adapter=None)
    assert EvaluateRecipe(models=("run+1/base",)).contestants() == (expected,)


def test_evaluate_wants_distinct_names_and_a_reference_among_them() -> None:
    asked = EvaluateRecipe(models=("x/base", "y/base"), reference="trained")
    assert [fault.where for fault in asked.faults()] == ["checkpoints", "--reference"]
    assert all(fault.hint for fault in asked.faults())


def test_the_file_makes_the_same_recipe_again(tmp_path: Path) -> None:
    asked = recipe(
        original="16",
        symmetric=False,
        bits=8,
        eval=["a=x.txt", "y.txt"],
        memory="2GiB",
        damping=0.1,
    )
    file = tmp_path / "qmerge_recipe.yaml"
    file.write_text(asked.to_yaml(), encoding="utf-8")
    assert build(Recipe, {}, file=file) == asked
    assert build(Recipe, {"out": "new"}, file=file) == replace(asked, out=Path("new"))


def test_how_to_run_is_not_part_of_the_file() -> None:
    assert recipe(restart=True).to_yaml() == recipe().to_yaml()


@settings(max_examples=30)  # YAML is slow
@given(
    base=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1)
    .filter(str.strip)
    .filter(lambda text: not text.startswith("~")),
    seed=st.integers(0, 2**40),
    damping=st.floats(1e-9, 0.999),
)
def test_any_recipe_survives_the_way_to_disk(
    tmp_path_factory: pytest.TempPathFactory, base: str, seed: int, damping: float
) -> None:
    asked = recipe(base=base, seed=seed, damping=damping)
    file = tmp_path_factory.getbasetemp() / "again.yaml"
    file.write_text(asked.to_yaml(), encoding="utf-8")
    assert build(Recipe, {}, file=file) == asked


def test_a_home_folder_is_one_wherever_a_path_may_stand() -> None:
    home = Path.home()
    given = [
        each.folder for each in recipe(adapter=["~/a", "~/a@0.5", "~nobody-at-all/a@1"]).adapters()
    ]
    assert given == [home / "a", home / "a", Path("~nobody-at-all/a")]
    (found,) = EvaluateRecipe(models=("new=~/base+~/a",)).contestants()
    assert (found.folder, found.adapter) == (home / "base", home / "a")
    assert split_column("~/t.jsonl") == (home / "t.jsonl", None)
    assert split_column("~/t.jsonl:text") == (home / "t.jsonl", "text")


@pytest.mark.parametrize("increase", [0.01, 1.0, 1.1, 1.5, 3.07])
def test_a_limit_survives_the_way_to_disk(tmp_path: Path, increase: float) -> None:
    asked = recipe(max_ppl_increase=f"{100 * increase:.6g}%")
    assert asked.max_ppl_increase == pytest.approx(increase)
    file = tmp_path / "again.yaml"
    file.write_text(asked.to_yaml(), encoding="utf-8")
    assert build(Recipe, {}, file=file) == asked


@pytest.mark.parametrize(
    ("text", "bits", "group_size", "skip"),
    [
        ("*.down_proj=bits:8", 8, None, False),
        ("*.down_proj=group:32", None, 32, False),
        ("re:.*=x=bits:3,group:-1", 3, -1, False),
        ("*=skip", None, None, True),
    ],
)
def test_overrides(text: str, bits: int | None, group_size: int | None, skip: bool) -> None:
    (found,) = Recipe(base=Path("b"), out=Path("o"), override=(text,)).overrides()
    assert found.pattern == text.rpartition("=")[0]
    assert (found.bits, found.group_size, found.skip) == (bits, group_size, skip)


@pytest.mark.parametrize(
    "text",
    ["*.down_proj", "x=", "x=bits:5", "x=bits:8;group:32", "x=bits:8group:32", "x=,group:32"],
)
def test_an_override_that_says_nothing_is_a_fault(text: str) -> None:
    (fault,) = Recipe(base=Path("b"), out=Path("o"), override=(text,)).faults()
    assert fault.where == "--override"
    assert text in fault.message
    assert "bits:8,group:32" in fault.hint
