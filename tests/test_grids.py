"""Overrides on names alone."""

from __future__ import annotations

from pathlib import Path

from qmerge.gptq import GridSpec
from qmerge.grids import grids
from qmerge.job import Faults
from qmerge.recipe import Recipe


def test_later_overrides_win_over_a_skip_too() -> None:
    recipe = Recipe(base=Path("b"), out=Path("o"), override=("*=skip", "a.*=bits:8", "b.x=skip"))
    faults, spec = Faults(), GridSpec(bits=4, group_size=32)
    found = grids(recipe, frozenset({"a.x", "b.x", "c.x"}), spec, faults)
    assert found == {"a.x": GridSpec(bits=8, group_size=32)}
    assert not faults.found
