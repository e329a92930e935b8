"""The main job on dense decoders of every kind, against plain transformers and PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qmerge.export import export
from qmerge.pipeline import run
from qmerge.plan import make_plan
from qmerge.recipe import Recipe
from tests import checkpoints
from tests.families import rig

SMALL = {
    "hidden_size": 64,
    # On a CPU bitsandbytes 0.50.2 decodes a weight wrongly whose width its blocks do not divide.
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": checkpoints.VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEAD = {"head_dim": 16}
TIED = {"tie_word_embeddings": True}
OLD = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SMALL,
    "Llama llama3": {**SMALL, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "Mistral": {**SMALL, "sliding_window": 8, "pad_token_id": 500},
    "Qwen2": {**SMALL, **TIED, **SLIDING, "use_sliding_window": True},
    "Qwen2 yarn": {**SMALL, "rope_parameters": YARN},
    "Qwen3": {**SMALL, **HEAD},
    "Gemma": {**SMALL, **HEAD, **TIED},
    "Gemma2": {**SMALL, **HEAD, **TIED, **SLIDING, "query_pre_attn_scalar": 16},
    "Gemma3Text": {**SMALL, **HEAD, **TIED, **SLIDING, "query_pre_attn_scalar": 16},
    "Phi": OLD,
    "Phi3": {**SMALL, "sliding_window": 8},
    "Phi3 longrope": {**SMALL, "rope_parameters": LONG},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 512},
    "OPT": {**OLD, **TIED, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "OPT projected": {
        **OLD,
        "ffn_dim": 128,
        "word_embed_proj_dim": 128,
        "do_layer_norm_before": False,
    },
    "GPTNeoX": OLD,
    "GPTNeoX in sequence": {**OLD, "use_parallel_residual": False},
    "Falcon": {**OLD, "multi_query": True},
    "Falcon alibi": {
        **OLD,
        "alibi": True,
        "multi_query": False,
        "bias": True,
        "parallel_attn": False,
    },
    "Falcon new": {**OLD, "new_decoder_architecture": True, "num_kv_heads": 2},
    "Cohere": {**SMALL, "logit_scale": 1.0},
    "Granite": SMALL,
}
FAST = ("Gemma2", "GPT2")
DENSE = tuple(name for name in FAMILIES if name.startswith("Falcon"))
"""Families whose linears are of a class of their own, which bitsandbytes leaves as they are."""
WRITTEN = ("Llama llama3", "Mistral", "Qwen2", "Gemma2", "Gemma3Text", "Phi", "OPT")
"""Families that gptqmodel 7.6 quantizes and transformers loads again."""
KERNEL = 3e-3
"""Relative difference that gptqmodel's kernels on a CPU bring, which decode to float16."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    checkpoints.write_tokenizer(folder)
    return folder


def write(name: str, folder: Path, tokenizer: Path) -> None:
    """A dense checkpoint of a family and an adapter that PEFT made on it."""
    config = getattr(transformers, f"{name.split()[0]}Config")(**FAMILIES[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rig.write_model(folder / "original", model, tokenizer)
    rig.write_adapter(folder / "adapter", model.float())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FAMILIES]
)
def test_every_arm_equals_transformers_and_peft(
    name: str, tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    write(name, tmp_path, tokenizer)
    original, adapter, out = (tmp_path / part for part in ("original", "adapter", "release"))
    base = original if name in DENSE else tmp_path / "nf4"
    if name not in DENSE:
        rig.write_nf4(original, base, AutoModelForCausalLM)
    result = run(rig.recipe(base, adapter, out, eval_text))
    quantized = rig.dense(base, AutoModelForCausalLM)
    release = rig.reopened(out, tmp_path / "decoded", AutoModelForCausalLM, name == "GPT2")
    rig.check_arms(result, quantized, adapter, release, rig.windows(original, eval_text))


def test_weights_that_lie_transposed_are_turned_and_turned_back(
    tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    write("GPT2", tmp_path, tokenizer)
    original, base = tmp_path / "original", tmp_path / "nf4"
    rig.write_nf4(original, base, AutoModelForCausalLM)
    export(Recipe(base=base, out=tmp_path / "dense"), dtype="float32")
    name = "transformer.h.0.attn.c_proj.weight"  # square, so that no shape gives it away
    exported = rig.dense(tmp_path / "dense", AutoModelForCausalLM).state_dict()[name]
    decoded = rig.dense(base, AutoModelForCausalLM).state_dict()[name]
    assert torch.equal(exported.T, decoded)
    asked = rig.recipe(original, tmp_path / "adapter", tmp_path / "release", eval_text)
    job = make_plan(replace(asked, base_quant="nf4,double")).ready()
    assert torch.equal(job.base.tensor(name), decoded)
    save_file({name: decoded.contiguous()}, tmp_path / "state.safetensors")
    (fault,) = make_plan(replace(asked, partial_state=tmp_path / "state.safetensors")).faults
    assert "keeps transposed" in fault.message


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WRITTEN, "Phi3", "GPTNeoX"])
def test_gptqmodel_loads_the_release(
    name: str, tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    write(name, tmp_path, tokenizer)
    original, adapter, out = (tmp_path / part for part in ("original", "adapter", "release"))
    base = tmp_path / ("gptq" if name in WRITTEN else "nf4")
    if name in WRITTEN:
        checkpoints.write_gptq(original, base)
    else:
        rig.write_nf4(original, base, AutoModelForCausalLM)
    result = run(rig.recipe(base, adapter, out, eval_text))
    load = rig.loaded if name in WRITTEN else rig.dense
    quantized, release = load(base, AutoModelForCausalLM), rig.loaded(out, AutoModelForCausalLM)
    tokens = rig.windows(original, eval_text)
    rig.check_arms(result, quantized, adapter, release, tokens, tolerance=KERNEL)


@pytest.mark.slow
def test_gptqmodel_writes_and_loads_gpt2(tokenizer: Path, eval_text: Path, tmp_path: Path) -> None:
    """By itself: transformers 5.23 opens no packed GPT-2."""
    pytest.importorskip("gptqmodel")
    write("GPT2", tmp_path, tokenizer)
    original, adapter, out = (tmp_path / part for part in ("original", "adapter", "release"))
    checkpoints.write_gptq(original, tmp_path / "gptq")
    result = run(rig.recipe(tmp_path / "gptq", adapter, out, eval_text))
    tokens = rig.windows(original, eval_text)
    for arm, folder in (("quantized_base", tmp_path / "gptq"), ("release", out)):
        expected = rig.perplexity(checkpoints.read_gptq(folder), tokens)
        assert abs(result.arms[arm]["text"].perplexity / expected - 1) < KERNEL, arm


def test_transposed_weights_are_compared_with_the_originals(
    tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    write("GPT2", tmp_path, tokenizer)
    original, base, out = (tmp_path / part for part in ("original", "nf4", "release"))
    rig.write_nf4(original, base, AutoModelForCausalLM)
    asked = rig.recipe(base, tmp_path / "adapter", out, eval_text)
    result = run(replace(asked, original=original, strategy="auto"))
    assert not [warning for warning in result.warnings if "not what the base" in warning]
    tokens = rig.windows(original, eval_text)
    expected = rig.perplexity(rig.dense(original, AutoModelForCausalLM), tokens)
    assert abs(result.arms["original"]["text"].perplexity / expected - 1) < rig.TOLERANCE


def test_a_transposed_weight_that_was_not_trained_is_told(
    tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    write("GPT2", tmp_path, tokenizer)
    original, state = tmp_path / "original", tmp_path / "state.safetensors"
    name = "transformer.h.0.attn.c_proj.weight"  # as it is stored, which is how training saves it
    save_file({name: rig.dense(original, AutoModelForCausalLM).state_dict()[name]}, state)
    asked = rig.recipe(original, tmp_path / "adapter", tmp_path / "release", eval_text)
    (fault,) = make_plan(replace(asked, adapter=(), partial_state=state)).faults
    assert "its update is zero" in fault.message
