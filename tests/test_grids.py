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
    targets = frozenset({"a.x", "b.x", "c.x"})
    found = grids(recipe, targets, spec, faults, head="lm_head", tied=False)
    assert found == {"a.x": GridSpec(bits=8, group_size=32)}
    assert not faults.found


def test_a_head_is_quantized_only_under_its_own_name() -> None:
    recipe = Recipe(base=Path("b"), out=Path("o"), override=("*=group:64", "lm_head=bits:8"))
    faults, spec, targets = Faults(), GridSpec(bits=4, group_size=32), frozenset({"a.x"})
    found = grids(recipe, targets, spec, faults, head="lm_head", tied=False)
    assert found["lm_head"] == GridSpec(bits=8, group_size=32)
    assert not faults.found
    grids(recipe, targets, spec, faults, head="lm_head", tied=True)
    assert [fault.message for fault in faults.found] == [
        "lm_head is the embedding under a second name, which stays in 16 bits"
    ]
