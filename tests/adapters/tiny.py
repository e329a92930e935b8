"""Tiny models, adapters trained by chance, and what PEFT itself makes of them."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qmerge.adapters import Change, Injection, inject, open_adapter

SIZES = {
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64},
    "qwen3_moe": {
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 64,
    },
    "mixtral": {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 64,
    },
}


def config(kind: str = "qwen3", **options: Any) -> Any:
    return AutoConfig.for_model(kind, **{**SIZES[kind], **options})


def vision_language() -> Any:
    """A Qwen2.5-VL with two layers in both of its halves."""
    text: dict[str, Any] = {**SIZES["qwen3"], "tie_word_embeddings": False}
    text.pop("head_dim")
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text |= {"rope_parameters": sections, "bos_token_id": None, "eos_token_id": None}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    return AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=text,
        vision_config={**vision, "out_hidden_size": 32},
        tie_word_embeddings=False,
    )


@functools.cache
def model(kind: str = "qwen3", **options: Any) -> Any:
    """The same random weights for the same arguments; not to be changed."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(kind, **options), dtype=torch.float32).eval()


@functools.cache
def skeleton(kind: str = "qwen3", **options: Any) -> Any:
    with init_empty_weights(include_buffers=False):
        made = AutoModelForCausalLM.from_config(config(kind, **options), dtype=torch.float32)
    made.tie_weights()
    return made.eval()


def train(base: Any, peft_config: Any, folder: Path, *, seed: int = 1, scale: float = 0.1) -> Path:
    """Save an adapter whose every trained value was moved at random."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(base), peft_config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * scale
        wrapped.create_or_update_model_card = lambda *_: None
        wrapped.save_pretrained(folder)
    return folder


def trained(base: Any, folder: Path) -> Any:
    """The model with the adapter live on top, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def reference(base: Any, folder: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge of the whole model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(trained(base, folder).merge_and_unload().state_dict())


def injected(folder: Path, kind: str = "qwen3", **options: Any) -> Injection:
    return inject(skeleton(kind, **options), open_adapter(folder))


def paths(base: nn.Module) -> list[str]:
    """The submodules that a walk would take one by one."""
    layers = next(n for n, m in base.named_modules() if isinstance(m, nn.ModuleList))
    owned = [f"{layers}.{i}" for i in range(len(base.get_submodule(layers)))]  # type: ignore[arg-type]
    rest = {name.rpartition(".")[0] for name, _ in base.named_parameters(remove_duplicate=False)}
    return owned + sorted(p for p in rest if not p.startswith(f"{layers}."))


def under(tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    return {n[len(path) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{path}.")}


def merged(injection: Change, base: Any) -> dict[str, torch.Tensor]:
    """Every parameter, merged one submodule at a time."""
    state = base.state_dict()
    out = {}
    for path in paths(base):
        live = injection.live(path)
        injection.fill(live, under(state, path))
        out.update({f"{path}.{name}": t for name, t in injection.merge(live).items()})
    return out


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> set[str]:
    return {n for n in one.keys() | other.keys() if not _same(one.get(n), other.get(n))}


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
