"""Adapters whose modules later libraries store differently: experts, pruned ranks, real ones."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qmerge.adapters import inject, open_adapter
from qmerge.errors import AdapterError
from tests.adapters import tiny

EXPERTS = {
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}
FILE = "adapter_model.safetensors"


def experts_adapter(family: str, folder: Path) -> Path:
    """One LoRA per expert and projection, as saved while each expert was a module."""
    torch.manual_seed(3)
    path, gate, up, down = EXPERTS[family]
    sizes = {gate: (32, 16), up: (32, 16), down: (16, 32)}
    places = {
        f"{layer}.{path}.{expert}.{name}": size
        for layer in range(2)
        for expert in range(4)
        for name, size in sizes.items()
    }
    places |= {f"{layer}.self_attn.q_proj": (32, 32) for layer in range(2)}
    tensors = {}
    for place, (width, height) in places.items():
        name = f"base_model.model.model.layers.{place}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, width) * 0.1
        tensors[f"{name}.lora_B.weight"] = torch.randn(height, 2) * 0.1
    LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", *sizes]).save_pretrained(folder)
    save_file(tensors, folder / FILE)
    return folder


@pytest.mark.parametrize("family", EXPERTS)
def test_loras_of_single_experts_on_fused_ones(family: str, tmp_path: Path) -> None:
    base = tiny.model(family)
    folder = experts_adapter(family, tmp_path)
    want = tiny.reference(base, folder)
    injection = tiny.injected(folder, family)
    assert injection.faults == ()
    assert tiny.differing(tiny.merged(injection, base), want) == set()
    changed = tiny.differing(base.state_dict(), want)
    assert injection.touched == changed
    assert sum("experts" in name for name in changed) == 4


def test_a_lost_expert_is_found(tmp_path: Path) -> None:
    folder = experts_adapter("mixtral", tmp_path)
    tensors = dict(load_file(folder / FILE))
    for name in [n for n in tensors if ".experts.2.w2." in n and ".layers.1." in n]:
        del tensors[name]
    save_file(tensors, folder / FILE)
    messages = [fault.message for fault in tiny.injected(folder, "mixtral").faults]
    assert len(messages) == 1
    assert "another shape" in messages[0]
    assert "layers.1.mlp.experts" in messages[0]


def test_half_of_a_fused_pair_is_refused(tmp_path: Path) -> None:
    folder = experts_adapter("mixtral", tmp_path)
    LoraConfig(r=2, target_modules=["w1", "w2"]).save_pretrained(folder)
    with pytest.raises(AdapterError, match="without also targeting w3"):
        inject(tiny.skeleton("mixtral"), open_adapter(folder))


def test_pruned_ranks(tmp_path: Path) -> None:
    base = tiny.model()
    options = AdaLoraConfig(
        target_modules=["q_proj", "up_proj"], init_r=4, target_r=2, total_step=10
    )
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), options)
    pattern: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
        if "lora_E" in name:
            kept = [True, "up_proj" in name, "q_proj" in name, False]
            pattern[name.removeprefix("base_model.model.")] = kept
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path)
    want = tiny.reference(base, tmp_path)
    injection = tiny.injected(tmp_path)
    assert injection.faults == ()
    assert not any("fits no module" in note for note in injection.notes)
    assert tiny.differing(tiny.merged(injection, base), want) == set()


def shared() -> Path:
    folder = Path(os.environ.get("QMERGE_SHARED", Path(__file__).parents[3] / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip("needs the real checkpoints in $QMERGE_SHARED")
    return folder / "models"


def test_a_real_adapter() -> None:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = shared()
    base = AutoModelForCausalLM.from_pretrained(folder / "original", dtype=torch.float32)
    want = tiny.reference(base, folder / "adapter-nf4")
    config = AutoConfig.from_pretrained(folder / "original")
    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    skeleton.tie_weights()
    injection = inject(skeleton, open_adapter(folder / "adapter-nf4"))
    assert injection.faults == ()
    assert not injection.unties
    assert tiny.differing(tiny.merged(injection, base), want) == set()
    assert injection.touched == tiny.differing(base.state_dict(), want)


def test_targets_of_another_library_generation(tmp_path: Path) -> None:
    """A pattern over older paths, and ranks by whole older names."""
    base = tiny.model()
    options = LoraConfig(
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"q_proj": 3, "model.layers.1.mlp.up_proj": 5},
        alpha_pattern={"model.layers.1.mlp.up_proj": 2},
        modules_to_save=["lm_head"],
    )
    folder = tiny.train(base, options, tmp_path)
    want = tiny.reference(base, folder)
    old = "language_model.model.layers.1.mlp.up_proj"
    older = {
        "target_modules": r"^language_model\.model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj$",
        "rank_pattern": {"q_proj": 3, old: 5},
        "alpha_pattern": {old: 2},
    }
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **older}))
    tensors = {
        name.replace("model.model.", "model.language_model.model."): tensor
        for name, tensor in load_file(folder / FILE).items()
    }
    save_file(tensors, folder / FILE)
    injection = tiny.injected(folder)
    assert injection.faults == ()
    assert any("another library generation" in note for note in injection.notes)
    assert tiny.differing(tiny.merged(injection, base), want) == set()


def test_a_pattern_that_fits_nothing_is_told(tmp_path: Path) -> None:
    options = LoraConfig(target_modules=["q_proj"], alpha_pattern={"layers.9.q_proj": 2})
    injection = tiny.injected(tiny.train(tiny.model(), options, tmp_path))
    assert any("alpha_pattern 'layers.9.q_proj'" in note for note in injection.notes)
