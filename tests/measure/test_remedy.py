"""The cheapest remedy is one that was tried, and is told in words that can be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from qmerge.measure.remedy import (
    Alternative,
    cheapest,
    is_weak,
    patterns,
    pooled,
    survival_warning,
)
from qmerge.names import matches
from qmerge.recipe import Recipe
from qmerge.results import Remedy, Survival


def kept(share: float, energy: float = 1.0) -> Survival:
    return Survival(survival=share, noise=0.1, energy=energy, elements=10, update_rms=1.0, step=1.0)


class Tried(list[str]):
    """Alternatives that note when they are solved."""

    def alternative(self, option: str, extra: int, survival: float | None) -> Alternative:
        def solve() -> float | None:
            self.append(option)
            return survival

        return Alternative(option=option, extra_bytes=extra, solve=solve)


def test_alternatives_are_solved_from_the_cheapest_until_one_is_enough() -> None:
    tried = Tried()
    found = cheapest(
        ("q", "k"),
        [
            tried.alternative("bits:8", 400, 0.99),
            tried.alternative("--grid anchored", 0, 0.7),
            tried.alternative("group:32", 30, 0.9),
        ],
    )
    assert tried == ["--grid anchored", "group:32"]
    assert found == Remedy(option="group:32", where=("q", "k"), survival=0.9, extra_bytes=30)


def test_where_nothing_is_enough_there_is_no_remedy() -> None:
    tried = Tried()
    assert (
        cheapest(("q",), [tried.alternative("a", 0, 0.2), tried.alternative("b", 1, None)]) is None
    )
    assert tried == ["a", "b"]
    assert cheapest(("q",), []) is None


def test_remedies_of_one_setting_are_one_option() -> None:
    anchored, wide = pooled(
        [
            Remedy(option="bits:8", where=("m.0.q", "m.0.k"), survival=0.95, extra_bytes=100),
            Remedy(option="--grid anchored", where=("m.0.v",), survival=0.97),
            Remedy(option="bits:8", where=("m.2.q", "m.2.k"), survival=0.93, extra_bytes=100),
        ]
    )
    assert (anchored.option, anchored.where) == ("--grid anchored", ("m.0.v",))
    assert wide.option == r"--override 're:m\.(0|2)\.(q|k)=bits:8'"
    assert (len(wide.where), wide.survival, wide.extra_bytes) == (4, 0.93, 200)


MODULES = [f"m.layers.{i}.{part}" for i in range(12) for part in ("attn.q", "attn.k", "mlp.up")]


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["m.layers.3.attn.q"], 1),
        (["m.layers.1.mlp.up", "m.layers.10.mlp.up", "m.layers.11.mlp.up"], 1),
        (["m.layers.1.attn.q", "m.layers.1.attn.k", "m.layers.2.mlp.up"], 2),
        (MODULES, 1),
        (["lm_head", "m.layers.0.attn.q"], 2),
    ],
)
def test_patterns_fit_what_they_stand_for_and_nothing_else(names: list[str], count: int) -> None:
    found = patterns(names)
    assert len(found) == count
    everything = [*MODULES, "lm_head"]
    fitting = [name for name in everything if any(matches(each, name) for each in found)]
    assert sorted(fitting) == sorted(names)


def test_what_is_told_can_be_pasted() -> None:
    names = ("m.layers.0.attn.q", "m.layers.2.attn.q", "lm_head")
    (found,) = pooled([Remedy(option="bits:8", where=names, survival=0.95, extra_bytes=1)])
    words = shlex.split(found.option)
    assert words[::2] == ["--override", "--override"]
    recipe = Recipe(base=Path("b"), out=Path("o"), override=tuple(words[1::2]))
    assert [each.bits for each in recipe.overrides()] == [8, 8]
    fitting = [
        n for n in (*MODULES, "lm_head") if any(matches(o.pattern, n) for o in recipe.overrides())
    ]
    assert sorted(fitting) == sorted(names)


def test_the_warning_counts_names_the_worst_and_says_what_helps() -> None:
    linears = {"a": kept(0.95, 9.0), "b": kept(0.5), "c": kept(0.6), "d": None}
    helps = Remedy(option="--override 'b=bits:8'", where=("b",), survival=0.991, extra_bytes=1)
    text = survival_warning(linears, [helps])
    assert text is not None
    assert "2 of 4 linears" in text
    assert "0.500 in b, 0.877 in the model" in text
    assert "--override 'b=bits:8' would bring 1 of them to 0.991" in text
    assert "for 1 of them nothing" in text
    assert survival_warning({"a": kept(0.9), "d": None, "e": Survival()}, []) is None


def test_no_adapter_is_not_a_weak_one() -> None:
    assert not is_weak(None)
    assert not is_weak(Survival())
    assert not is_weak(kept(0.9))
    assert is_weak(kept(0.899))
