"""Checkpoints as models: what is stored beside the weights, and heads that are tied and packed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.errors import ModelError, PlanError
from qmerge.export import export
from qmerge.formats.gptq import pack_gptq
from qmerge.model.opening import open_model, open_original, told
from qmerge.model.skeleton import first_line
from qmerge.recipe import Recipe
from qmerge.storage.checkpoint import Checkpoint
from tests import test_matrix as forms


@pytest.fixture(scope="module")
def packed(tiny_original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_original in GPTQ, every linear packed."""
    folder = tmp_path_factory.mktemp("opening") / "packed"
    forms.gptq(4)(tiny_original, folder)
    return folder


def with_biases(packed: Path, folder: Path, value: float) -> Path:
    """A bias for every packed linear, of a model that has none."""
    shutil.copytree(packed, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(".qweight")]:
            bias = torch.full(tensors[name].shape[1:], value, dtype=torch.float16)
            tensors[name.replace(".qweight", ".bias")] = bias
        save_file(tensors, file, metadata={"format": "pt"})
    forms.write_index(folder)
    return folder


def test_biases_of_zeros_as_autogptq_wrote_them(packed: Path, tmp_path: Path) -> None:
    folder = with_biases(packed, tmp_path / "base", 0.0)
    for base, out in ((packed, "plain"), (folder, "biased")):
        export(Recipe(base=base, out=tmp_path / out))
    plain, biased = (Checkpoint.open(tmp_path / out) for out in ("plain", "biased"))
    assert set(biased.tensors) == set(plain.tensors)
    for name in plain.tensors:
        assert torch.equal(biased.read(name), plain.read(name)), name


def test_biases_that_add_something_are_no_part_of_the_model(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"down_proj\.bias"):
        open_model(with_biases(packed, tmp_path / "base", 0.5))


def test_what_transformers_leaves_out_is_told(tmp_path: Path) -> None:
    """Layers that only draft, as Qwen3-Next is published with; old rotary caches go unsaid."""
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    config = Qwen3NextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, vocab_size=64, num_experts=0,
        layer_types=["full_attention"], **linear,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    extra = {name: torch.ones(4) for name in ("mtp.fc.weight", "model.rotary_emb.inv_freq")}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    (note,) = told(*open_model(tmp_path))
    assert note.endswith("no such model: mtp.fc.weight")


MASK = torch.tril(torch.ones(1, 1, 64, 64)).bool()
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": 64}
NEO = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
OLD: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "gpt2": (GPT, {"attn.masked_bias": torch.tensor(-1e4), "attn.bias": MASK}),
    "gptj": ({**GPT, "rotary_dim": 4}, {"attn.masked_bias": torch.tensor(-1e9), "attn.bias": MASK}),
    "gpt_neo": (
        {**NEO, "attention_types": [[["global"], 1]]},
        {"attn.attention.masked_bias": torch.tensor(-1e9), "attn.attention.bias": MASK},
    ),
    "codegen": ({**GPT, "rotary_dim": 4}, {"attn.causal_mask": MASK}),
}
"""Models of old and what their attention stored."""


def with_old(folder: Path, kind: str, extra: dict[str, torch.Tensor]) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **OLD[kind][0])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    named = {f"transformer.h.0.{name}": tensor for name, tensor in extra.items()}
    save_file(load_file(file) | named, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", OLD)
def test_masks_that_older_models_stored_are_left_out(kind: str, tmp_path: Path) -> None:
    extra = OLD[kind][1]
    (note,) = told(*open_model(with_old(tmp_path, kind, extra)))
    assert all(note.count(f"transformer.h.0.{name}") == 1 for name in extra)


@pytest.mark.parametrize("shape", [(32,), (1, 1, 64, 32), (1, 2, 64, 64)])
def test_what_is_no_mask_is_not_left_out(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"does not know transformer\.h\.0\.attn\.bias"):
        open_model(with_old(tmp_path, "gptj", {"attn.bias": torch.ones(shape)}))


@pytest.mark.parametrize("whole", [False, True])
def test_convolutions_that_transformers_joins_are_told(whole: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, OlmoHybridConfig

    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    config = OlmoHybridConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, vocab_size=64,
        layer_types=["linear_attention", "full_attention"], pad_token_id=None, **linear,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, save_original_format=not whole)
    if whole:  # as the hint says
        _, weights = open_model(tmp_path)
        name = "model.layers.0.linear_attn.conv1d.weight"
        assert torch.equal(weights.tensor(name), model.state_dict()[name])
        return
    with pytest.raises(ModelError, match=r"makes model\.layers\.0\.linear_attn\.conv1d\.weight"):
        open_model(tmp_path)


# --- a packed head, beside a configuration that ties it -----------------------------------------


def with_head(original: Path, folder: Path, **options: Any) -> Path:
    """tiny_original, which ties its head, packed with a head of its own."""
    twice = folder.with_name(f"{folder.name}-twice")
    shutil.copytree(original, twice)
    embedding = Checkpoint.open(original).read("model.embed_tokens.weight").clone()
    save_file({"lm_head.weight": embedding}, twice / "head.safetensors")
    forms.write_index(twice)
    forms.packed(**options, ending=("_proj.weight", "lm_head.weight"))(twice, folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return folder


def gptq_head(original: Path, folder: Path) -> Path:
    settings = {"quant_method": "gptq", "bits": 8, "group_size": forms.GROUP, "lm_head": True}
    settings |= {"sym": True, "desc_act": False}
    return with_head(
        original,
        folder,
        settings=settings,
        pack=lambda weight: pack_gptq(forms.rounded(weight, 8, symmetric=True)),
    )


def test_a_gptq_head_is_left_out_where_the_configuration_ties_it(
    tiny_original: Path, tmp_path: Path
) -> None:
    folder = gptq_head(tiny_original, tmp_path / "base")
    skeleton, weights = open_model(folder)
    assert "lm_head.weight" in weights.format.weights
    assert "the embedding is taken for both" in told(skeleton, weights)[0]
    export(Recipe(base=folder, out=tmp_path / "dense"))
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "dense").tensors
    assert open_original(Checkpoint.open(tiny_original), skeleton, weights).holds(
        "model.embed_tokens.weight"
    )


@pytest.mark.slow
def test_so_does_transformers(tiny_original: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="needs the extra 'verify'")
    from transformers import AutoModelForCausalLM

    folder = gptq_head(tiny_original, tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    embedding = Checkpoint.open(folder).read("model.embed_tokens.weight")
    assert torch.equal(loaded.lm_head.weight, embedding)


def test_an_fp8_head_is_taken_as_stored_as_transformers_takes_it(
    tiny_original: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    settings, pack = forms.fp8_form()
    folder = with_head(
        tiny_original,
        tmp_path / "base",
        settings=settings | {"modules_to_not_convert": [], "dequantize": True},
        pack=pack,
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    skeleton, weights = open_model(folder)
    assert "tie_word_embeddings becomes false" in told(skeleton, weights)[0]
    head = weights.tensor("lm_head.weight")
    assert torch.equal(head.bfloat16(), theirs.lm_head.weight.bfloat16())
    embedding = weights.tensor("model.embed_tokens.weight")
    assert not torch.equal(head, embedding)
    # The original ties its head and stores none.
    original = open_original(Checkpoint.open(tiny_original), skeleton, weights)
    assert torch.equal(original.tensor("lm_head.weight"), embedding)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("no such thing\nsecond", "no such thing"),
        ("Validation failed:\n\n    ValueError: the length differs\nthird",
         "Validation failed: ValueError: the length differs"),
        ("ends here:", "ends here:"),
        ("", "ValueError"),
    ],
)  # fmt: skip
def test_a_reason_is_not_cut_where_it_begins(message: str, said: str) -> None:
    assert first_line(ValueError(message)) == said
