"""Checkpoints that llm-compressor wrote, against what compressed-tensors decodes them to.

llm-compressor needs other versions of its libraries than qmerge's tests: it works in an environment
of its own, whose interpreter QMERGE_LLM_COMPRESSOR names.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qmerge.formats import open_format
from qmerge.storage.checkpoint import Checkpoint
from tests import checkpoints

PYTHON = os.environ.get("QMERGE_LLM_COMPRESSOR")
LINEARS = 21

WRITE = """
import sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import CompressedTensorsConfig

original, out, text, oracle = sys.argv[1:]
KEPT = ["lm_head"]

def weights(bits, symmetric=True, group=32, **options):
    how = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **how, **options}

def plain(own, modifier=QuantizationModifier, **options):
    groups = {"g": {"targets": ["Linear"], "weights": own}}
    return modifier(config_groups=groups, ignore=KEPT, **options)

def scheme(name):
    return QuantizationModifier(scheme=name, targets=["Linear"], ignore=KEPT)

fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
recipes = {
    "4 bits": plain(weights(4)),
    "4 bits asymmetric": plain(weights(4, False)),
    "4 bits by channel": plain(weights(4, group=None)),
    "8 bits by channel": plain(weights(8, group=None)),
    "3 bits": plain(weights(3)),
    "2 bits asymmetric": plain(weights(2, False)),
    "by GPTQ, act-order": plain(weights(4, actorder="weight"), GPTQModifier),
    "int8": scheme("W8A8"),
    "fp8": scheme("FP8"),
    "fp8 by channel": scheme("FP8_DYNAMIC"),
    "fp8 blocks": plain(fp8 | {"strategy": "block", "block_structure": [32, 32]}),
    "with a cache in fp8": plain(
        weights(4), kv_cache_scheme=fp8 | {"strategy": "tensor", "dynamic": False}
    ),
    "mixed": QuantizationModifier(
        config_groups={
            "a": {"targets": ["re:.*down_proj"], "weights": weights(8, group=None)},
            "b": {"targets": ["re:.*(q|k|v|o|gate|up)_proj"], "weights": weights(4)},
        },
        ignore=[*KEPT, "re:.*layers.1.*up_proj"],
    ),
}
tokenizer, words = AutoTokenizer.from_pretrained(original), open(text).read()
rows = [tokenizer(words[i : i + 400], truncation=True, max_length=128) for i in range(0, 3200, 400)]
for name, recipe in recipes.items():
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    data = Dataset.from_list([dict(row) for row in rows])
    oneshot(
        model=model, recipe=recipe, dataset=data, num_calibration_samples=8, max_seq_length=128
    )
    model.save_pretrained(f"{out}/{name}", save_compressed=True)
    decoded = AutoModelForCausalLM.from_pretrained(
        f"{out}/{name}",
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    found = {k: v.clone() for k, v in decoded.state_dict().items() if k.endswith("_proj.weight")}
    save_file(found, f"{oracle}/{name}.safetensors")
"""


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="QMERGE_LLM_COMPRESSOR names no interpreter")
def test_what_llm_compressor_wrote(tiny_original: Path, tmp_path: Path) -> None:
    out, oracle, text = (tmp_path / name for name in ("out", "oracle", "text"))
    oracle.mkdir()
    text.write_text(checkpoints.texts()[0][:3200], encoding="utf-8")
    home = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(PYTHON), "-c", WRITE, *map(str, (tiny_original, out, text, oracle))],
        capture_output=True, text=True, cwd=tmp_path, env=home, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    written = sorted(folder.name for folder in out.iterdir())
    assert len(written) == 13
    for name in written:
        opened = open_format(Checkpoint.open(out / name))
        theirs = load_file(oracle / f"{name}.safetensors")
        assert len(theirs) == LINEARS
        assert opened.summary.quantized == LINEARS - (name == "mixed"), name
        for parameter, weight in theirs.items():
            assert weight.dtype == torch.bfloat16
            assert torch.equal(opened.dense(parameter, torch.bfloat16), weight), (name, parameter)
