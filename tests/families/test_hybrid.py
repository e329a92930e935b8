"""Layers with a state in place of attention: their linears are quantized, their states are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from qmerge.formats.gptq import pack_gptq
from qmerge.pipeline import run
from qmerge.storage.checkpoint import Checkpoint
from qmerge.verify import verify
from tests import checkpoints
from tests.families import rig
from tests.families.test_dense import HEAD, SMALL
from tests.test_matrix import packed, rounded

LINEAR = {
    **HEAD,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MIXED = ["q_proj", "o_proj", "in_proj", "gate_proj", "down_proj"]
"""PEFT refuses `out_proj` of what it takes for a Mamba."""
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "Qwen3Next": (
        {**SMALL, **LINEAR, "num_experts": 0},
        "linear_attn.in_proj_qkvz",
        "linear_attn.conv1d.weight",
    ),
    "Qwen3_5Text": ({**SMALL, **LINEAR}, "linear_attn.in_proj_qkv", "linear_attn.A_log"),
    "Lfm2": (
        {**SMALL, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
        "conv.in_proj",
        "conv.conv.weight",
    ),
    "FalconH1": (
        {**SMALL, **MAMBA, "mamba_d_ssm": 128},
        "mamba.in_proj",
        "mamba.conv1d.weight",
    ),
    "Bamba": ({**SMALL, **MAMBA, "attn_layer_indices": [1]}, "mamba.in_proj", "mamba.dt_bias"),
}
"""Settings, a linear that is quantized, and a parameter that is not."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "Qwen3Next" else pytest.mark.slow) for n in FAMILIES]
)
def test_every_arm_equals_transformers_and_peft(name: str, eval_text: Path, tmp_path: Path) -> None:
    settings, packed, kept = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = tmp_path / "tokenizer"
    checkpoints.write_tokenizer(tokenizer)
    original, base, adapter, out = (tmp_path / p for p in ("original", "nf4", "adapter", "release"))
    rig.write_model(original, model, tokenizer)
    targets = MIXED if "mamba" in kept else "all-linear"
    rig.write_adapter(adapter, model.float(), target_modules=targets)
    rig.write_nf4(original, base, AutoModelForCausalLM)
    result = run(rig.recipe(base, adapter, out, eval_text))
    release = rig.reopened(out, tmp_path / "decoded", AutoModelForCausalLM)
    quantized = rig.dense(base, AutoModelForCausalLM)
    rig.check_arms(result, quantized, adapter, release, rig.windows(original, eval_text))
    stored = set(Checkpoint.open(out).tensors)
    assert any(name.endswith(f"{packed}.qweight") for name in stored)
    assert any(name.endswith(kept) for name in stored)
    assert any(kept in warning for warning in result.warnings if "dense" in warning)


def test_a_base_whose_gates_are_dense_beside_their_siblings(
    eval_text: Path, tmp_path: Path
) -> None:
    """As gptqmodel's own definition of Qwen3.5 leaves them."""
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(**SMALL, **LINEAR)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = tmp_path / "tokenizer"
    checkpoints.write_tokenizer(tokenizer)
    original, base, adapter, out = (
        tmp_path / p for p in ("original", "gptq", "adapter", "release")
    )
    rig.write_model(original, model, tokenizer)
    rig.write_adapter(adapter, model.float(), target_modules=["in_proj_qkv", "down_proj"])
    dense = ("in_proj_a", "in_proj_b")
    packed(
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": rig.GROUP,
            "desc_act": False,
            "sym": True,
            "dynamic": {f"-:.*{name}": {} for name in dense},
        },
        lambda weight: pack_gptq(rounded(weight, 4, symmetric=True, group=rig.GROUP)),
        ending=("_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight"),
    )(original, base)
    result = run(rig.recipe(base, adapter, out, eval_text))
    quantized, release = (
        rig.reopened(folder, tmp_path / f"{folder.name}-dense", AutoModelForCausalLM)
        for folder in (base, out)
    )
    rig.check_arms(result, quantized, adapter, release, rig.windows(original, eval_text))
    stored, place = Checkpoint.open(out).tensors, "model.layers.0.linear_attn"
    assert {f"{place}.{name}.weight" for name in dense} <= stored.keys()
    assert {f"{place}.in_proj_{name}.qweight" for name in ("qkv", "z")} <= stored.keys()
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert f"{place}.in_proj_a" not in settings["modules_in_block_to_quantize"][0]
    # vLLM runs them as one, and looks for that.
    for name in (*dense, "in_proj_ba"):
        assert any(re.match(key[2:], f"{place}.{name}") for key in settings["dynamic"])
    assert not any(re.match(key[2:], f"{place}.in_proj_qkvz") for key in settings["dynamic"])
    assert not verify(out).failed
