"""Small checkpoints of any configuration with an adapter, and what other libraries make of both.

Weights are random and loud: logits are far from uniform, and biases and norms are no constants, so
that one that was left out or put elsewhere shows in the perplexity.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qmerge.formats import open_format
from qmerge.recipe import Recipe
from qmerge.results import RunResult
from qmerge.storage.checkpoint import Checkpoint

LENGTH, WINDOWS, SAMPLES, GROUP = 32, 8, 16, 32
TOLERANCE = 1e-3
NOISE = 0.1


def make_loud(model: Any) -> None:
    """Random weights that keep the size of what passes through them; noise on all else."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(NOISE * noise)


def write_model(folder: Path, model: Any, tokenizer: Path) -> None:
    """`model` with loud random weights in bfloat16, as transformers saves it, and a tokenizer."""
    make_loud(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def write_adapter(folder: Path, model: Any, **options: Any) -> None:
    """LoRA of rank 4 by PEFT, on every linear outside the head unless `options` say otherwise."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    get_peft_model(model, config).save_pretrained(folder)


def write_nf4(original: Path, folder: Path, loader: Any) -> None:
    """bitsandbytes nf4 with double quantization, as transformers saves it."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = loader.from_pretrained(original, quantization_config=quantization, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in original.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())


def loaded(folder: Path, loader: Any) -> Any:
    """A checkpoint as transformers loads it with whatever library its format needs."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer its worker pool does not start
    return loader.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def dense(folder: Path, loader: Any) -> Any:
    """A checkpoint of bitsandbytes decoded by it, or a dense one, in float32."""
    model = loaded(folder, loader)
    quantized = getattr(model, "is_quantized", False)
    return (model.dequantize(dtype=torch.float32) if quantized else model).float().eval()


def reopened(release: Path, folder: Path, loader: Any, turned: bool = False) -> Any:
    """A release decoded by our reader under the names it has on disk, loaded by transformers.

    `turned` is for a model that keeps as [I, O] what a packed weight has as [O, I].
    """
    from safetensors.torch import save_file

    form = open_format(Checkpoint.open(release))
    folder.mkdir()
    tensors = {
        name: form.dense(name).T.contiguous() if turned and weight.quantized else form.dense(name)
        for name, weight in form.weights.items()
    }
    save_file(tensors, folder / "model.safetensors")
    for code in release.glob("*.py"):
        (folder / code.name).write_bytes(code.read_bytes())
    config = json.loads((release / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return dense(folder, loader)


def perplexity(model: Any, tokens: torch.Tensor, **inputs: Any) -> float:
    """Mean over all targets, by transformers alone."""
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False, **inputs).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return math.exp(loss.item())


def windows(folder: Path, text: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), verbose=False)["input_ids"]
    return torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


def recipe(base: Path, adapter: Path, out: Path, text: Path, **options: Any) -> Recipe:
    settings: Mapping[str, Any] = {
        "calibration": str(text),
        "calibration_samples": SAMPLES,
        "eval": (f"text={text}",),
        "eval_windows": WINDOWS,
        "sequence_length": LENGTH,
        "group_size": GROUP,
    } | options
    return Recipe(base=base, adapter=(str(adapter),), out=out, **settings)


def check_arms(
    result: RunResult,
    quantized: Any,
    adapter: Path,
    release: Any,
    tokens: torch.Tensor,
    tolerance: float = TOLERANCE,
) -> None:
    """Every arm of a run against plain transformers and PEFT on the same tokens."""
    from peft import PeftModel

    found = {arm: score["text"].perplexity for arm, score in result.arms.items()}
    expected = {"quantized_base": perplexity(quantized, tokens)}
    trained = PeftModel.from_pretrained(quantized, adapter).eval()
    expected["trained"] = perplexity(trained, tokens)
    if not getattr(quantized, "is_quantized", False):  # PEFT does not merge into packed weights
        expected["merged"] = perplexity(trained.merge_and_unload(), tokens)
    expected["release"] = perplexity(release, tokens)
    wrong = {
        arm: (found[arm], value)
        for arm, value in expected.items()
        if not abs(found[arm] / value - 1) < tolerance
    }
    assert not wrong, wrong
    assert result.arms["quantized_base"]["text"].kl.mean > 0.01  # the adapter does something
