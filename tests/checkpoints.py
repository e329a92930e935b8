"""Tiny checkpoints, written by the libraries that their users would use.

One small Qwen3 (three layers, hidden 64, tied head, vocabulary 512), its quantized forms, and an
adapter that fits them all. The text comes from the interpreter, so nothing is fetched or shipped;
the adapter's domain is the same text in capitals.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
GROUP_SIZE = 32  # the widths are 64 and 192
STEPS, BATCH, LENGTH = 40, 16, 64  # of training: perplexity 130 where a uniform guess has 512
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_STEPS = 15
HELD_OUT = 9  # every ninth topic is for evaluation


@cache
def texts() -> tuple[str, str]:
    """(for training and calibration, for evaluation); they share no document."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    evaluation = documents[::HELD_OUT]
    training = [text for i, text in enumerate(documents) if i % HELD_OUT]
    return "\n\n".join(training), "\n\n".join(evaluation)


def write_tokenizer(folder: Path) -> Any:
    """A byte-level BPE tokenizer, saved as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([texts()[0][:100_000]], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<|end|>", pad_token="<|end|>", model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def qwen3(**options: Any) -> Any:
    """The small model untrained, in float32; `options` go into its configuration."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**shape, **options}))


def write_untrained(folder: Path, **options: Any) -> None:
    """bf16 noise, without a tokenizer."""
    qwen3(**options).to(torch.bfloat16).save_pretrained(folder)


def write_original(folder: Path, **options: Any) -> None:
    """bf16, in shards, trained for a few seconds so that its weights are no noise; `options` go
    into its configuration."""
    tokenizer = write_tokenizer(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = qwen3(**ends, **options)
    _train(model, tokenizer, texts()[0], steps=STEPS)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="120KB")


def _train(model: Any, tokenizer: Any, text: str, *, steps: int) -> None:
    tokens = torch.tensor(tokenizer(text[:200_000], verbose=False)["input_ids"])
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=4e-3)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write_nf4(original: Path, folder: Path) -> None:
    """bitsandbytes nf4 with double quantization, as transformers saves it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        original, quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)


def write_adapter(original: Path, folder: Path) -> None:
    """LoRA r 4 on all seven linears, trained for a second on text in capitals."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    model = get_peft_model(model, config)
    tokenizer = AutoTokenizer.from_pretrained(original)
    _train(model, tokenizer, texts()[0].upper(), steps=ADAPTER_STEPS)
    model.save_pretrained(folder)


def write_gptq(original: Path, folder: Path, *, backend: Any = None, **options: Any) -> None:
    """GPTQ by gptqmodel; `options` go to its QuantizeConfig. The package must be installed."""
    kernel = {} if backend is None else {"backend": backend}
    settings = {"bits": 4, "group_size": GROUP_SIZE, "desc_act": False, "sym": True} | options
    with _contained():
        from gptqmodel import GPTQModel, QuantizeConfig

        model = GPTQModel.load(
            str(original), QuantizeConfig(**settings), dtype=torch.bfloat16, device="cpu"
        )
        text = texts()[0]
        model.quantize([text[i : i + 400] for i in range(0, 6400, 400)], batch_size=4, **kernel)
        model.save(str(folder))


def read_gptq(folder: Path) -> Any:
    """A packed model as gptqmodel itself loads it, without transformers' own loader."""
    with _contained():
        from gptqmodel import GPTQModel

        return GPTQModel.load(str(folder), device="cpu", dtype=torch.float32).model.eval()


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """gptqmodel prints to stdout, moves the hub's cache in the environment and opens the log."""
    environment, level = os.environ.copy(), logging.getLogger().level
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # with fewer its worker pool refuses to start
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        logging.getLogger().setLevel(level)
