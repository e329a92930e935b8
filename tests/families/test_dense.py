"""The main job on dense decoders of every kind, against plain transformers and PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import OFTConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qmerge.errors import PlanError
from qmerge.export import export
from qmerge.model.skeleton import build_skeleton
from qmerge.pipeline import run
from qmerge.plan import make_plan
from qmerge.recipe import Recipe
from tests import checkpoints
from tests.adapters import tiny
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
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512},
    "Cohere": {**SMALL, "logit_scale": 1.0},
    "Granite": SMALL,
}
FAST = ("Gemma2", "GPT2", "Bloom")
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


def test_a_partial_state_of_transposed_weights(
    tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    write("GPT2", tmp_path, tokenizer)
    original, state = tmp_path / "original", tmp_path / "state.safetensors"
    own = rig.dense(original, AutoModelForCausalLM).state_dict()
    names = [f"transformer.h.0.attn.{name}.weight" for name in ("c_proj", "c_attn")]
    trained = {name: torch.randn(own[name].shape) for name in names}
    save_file(trained, state)
    asked = Recipe(base=original, partial_state=state, out=tmp_path / "out")
    export(asked, dtype="float32")
    written = rig.dense(tmp_path / "out", AutoModelForCausalLM).state_dict()
    assert all(torch.equal(written[name], trained[name]) for name in names)
    save_file({name: own[name] for name in names}, state)
    with pytest.raises(PlanError, match="merging changes nothing"):
        export(replace(asked, out=tmp_path / "same"), dtype="float32")


WHOLE: dict[str, dict[str, Any]] = {
    "square": {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj"]},
    "mlp": {"target_modules": ["c_attn"], "modules_to_save": ["mlp"]},
    "wide": {"target_modules": ["c_fc"], "modules_to_save": ["c_attn"]},
    "layer": {"target_modules": ["h.0.attn.c_attn"], "modules_to_save": ["h.1"]},
    "square parameter": {"target_modules": [], "target_parameters": ["attn.c_proj.weight"]},
    "wide parameter": {"target_modules": [], "target_parameters": ["attn.c_attn.weight"]},
    "biases": {"target_modules": ["attn.c_proj"], "bias": "all"},
}
"""What training saves in the way that transformers keeps the weight."""


@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_whole_weights_that_lie_transposed(
    options: dict[str, Any], tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    write("GPT2", tmp_path, tokenizer)
    original, adapter, out = (tmp_path / part for part in ("original", "whole", "release"))
    base = rig.dense(original, AutoModelForCausalLM)
    with torch.random.fork_rng():
        rig.write_adapter(adapter, base, **options)
    moved = load_file(adapter / "adapter_model.safetensors")
    for tensor in moved.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
    save_file(moved, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    asked = rig.recipe(original, adapter, out, eval_text)
    result = run(asked)
    release = rig.reopened(out, tmp_path / "decoded", AutoModelForCausalLM, turned=True)
    base, tokens = rig.dense(original, AutoModelForCausalLM), rig.windows(original, eval_text)
    rig.check_arms(result, base, adapter, release, tokens)
    export(Recipe(base=original, adapter=asked.adapter, out=tmp_path / "merged"), dtype="float32")
    live = PeftModel.from_pretrained(rig.dense(original, AutoModelForCausalLM), adapter)
    want, got = (
        live.merge_and_unload().state_dict(),
        rig.dense(tmp_path / "merged", AutoModelForCausalLM),
    )
    torch.testing.assert_close(dict(got.state_dict()), dict(want), rtol=0, atol=0)


@pytest.mark.parametrize("whole", [None, "attn.c_proj"])
def test_a_kind_that_is_put_on_linears_only(
    whole: str | None, tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    """OFT trained on packed linears, which is how it comes to a model of Conv1Ds."""
    write("GPT2", tmp_path, tokenizer)
    original, adapter = tmp_path / "original", tmp_path / "oft"
    linear = build_skeleton(rig.dense(original, AutoModelForCausalLM).config).model
    linear = linear.to_empty(device="cpu")
    linear.tie_weights()
    own = rig.dense(original, AutoModelForCausalLM).state_dict()
    modules = linear.named_modules()
    turned = {f"{n}.weight" for n, m in modules if n.endswith(("c_attn", "c_proj", "c_fc"))}
    linear.load_state_dict({n: t.T if n in turned else t for n, t in own.items()})
    targets = ["c_attn", "mlp.c_proj"]
    config = OFTConfig(task_type="CAUSAL_LM", oft_block_size=8, r=0, target_modules=targets)
    config.modules_to_save = [whole] if whole else None
    tiny.train(linear, config, adapter)
    asked = Recipe(base=original, adapter=(str(adapter),), out=tmp_path / "out")
    if whole:
        with pytest.raises(PlanError, match="Conv1D"):
            export(asked, dtype="float32")
        return
    export(asked, dtype="float32")
    want = tiny.reference(linear, adapter)
    got = rig.dense(tmp_path / "out", AutoModelForCausalLM).state_dict()
    torch.testing.assert_close(
        dict(got), {n: t.T if n in turned else t for n, t in want.items()}, rtol=0, atol=1e-6
    )


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
