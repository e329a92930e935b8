"""A walk over every kind that the installed PEFT knows: merged as PEFT merges it, or refused."""

from __future__ import annotations

import copy
import json
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from qmerge.adapters import inject, open_adapter
from qmerge.adapters.kinds import kind_refusal, refusal
from qmerge.errors import AdapterError
from tests.adapters import tiny

LITTLE, FAR = 0.03, 0.06
"""Change of a base, and the change of an update, both relative, that is more than in proportion."""
LINEARS = ["q_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 4},
    "BEFT": {"target_modules": ["q_proj"]},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {},
    "HIRA": {},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {},
    "LOKR": {},
    "LORA": {},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8, "r": 0},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {},
    "PVERA": {},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "UNILORA": {},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "r": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
LEFT_OUT: dict[str, dict[str, Any]] = {
    "PVERA": {"save_projection": False},
    "RANDLORA": {"r": 4, "save_projection": False},
    "SUPERTUNING": {"save_precomputed_indices": False},
    "TINYLORA": {"save_projection": False},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "r": 2, "save_only_topk_weights": True},
    "VERA": {"r": 4, "save_projection": False},
}
"""Kinds that may save less than all of what they are, which PEFT then makes again."""
REFUSED = {
    "ADAMSS",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "LILY",
    "MULTITASK_PROMPT_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "SHADOW",
    "XLORA",
}


def test_every_kind_of_peft_is_known_here() -> None:
    kinds = {kind.value: kind_refusal(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert {kind for kind, reason in kinds.items() if reason} == REFUSED
    assert {kind for kind, reason in kinds.items() if not reason} == set(OPTIONS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [*OPTIONS.items(), *LEFT_OUT.items()],
    ids=[*OPTIONS, *map("slim {}".format, LEFT_OUT)],
)
def test_kind_equals_merge_and_unload(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    biased: Any = {"attention_bias": True}
    base = tiny.model(**biased)
    made = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{"target_modules": LINEARS, **options})
    folder = tiny.train(base, made, tmp_path)
    want = tiny.reference(base, folder)
    injection = tiny.injected(folder, **biased)
    assert injection.faults == ()
    assert tiny.differing(tiny.merged(injection, base), want) == set()
    assert injection.touched >= tiny.differing(base.state_dict(), want)
    assert open_adapter(folder).bound_to_base is (moved(base, folder, want) > FAR)


def moved(base: Any, folder: Path, merged: dict[str, torch.Tensor]) -> float:
    """How far an adapter's update is another one on a base that differs a little."""
    near = copy.deepcopy(base)
    torch.manual_seed(3)
    for parameter in near.parameters():
        parameter.data += torch.randn_like(parameter) * parameter.std() * LITTLE
    there, was, now = tiny.reference(near, folder), base.state_dict(), near.state_dict()
    pairs = [(merged[name] - was[name], there[name] - now[name]) for name in was if name in there]
    return max(float((a - b).norm() / a.norm()) for a, b in pairs if a.any())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = LoraConfig(target_modules=["q_proj"])
    return tiny.train(tiny.model(), options, tmp_path_factory.mktemp("plain"))


def edited(adapter: Path, folder: Path, **values: Any) -> Path:
    """A copy of an adapter with other options in its configuration."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_cannot_be_weights_is_refused_by_name(kind: str, plain: Path, tmp_path: Path) -> None:
    folder = edited(plain, tmp_path, peft_type=kind)
    adapter = open_adapter(folder)
    assert adapter.refusal == kind_refusal(kind)
    with pytest.raises(AdapterError, match=f"a {kind} adapter cannot be merged: ") as raised:
        inject(tiny.skeleton(), adapter)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 1}),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("init_lora_weights", "corda"),
        ("use_qalora", True),
    ],
)
def test_lora_that_cannot_be_weights_is_refused(
    option: str, value: Any, plain: Path, tmp_path: Path
) -> None:
    folder = edited(plain, tmp_path, **{option: value})
    assert option in str(open_adapter(folder).refusal)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_starts_that_change_the_base_under_parameters(
    start: str, plain: Path, tmp_path: Path
) -> None:
    options = {"init_lora_weights": start, "target_parameters": ["mlp.down_proj.weight"]}
    refused = open_adapter(edited(plain, tmp_path, **options)).refusal
    assert "target_parameters" in str(refused)
    kept = {**options, "init_lora_weights": True}
    assert open_adapter(edited(plain, tmp_path, **kept)).refusal is None


def test_unknown_kind_is_refused_by_name() -> None:
    assert "does not know" in str(refusal({"peft_type": "SOMETHING_NEW"}))


def test_projections_that_need_every_layer_are_refused() -> None:
    assert refusal({"peft_type": "FROD", "save_projection": True}) is None
    assert "all layers" in str(refusal({"peft_type": "FROD", "save_projection": False}))


STARTS: dict[Any, tuple[bool, bool]] = {
    True: (False, False),
    False: (False, False),
    "gaussian": (False, False),
    "orthogonal": (False, False),
    "mica": (False, False),
    "eva": (False, False),
    "pissa": (False, True),
    "pissa_niter_[number of iters]": (False, True),
    "olora": (False, True),
    "loftq": (True, False),
    "lora_ga": (True, False),
    "corda": (False, False),
}
"""Every start: whether the original would be wrong, and whether a base in few bits would be."""


def test_every_start_of_peft_is_known_here() -> None:
    """`lora_ga` is missing from PEFT's own annotation, and stands in the help of its options."""
    annotation = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    named = next(part for part in typing.get_args(annotation) if part is not bool)
    assert set(typing.get_args(named)) | {True, False, "lora_ga"} == set(STARTS)


@pytest.mark.parametrize("start", STARTS)
def test_starts_that_changed_the_base(start: Any, plain: Path, tmp_path: Path) -> None:
    folder = edited(
        plain, tmp_path, init_lora_weights=start, loftq_config={"loftq_bits": 4, "loftq_iter": 1}
    )
    adapter = open_adapter(folder)
    assert (adapter.bound_to_base, adapter.misfit is not None) == STARTS[start]
    changed = any(STARTS[start]) or start == "corda"
    assert (adapter.base_reason is not None) is changed
    assert (adapter.refusal is not None) is (start == "corda")


def test_a_start_that_nobody_knows_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = edited(plain, tmp_path, init_lora_weights="nova")
    assert "'nova': a start that is not known" in str(open_adapter(folder).refusal)


def test_a_kind_that_keeps_weights_of_its_base_is_bound_to_it(plain: Path, tmp_path: Path) -> None:
    assert open_adapter(edited(plain, tmp_path, peft_type="OSF")).bound_to_base
