"""Overrides on names alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from qmerge.gptq import GridSpec
from qmerge.grids import beside, grids, opened_by, serving_notes, torn
from qmerge.job import Faults
from qmerge.model.skeleton import Skeleton, build_skeleton
from qmerge.recipe import OutputFormat, Recipe
from tests import checkpoints

SPEC = GridSpec(bits=4, group_size=32)


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


ASKED = Recipe(base=Path("base"), out=Path("out"))
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LINEAR = tuple(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a"))


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    return build_skeleton(checkpoints.qwen3(num_hidden_layers=1).config)


def names(group: tuple[str, ...], *but: str) -> frozenset[str]:
    return frozenset(f"model.layers.0.{name}" for name in group if not name.endswith(but))


def test_what_the_base_left_dense_is_told_and_no_fault(skeleton: Skeleton) -> None:
    targets, siblings = names(ATTENTION, "k_proj"), frozenset({ATTENTION})
    assert not torn(ASKED, skeleton, dict.fromkeys(targets, SPEC), siblings, targets)
    (note,) = beside(skeleton, targets, siblings)
    assert "quantized: k_proj;" in note
    assert not beside(skeleton, names(ATTENTION), siblings)
    assert not beside(skeleton, frozenset(), siblings)


@pytest.mark.parametrize("but", [("k_proj",), ("k_proj", "v_proj")])
def test_an_override_may_not_skip_one_of_several_that_servers_fuse(
    skeleton: Skeleton, but: tuple[str, ...]
) -> None:
    specs = dict.fromkeys(names(ATTENTION, *but), SPEC)
    (fault,) = torn(ASKED, skeleton, specs, frozenset({ATTENTION}), names(ATTENTION))
    assert "which servers fuse, different grids" in fault.message


def test_what_reads_the_same_and_is_served_apart_may_differ(skeleton: Skeleton) -> None:
    targets, siblings = names(LINEAR), frozenset({LINEAR})
    specs = dict.fromkeys(names(LINEAR, "_a", "_b"), SPEC)
    assert not torn(ASKED, skeleton, specs, siblings, targets)
    assert not beside(skeleton, names(LINEAR, "_a", "_b"), siblings)
    del specs["model.layers.0.linear_attn.in_proj_z"]
    assert len(torn(ASKED, skeleton, specs, siblings, targets)) == 1


GPT = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
ODD: dict[str, dict[str, Any]] = {
    "GPT2": GPT,  # linears that lie as [I, O]
    "GPTBigCode": GPT,  # begins by filling `c_proj.weight`
    "Falcon": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    ("form", "program"), [("gptq", "gptqmodel"), ("compressed-tensors", "vLLM")]
)
def test_linears_that_transformers_has_no_packed_ones_for(
    name: str, form: OutputFormat, program: str
) -> None:
    odd = build_skeleton(getattr(transformers, f"{name}Config")(**ODD[name], vocab_size=64))
    specs = dict.fromkeys(odd.linears(), SPEC)
    (note,) = serving_notes(form, odd, specs)
    assert "transformers does not open packed linears of this model" in note
    assert f"open this one with {program}" in note
    assert opened_by(form, odd, specs) == program
    assert ("--format gptq" in note) is (form == "compressed-tensors")
    assert "--format compressed-tensors" not in note


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_plain_release_is_opened_by_transformers(form: OutputFormat, skeleton: Skeleton) -> None:
    specs = dict.fromkeys(skeleton.linears(), SPEC)
    assert not serving_notes(form, skeleton, specs)
    assert opened_by(form, skeleton, specs) == "transformers"
    specs[skeleton.head()] = SPEC
    assert opened_by("gptq", skeleton, specs) == "gptqmodel"
