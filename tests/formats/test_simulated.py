"""What training quantized on the fly comes back as bitsandbytes and transformers have it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qmerge.errors import RecipeError
from qmerge.formats import open_format
from qmerge.formats.simulated import BaseQuant, SimulatedReader, parse_base_quant
from qmerge.storage.checkpoint import Checkpoint


def test_nf4_equals_what_transformers_saved(tiny_original: Path, tiny_nf4: Path) -> None:
    saved = open_format(Checkpoint.open(tiny_nf4))
    names = [name for name, weight in saved.weights.items() if weight.quantized]
    checkpoint = Checkpoint.open(tiny_original)
    dense = open_format(checkpoint)
    simulated = SimulatedReader(checkpoint, dense, names, parse_base_quant("nf4,double"))
    assert simulated.summary.quantized == len(names) == 21
    for name in saved.weights:
        assert torch.equal(simulated.dense(name), saved.dense(name)), name


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
    simulated = SimulatedReader(checkpoint, dense, [f"{name}.weight"], parse_base_quant(quantize))
    weight = model.get_submodule(name).weight
    if quantize == "int8":
        expected = weight.CB.float() * (weight.SCB.float()[:, None] / 127)
    else:
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    assert torch.equal(simulated.dense(f"{name}.weight"), expected)


def test_words_are_read_or_refused() -> None:
    assert parse_base_quant("fp4,block=128") == BaseQuant(kind="fp4", block=128)
    assert parse_base_quant("nf4, double") == BaseQuant(kind="nf4", double=True)
    for text in ("nf5", "nf4,block=65", "int8,double", "nf4,triple", ""):
        with pytest.raises(RecipeError, match="--base-quant"):
            parse_base_quant(text)
