"""What else training saved: tied heads, grown vocabularies, whole embeddings, other spellings."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qmerge.adapters import open_adapter
from qmerge.adapters.spelling import understand
from tests.adapters import tiny

FILE = "adapter_model.safetensors"
TIED: Any = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("options", "unties"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, True),
        (
            {
                "target_modules": ["q_proj"],
                "modules_to_save": ["embed_tokens"],
                "ensure_weight_tying": True,
            },
            False,
        ),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}, False),
    ],
)
def test_tied_head(options: dict[str, Any], unties: bool, tmp_path: Path) -> None:
    """The merged parts give the same logits as the live adapter, tied or not."""
    base = tiny.model(**TIED)
    folder = tiny.train(base, LoraConfig(**options), tmp_path)
    injection = tiny.injected(folder, **TIED)
    assert injection.faults == ()
    assert injection.unties is unties
    parts = tiny.merged(injection, base)
    same = torch.equal(parts["model.embed_tokens.weight"], parts["lm_head.weight"])
    assert same is not unties
    plain = copy.deepcopy(tiny.model(tie_word_embeddings=same))
    plain.load_state_dict(parts)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        want = tiny.trained(base, folder)(tokens).logits
        torch.testing.assert_close(plain(tokens).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_grown_vocabulary(tied: bool, targets: list[str], tmp_path: Path) -> None:
    """PEFT saves resized embeddings whole; the model has to be built with their rows."""
    base = tiny.model(tie_word_embeddings=tied)
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(70)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(grown), LoraConfig(target_modules=targets))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
        want = PeftModel.from_pretrained(copy.deepcopy(grown), tmp_path).merge_and_unload()
    adapter = open_adapter(tmp_path)
    assert adapter.vocabulary == 70
    injection = tiny.injected(tmp_path, vocab_size=70, tie_word_embeddings=tied)
    assert injection.faults == ()
    # Rows that the base does not have are the adapter's, whatever the base is filled with.
    padded = copy.deepcopy(grown)
    padded.get_input_embeddings().weight.data[64:] = 7.0
    parts = tiny.merged(injection, padded)
    wanted = dict(want.state_dict())
    if tied and "embed_tokens" in targets:
        # PEFT merges into the tensor that the head shares; live, the head never had the update.
        wanted["lm_head.weight"] = dict(grown.state_dict())["lm_head.weight"]
    assert tiny.differing(parts, wanted) == set()
    small = tiny.injected(tmp_path)
    assert any("[70, 32], the model has [64, 32]" in fault.message for fault in small.faults)


def rename(folder: Path, change: Any) -> None:
    file = folder / FILE
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)


ROOT = "base_model.model."
SPELLINGS = {
    "fsdp": lambda n: n.replace("layers.", "layers._fsdp_wrapped_module."),
    "deepspeed": lambda n: f"module.{n}",
    "fabric": lambda n: f"_forward_module.{n}",
    "compiled": lambda n: n.replace(ROOT, f"{ROOT}_orig_mod."),
    "bare": lambda n: n.removeprefix(ROOT),
    "adapter named": lambda n: n.replace(".weight", ".default.weight"),
    "vision language": lambda n: n.replace(f"{ROOT}model.", f"{ROOT}model.language_model."),
    "older vision language": lambda n: n.replace(f"{ROOT}model.", f"{ROOT}language_model.model."),
    "omni": lambda n: n.replace(f"{ROOT}model.", f"{ROOT}thinker.model."),
    "checkpointed": lambda n: n.replace("self_attn.", "self_attn._checkpoint_wrapped_module."),
    "saved whole": lambda n: n.replace("lm_head.weight", "lm_head.modules_to_save.weight"),
    "saved by name": lambda n: n.replace(
        "lm_head.weight", "lm_head.modules_to_save.default.weight"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str, tmp_path: Path) -> None:
    base = tiny.model()
    options = LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    folder = tiny.train(base, options, tmp_path)
    want = tiny.reference(base, folder)
    rename(folder, SPELLINGS[spelling])
    injection = tiny.injected(folder)
    assert injection.faults == ()
    assert injection.landing.spelling.renamed
    assert tiny.differing(tiny.merged(injection, base), want) == set()


def test_the_same_weight_twice(tmp_path: Path) -> None:
    folder = tiny.train(tiny.model(), LoraConfig(target_modules=["q_proj"]), tmp_path)
    tensors = dict(load_file(folder / FILE))
    name = next(iter(tensors))
    save_file({**tensors, f"module.{name}": tensors[name].clone()}, folder / FILE)
    assert tiny.injected(folder).faults == ()
    save_file({**tensors, f"module.{name}": tensors[name] + 1}, folder / FILE)
    (fault,) = tiny.injected(folder).faults
    assert fault.message == f"has two values of the same weight: {name} = module.{name}".replace(
        ": " + ROOT, ": "
    )


def test_copies_of_untouched_modules_are_told(tmp_path: Path) -> None:
    base = tiny.model()
    options = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    folder = tiny.train(base, options, tmp_path)
    want = tiny.reference(base, folder)
    tensors = dict(load_file(folder / FILE))
    tensors[f"{ROOT}lm_head.original_module.weight"] = torch.ones(64, 32)
    save_file(tensors, folder / FILE)
    injection = tiny.injected(folder)
    assert injection.faults == ()
    assert any("untouched" in note for note in injection.notes)
    assert tiny.differing(tiny.merged(injection, base), want) == set()


def test_an_ambiguous_name_is_left_alone() -> None:
    spelling = understand(["x.weight"], ["model.x.weight", "language_model.x.weight"])
    assert spelling.names == {"x.weight": "x.weight"}
    assert spelling.renamed == {}


def test_base_of_another_name_is_told(tmp_path: Path) -> None:
    folder = tiny.train(tiny.model(), LoraConfig(target_modules=["q_proj"]), tmp_path / "a")
    file = folder / "adapter_config.json"
    named = {"base_model_name_or_path": "org/Name-7B"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **named}))
    adapter = open_adapter(folder)
    assert adapter.base_mismatch(tmp_path / "Name-7B") is None
    assert "org/Name-7B" in str(adapter.base_mismatch(tmp_path / "Other-7B"))
