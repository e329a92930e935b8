"""One submodule at a time against PEFT's merge of the whole model: equal to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from qmerge.adapters import inject, open_adapter
from tests.adapters import tiny

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "float8"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ALL, "use_rslora": True, "r": 4, "lora_alpha": 7},
    "dora": {"target_modules": ALL, "use_dora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"k_proj": 5},
    },
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.0\.mlp\.(up|down)_proj"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
    "bf16 adapter": {"target_modules": ["q_proj"], "lora_dropout": 0.3},
    "float8 adapter": {"target_modules": ["q_proj"], "r": 4},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
    "pissa": {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "kasa": {"target_modules": ["q_proj"], "kasa_config": KasaConfig()},
    "monteclora": {
        "target_modules": ["q_proj"],
        "monteclora_config": MontecloraConfig(buffer_size=2),
    },
    "velora": {"target_modules": ["q_proj"], "velora_config": VeloraConfig()},
    "bdlora": {
        "target_modules": ["q_proj", "up_proj"],
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["q_proj"], target_modules_bd_b=["up_proj"], nblocks=2
        ),
    },
    "everything": {
        "target_modules": ["q_proj", "embed_tokens"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "modules_to_save": ["lm_head"],
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_equals_merge_and_unload(variant: str, tmp_path: Path) -> None:
    base = tiny.model()
    folder = tiny.train(base, LoraConfig(**VARIANTS[variant]), tmp_path)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        if variant == f"{NAMES[dtype]} adapter":
            _to(folder, dtype)
    want = tiny.reference(base, folder)
    injection = tiny.injected(folder)
    assert injection.faults == ()
    assert tiny.differing(tiny.merged(injection, base), want) == set()
    assert injection.touched == tiny.differing(base.state_dict(), want)


WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 200, "tie_word_embeddings": False}
BY_ROWS = {
    "plain": 14,
    "rslora": 14,
    "patterns": 14,
    "one layer": 1,
    "regex": 2,
    "excluded": 2,
    "bf16 adapter": 2,
    "float8 adapter": 2,
    "whole modules": 2,
    "embedding": 2,
    "head": 2,
    "tokens": 2,
    "gaussian": 2,
    "orthogonal": 2,
    "monteclora": 2,
}
"""Weights that can be merged some rows at a time; in the other variants there is none."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_some_rows_at_a_time_equal_merge_and_unload(variant: str, tmp_path: Path) -> None:
    base = tiny.model(**WIDE)
    folder = tiny.train(base, LoraConfig(**VARIANTS[variant]), tmp_path)
    want = tiny.reference(base, folder)
    injection = tiny.injected(folder, **WIDE)
    mergers = {name: injection.row_merger(name) for name in injection.touched}
    found = {name: merge for name, merge in mergers.items() if merge is not None}
    for name, merge in found.items():
        for _ in range(2):  # the adapter stays as it was
            parts = base.state_dict()[name].clone().split(64)
            merged = [merge(64 * number, part) for number, part in enumerate(parts)]
            assert torch.equal(torch.cat(merged), want[name]), name
    assert len(found) == BY_ROWS.get(variant, 0)


def _to(folder: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file)


GPT2: dict[str, dict[str, Any]] = {
    "fan in": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "told wrong": {"target_modules": ["c_attn"], "fan_in_fan_out": False},
    "dora": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    "bias": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
    "all biases": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    "own biases": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"},
}


@pytest.mark.parametrize("variant", GPT2)
def test_gpt2_equals_merge_and_unload(variant: str, tmp_path: Path) -> None:
    base = tiny.model("gpt2", tie_word_embeddings=False)
    folder = tiny.train(base, LoraConfig(**GPT2[variant]), tmp_path)
    want = tiny.reference(base, folder)
    injection = tiny.injected(folder, "gpt2", tie_word_embeddings=False)
    assert injection.faults == ()
    assert tiny.differing(tiny.merged(injection, base), want) == set()
    assert injection.touched >= tiny.differing(base.state_dict(), want)


def test_experts_as_parameters(tmp_path: Path) -> None:
    base = tiny.model("qwen3_moe")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = LoraConfig(target_modules=["q_proj"], target_parameters=targets)
    folder = tiny.train(base, options, tmp_path)
    want = tiny.reference(base, folder)
    injection = tiny.injected(folder, "qwen3_moe")
    assert injection.faults == ()
    assert tiny.differing(tiny.merged(injection, base), want) == set()
    assert injection.touched == tiny.differing(base.state_dict(), want)


def test_live_layer_is_the_trained_model(tmp_path: Path) -> None:
    base = tiny.model()
    folder = tiny.train(base, LoraConfig(target_modules=ALL), tmp_path)
    injection = tiny.injected(folder)
    whole = tiny.trained(base, folder)
    seen: dict[str, Any] = {}

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.update(args=args, kwargs=kwargs, output=output)

    layer = whole.base_model.model.model.layers[1]
    layer.register_forward_hook(watch, with_kwargs=True)
    with torch.no_grad():
        whole(torch.arange(12)[None])
        live = injection.live("model.layers.1")
        injection.fill(live, tiny.under(base.state_dict(), "model.layers.1"))
        assert torch.equal(live(*seen["args"], **seen["kwargs"]), seen["output"])


def test_base_tensors_stay_the_callers(tmp_path: Path) -> None:
    base = tiny.model()
    options = LoraConfig(target_modules=["q_proj"], init_lora_weights="olora")
    injection = tiny.injected(tiny.train(base, options, tmp_path))
    before = {n: t.clone() for n, t in base.state_dict().items()}
    tiny.merged(injection, base)
    assert tiny.differing(before, base.state_dict()) == set()


def test_base_tensors_that_are_taken_over(tmp_path: Path) -> None:
    """They become the merged ones; what the adapter brought stays as it was for the next time."""
    base = tiny.model()
    options = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    folder = tiny.train(base, options, tmp_path)
    injection, path = tiny.injected(folder), "model.layers.0"
    want = tiny.under(tiny.reference(base, folder), path)
    for _ in range(2):
        live = injection.live(path)
        given = {n: t.clone() for n, t in tiny.under(base.state_dict(), path).items()}
        injection.fill(live, given, taken=True)
        merged = injection.merge(live)
        assert tiny.differing(merged, want) == set()
        name = "self_attn.q_proj.weight"
        assert merged[name].data_ptr() == given[name].data_ptr()


def test_a_random_start_is_drawn_alike(tmp_path: Path) -> None:
    base = tiny.model()
    options = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_1")
    injection = tiny.injected(tiny.train(base, options, tmp_path))
    torch.manual_seed(1)
    first = tiny.merged(injection, base)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert tiny.differing(first, tiny.merged(injection, base)) == set()
    assert torch.equal(before, torch.get_rng_state())


def test_base_weights_may_come_in_pieces(tmp_path: Path) -> None:
    base = tiny.model()
    folder = tiny.train(base, LoraConfig(target_modules=["q_proj"], use_dora=True), tmp_path)
    injection = tiny.injected(folder)
    live = injection.live("model.layers.0")
    for name, tensor in tiny.under(base.state_dict(), "model.layers.0").items():
        injection.fill(live, {name: tensor})
    want = tiny.under(tiny.reference(base, folder), "model.layers.0")
    assert tiny.differing(injection.merge(live), want) == set()


def test_only_selected_modules(tmp_path: Path) -> None:
    base = tiny.model()
    options = LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    folder = tiny.train(base, options, tmp_path)
    injection = inject(
        tiny.skeleton(), open_adapter(folder), selected=lambda path: path.endswith("q_proj")
    )
    assert injection.left_out == (
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "lm_head",
    )
    kept = {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert injection.touched == kept
    want = {**base.state_dict(), **{n: tiny.reference(base, folder)[n] for n in kept}}
    assert tiny.differing(tiny.merged(injection, base), want) == set()


@pytest.mark.parametrize("whole", [None, ["embed_tokens"]])
def test_an_embedding_that_is_left_out(whole: list[str] | None, tmp_path: Path) -> None:
    """Neither its update nor the whole embedding that PEFT saved beside it is used."""
    base = tiny.model()
    targets = ["q_proj"] if whole else ["q_proj", "embed_tokens"]
    options = LoraConfig(target_modules=targets, modules_to_save=whole)
    folder = tiny.train(base, options, tmp_path)
    injection = inject(
        tiny.skeleton(), open_adapter(folder), selected=lambda path: path.endswith("q_proj")
    )
    assert injection.faults == ()
    assert injection.landing.overrides == {}
    changed = tiny.differing(tiny.merged(injection, base), dict(base.state_dict()))
    assert changed == injection.touched
    assert all("q_proj" in name for name in changed)
