"""What training quantized on the fly comes back as bitsandbytes and transformers have it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.errors import RecipeError
from qmerge.formats import open_format
from qmerge.formats.simulated import BaseQuant, SimulatedReader, parse_base_quant, round_trip
from qmerge.model.opening import open_model
from qmerge.plan import as_trained
from qmerge.recipe import Recipe
from qmerge.storage.checkpoint import Checkpoint


def test_nf4_equals_what_transformers_saved(tiny_original: Path, tiny_nf4: Path) -> None:
    saved = open_format(Checkpoint.open(tiny_nf4))
    names = [name for name, weight in saved.weights.items() if weight.quantized]
    checkpoint = Checkpoint.open(tiny_original)
    dense = open_format(checkpoint)
    simulated = SimulatedReader(checkpoint, dense, names, BaseQuant(kind="nf4", double=True))
    assert simulated.summary.quantized == len(names) == 21
    for name in saved.weights:
        assert torch.equal(simulated.dense(name), saved.dense(name)), name
        assert torch.equal(torch.cat([*simulated.pieces(name, 9)]), saved.dense(name)), name


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_equals_a_model_loaded_with_it(tiny_original: Path, quantize: str) -> None:
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantize == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantize)
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_original, quantization_config=config, dtype=torch.bfloat16
    )
    checkpoint = Checkpoint.open(tiny_original)
    dense = open_format(checkpoint)
    name = "model.layers.1.mlp.down_proj"
    quant = parse_base_quant(quantize)
    assert quant is not None
    simulated = SimulatedReader(checkpoint, dense, [f"{name}.weight"], quant)
    weight = model.get_submodule(name).weight
    if quantize == "int8":
        expected = weight.CB.float() * (weight.SCB.float()[:, None] / 127)
    else:
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    assert torch.equal(simulated.dense(f"{name}.weight"), expected)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("loaded", ["bfloat16", "float16", "float32", None])
@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_weights_are_quantized_from_what_they_are_loaded_in(
    tiny_original: Path, tmp_path: Path, stored: str, loaded: str | None, quantize: str
) -> None:
    """A base stored in another dtype than training loaded it in; where nothing says which, as
    config.json says, whatever is stored."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder, name = tmp_path / "base", "model.layers.1.mlp.down_proj"
    shutil.copytree(tiny_original, folder)
    generator = torch.Generator().manual_seed(0)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for key, tensor in tensors.items():
            moved = tensor.float() * (1 + 0.01 * torch.rand(tensor.shape, generator=generator))
            tensors[key] = moved.to(getattr(torch, stored))
        save_file(tensors, file, metadata={"format": "pt"})
    config = BitsAndBytesConfig(
        load_in_8bit=quantize == "int8", load_in_4bit=quantize == "nf4", bnb_4bit_quant_type="nf4"
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=loaded or "auto"
    )
    weight = model.get_submodule(name).weight
    if quantize == "int8":
        expected = weight.CB.float() * (weight.SCB.float()[:, None] / 127)
    else:
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    skeleton, base = open_model(folder)
    asked = f"{quantize},dtype={loaded}" if loaded else quantize
    recipe = Recipe(base=folder, out=tmp_path / "out", base_quant=asked)
    simulated, decision = as_trained(recipe, skeleton, base)
    assert torch.equal(simulated.tensor(f"{name}.weight"), expected)
    assert decision.quant is not None
    assert decision.quant.dtype == (loaded or "bfloat16")
    assert ("dtype=bfloat16" in "".join(decision.notes)) is (loaded is None)


def test_a_head_that_is_not_among_those_skipped(tmp_path: Path) -> None:
    """transformers leaves the head alone only where nothing is named, or where it is."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 128}
    config = Qwen3Config(
        **shape, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    skeleton, base = open_model(tmp_path)
    for skipped in ([], ["lm_head", "q_proj"], ["down_proj"]):
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped or None
        )
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=settings, dtype=torch.bfloat16
        )
        asked = ",".join(["nf4", *(f"skip={name}" for name in skipped)])
        recipe = Recipe(base=tmp_path, out=tmp_path / "out", base_quant=asked)
        simulated, _ = as_trained(recipe, skeleton, base)
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            weight: Any = module.weight
            theirs = weight.data
            packed = isinstance(module, bnb.nn.Linear4bit)
            assert simulated.is_quantized(f"{name}.weight") is packed, (skipped, name)
            if packed:
                theirs = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(simulated.tensor(f"{name}.weight"), theirs.float())
        assert simulated.is_quantized("lm_head.weight") is (skipped == ["down_proj"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_step_of_loftq_quantizes_as_bitsandbytes_alone(dtype: torch.dtype) -> None:
    """PEFT's `loftq_init` needs a GPU; what it does with the weight is written out here."""
    import bitsandbytes as bnb

    weight = (torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    whole = weight.to(torch.float32)
    made = bnb.nn.Params4bit(
        whole, requires_grad=False, compress_statistics=False, quant_type="nf4"
    ).to("cpu")
    left = bnb.functional.dequantize_4bit(made.data, made.quant_state).to(dtype)
    assert torch.equal(round_trip(weight, BaseQuant(kind="nf4")), left)


def test_words_are_read_or_refused() -> None:
    assert parse_base_quant("fp4,block=128") == BaseQuant(kind="fp4", block=128)
    assert parse_base_quant("none") is None
    kept = parse_base_quant("int8,skip=mlp,skip=model.layers.0")
    assert kept == BaseQuant(kind="int8", skip=("mlp", "model.layers.0"))
    for text in (
        "nf4", "fp4,double", "nf4,double,block=128,skip=mlp", "int8,skip=mlp",
        "int8,dtype=float16", "fp4,block=32", "nf4,double,block=128,dtype=bfloat16,skip=mlp",
    ):  # fmt: skip
        quant = parse_base_quant(text)
        assert quant is not None
        assert quant.option == text
    assert parse_base_quant("nf4, double") == BaseQuant(kind="nf4", double=True)
    for text in (
        "nf5", "nf4,block=65", "int8,double", "int8,block=64", "nf4,triple", "nf4,dtype=int8",
        "nf4,skip=", "",
    ):  # fmt: skip
        with pytest.raises(RecipeError, match="--base-quant"):
            parse_base_quant(text)
