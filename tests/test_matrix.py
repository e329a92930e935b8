"""`qmerge run` from every form in which a base may lie on disk to a release that is proved.

Bases are the small checkpoint in each form. Those that a library writes in seconds are written by
it; where it needs long, codes rounded to nearest are packed by rules that tests/formats compare
with the library's own, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.formats import IntegerWeight, open_format
from qmerge.formats.compressed_tensors import pack_compressed
from qmerge.formats.gptq import pack_gptq
from qmerge.pipeline import run
from qmerge.plan import make_plan
from qmerge.recipe import Recipe
from qmerge.storage.checkpoint import Checkpoint
from qmerge.verify import verify
from tests import checkpoints
from tests.formats.test_awq import parts as awq_parts

Parts = dict[str, torch.Tensor]
Write = Callable[[Path, Path], None]
GROUP = checkpoints.GROUP_SIZE
FP8_BLOCK = 32


def rounded(
    weight_OI: torch.Tensor,
    bits: int,
    *,
    symmetric: bool,
    group: int = GROUP,
    shuffled: bool = False,
) -> IntegerWeight:
    """A weight rounded to nearest on a grid of its own."""
    rows, columns = weight_OI.shape
    width = columns if group == -1 else group
    order = torch.arange(columns)
    if shuffled:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    parts = weight_OI.float()[:, order].view(rows, -1, width)
    top = (1 << bits) - 1
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    steps = ((high - low) / top).clamp(min=1e-6).half()
    zeros = (top + 1) // 2 * torch.ones_like(steps).int()
    if not symmetric:
        zeros = (-low / steps.float()).round().clamp(0, top).int()
    codes = (parts / steps.float().unsqueeze(2)).round() + zeros.unsqueeze(2)
    codes_OI = torch.empty(rows, columns, dtype=torch.uint8)
    codes_OI[:, order] = codes.clamp(0, top).to(torch.uint8).flatten(1)
    groups = torch.empty(columns, dtype=torch.int32)
    groups[order] = torch.arange(columns, dtype=torch.int32) // width
    return IntegerWeight(
        codes_OI=codes_OI,
        scales_OG=steps,
        zeros_OG=zeros,
        g_idx_I=groups if shuffled else None,
        bits=bits,
        group_size=group,
        symmetric=symmetric,
    )


def packed(
    settings: dict[str, Any],
    pack: Callable[[torch.Tensor], Parts],
    *,
    kept: tuple[str, ...] = (),
    ending: tuple[str, ...] = ("_proj.weight",),
    beside: str | None = None,
) -> Write:
    """Write a base with every linear but those `kept` packed; its settings go into config.json,
    or into the file `beside` it alone."""

    def write(original: Path, folder: Path) -> None:
        shutil.copytree(original, folder)
        for file in folder.glob("*.safetensors"):
            tensors: Parts = {}
            for name, weight in load_file(file).items():
                module = name.removesuffix(".weight")
                if not name.endswith(ending) or module.endswith(kept or ("none",)):
                    tensors[name] = weight
                else:
                    for suffix, part in pack(weight).items():
                        tensors[f"{module}.{suffix}"] = part.clone().contiguous()
            save_file(tensors, file, metadata={"format": "pt"})
        write_index(folder)
        if beside is not None:
            (folder / beside).write_text(json.dumps(settings))
            return
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = settings
        (folder / "config.json").write_text(json.dumps(config))

    return write


def write_index(folder: Path) -> None:
    names = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))


def gptq(bits: int, version: int = 1, **options: Any) -> Write:
    symmetric, said = options.pop("symmetric", True), options.pop("said", None)
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": said or options.get("group", GROUP),
        "desc_act": options.get("shuffled", False),
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return packed(
        settings,
        lambda weight: pack_gptq(
            rounded(weight, bits, symmetric=symmetric, **options),
            version=version,  # type: ignore[arg-type]
        ),
    )


def gptq_of_old() -> Write:
    """AutoGPTQ's first releases: settings in a file beside it, under old names."""
    settings = {"bits": 4, "groupsize": GROUP, "act_order": False, "damp_percent": 0.01}
    return packed(
        settings,
        lambda weight: pack_gptq(rounded(weight, 4, symmetric=True)),
        beside="quantize_config.json",
    )


def gptq_mixed() -> Write:
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "dynamic": {"-:.*down_proj": {}},
    }
    return packed(
        settings,
        lambda weight: pack_gptq(rounded(weight, 4, symmetric=True)),
        kept=("down_proj",),
    )


def awq() -> Write:
    settings = {
        "quant_method": "awq",
        "w_bit": 4,
        "q_group_size": GROUP,
        "zero_point": True,
        "version": "GEMM",
    }
    return packed(settings, lambda weight: awq_parts(rounded(weight, 4, symmetric=False)))


def compressed(bits: int, group: int = GROUP, *, symmetric: bool = True) -> Write:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
    }
    return packed(
        compressed_settings(weights, "pack-quantized"),
        lambda weight: pack_compressed(rounded(weight, bits, symmetric=symmetric, group=group)),
    )


def compressed_settings(weights: dict[str, Any], form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def compressed_int8() -> Write:
    def pack(weight: torch.Tensor) -> Parts:
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        return {
            "weight": (weight.float() / scale).round().to(torch.int8),
            "weight_scale": scale.bfloat16(),
        }

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return packed(compressed_settings(weights, "int-quantized"), pack)


def compressed_fp8() -> Write:
    def pack(weight: torch.Tensor) -> Parts:
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    return packed(compressed_settings(weights, "float-quantized"), pack)


def fp8() -> Write:
    return packed(*fp8_form())


def fp8_form() -> tuple[dict[str, Any], Callable[[torch.Tensor], Parts]]:
    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }

    def pack(weight: torch.Tensor) -> Parts:
        high, wide = (size // FP8_BLOCK for size in weight.shape)
        blocks = weight.float().view(high, FP8_BLOCK, wide, FP8_BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        code = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        return {"weight": code.view(weight.shape), "weight_scale_inv": scale}

    return settings, pack


def dense(dtype: torch.dtype, *, pickled: bool = False) -> Write:
    """As transformers writes it; pickles, which it writes no more, as it wrote them."""

    def write(original: Path, folder: Path) -> None:
        shutil.copytree(original, folder)
        names: dict[str, str] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
            if not pickled:
                save_file(tensors, file, metadata={"format": "pt"})
                continue
            shard = folder / f"pytorch_{file.stem}.bin"
            torch.save(tensors, shard)
            names |= dict.fromkeys(tensors, shard.name)
            file.unlink()
        if pickled:
            (folder / "model.safetensors.index.json").unlink()
            index = folder / "pytorch_model.bin.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return write


def bitsandbytes(**options: Any) -> Write:
    """By transformers and bitsandbytes themselves."""

    def write(original: Path, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        model = AutoModelForCausalLM.from_pretrained(
            original, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(original).save_pretrained(folder)

    return write


def gptqmodel(**options: Any) -> Write:
    """By gptqmodel itself, in half a minute."""

    def write(original: Path, folder: Path) -> None:
        pytest.importorskip("gptqmodel", reason="needs the extra 'verify'")
        checkpoints.write_gptq(original, folder, **options)

    return write


FAST: dict[str, Write] = {
    "pickled shards fp16": dense(torch.float16, pickled=True),
    "gptq v2 3 bits asymmetric act-order": gptq(3, 2, symmetric=False, shuffled=True),
    "awq": awq(),
    "fp8 blocks": fp8(),
    "compressed-tensors 4 bits asymmetric": compressed(4, symmetric=False),
}
SLOW: dict[str, Write] = {
    "fp32": dense(torch.float32),
    "bf16": dense(torch.bfloat16),
    "gptq of old": gptq_of_old(),
    "gptq 4 bits": gptq(4),
    "gptq 4 bits one group": gptq(4, group=-1),
    "gptq v2 4 bits group 1024": gptq(4, 2, group=-1, said=1024, symmetric=False),
    "gptq v2 2 bits": gptq(2, 2, symmetric=False, group=16),
    "gptq 8 bits": gptq(8),
    "gptq and dense linears": gptq_mixed(),
    "gptqmodel asymmetric": gptqmodel(sym=False),
    "gptqmodel act-order": gptqmodel(desc_act=True, act_group_aware=False),
    "nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4 double": bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    ),
    "int8": bitsandbytes(load_in_8bit=True),
    "compressed-tensors 8 bits": compressed(8, -1),
    "compressed-tensors int8": compressed_int8(),
    "compressed-tensors fp8": compressed_fp8(),
}


def asked(
    base: Path, original: Path, adapter: Path, calibration: Path, evaluation: Path, out: Path
) -> Recipe:
    return Recipe(
        base=base,
        adapter=(str(adapter),),
        original=original,
        out=out,
        calibration=str(calibration),
        calibration_samples=24,
        eval=(f"held_out={evaluation}",),
        eval_windows=8,
        sequence_length=64,
        bits=4,
        group_size=GROUP,
        symmetric=True,
    )


@pytest.mark.parametrize(
    ("form", "write"),
    [
        *(pytest.param(form, write, id=form) for form, write in FAST.items()),
        *(
            pytest.param(form, write, id=form, marks=pytest.mark.slow)
            for form, write in SLOW.items()
        ),
    ],
)
def test_from_a_base_to_a_release(
    form: str,
    write: Write,
    tiny_original: Path,
    tiny_adapter: Path,
    calibration_text: Path,
    eval_text: Path,
    tmp_path: Path,
) -> None:
    base, out = tmp_path / "base", tmp_path / "release"
    write(tiny_original, base)
    recipe = asked(base, tiny_original, tiny_adapter, calibration_text, eval_text, out)
    result = run(recipe)
    scores = {arm: found["held_out"] for arm, found in result.arms.items()}
    original, trained = scores["original"].perplexity, scores["trained"].perplexity
    # A base in 2 or 3 bits rounded to nearest is worse by itself; what is made of it is not.
    assert scores["quantized_base"].perplexity < (1.05 if few_bits(base) > 3 else 3) * original
    release = scores["release"]
    assert release.kl is not None
    assert abs(math.log(release.perplexity / trained)) < 0.02
    assert release.kl.mean < 0.02
    assert result.survival is not None
    assert 0.95 < (result.survival.survival or 0) < 1.05
    ratio = result.survival.error_ratio
    assert ratio is not None
    assert (ratio > 1e-3) is (few_bits(base) < 16)
    proof = verify(out)
    assert [check for check in proof.checks if check.outcome == "fail"] == []


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, -1, True), (4, GROUP, True), (4, GROUP, False)]
)
def test_a_compressed_base_gives_bits_and_group(
    bits: int,
    group: int,
    symmetric: bool,
    tiny_original: Path,
    tiny_adapter: Path,
    calibration_text: Path,
    eval_text: Path,
    tmp_path: Path,
) -> None:
    base, out = tmp_path / "base", tmp_path / "release"
    compressed(bits, group, symmetric=symmetric)(tiny_original, base)
    recipe = asked(base, tiny_original, tiny_adapter, calibration_text, eval_text, out)
    left = dataclasses.replace(recipe, bits=None, group_size=None, symmetric=None)
    settings = make_plan(left).ready().settings
    assert (settings.spec.bits, settings.spec.group_size) == (bits, group)
    assert (settings.spec.symmetric, settings.format) == (True, "gptq")


@pytest.mark.slow
def test_from_a_base_with_a_quantized_head(
    tiny_original: Path,
    tiny_adapter: Path,
    calibration_text: Path,
    eval_text: Path,
    tmp_path: Path,
) -> None:
    """It is decoded for the release, which keeps its head in 16 bits."""
    untied, base, out = (tmp_path / name for name in ("untied", "base", "release"))
    shutil.copytree(tiny_original, untied)
    embedding = Checkpoint.open(untied).read("model.embed_tokens.weight").clone()
    save_file({"lm_head.weight": embedding}, untied / "head.safetensors")
    write_index(untied)
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    settings = {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "lm_head": True}
    packed(
        settings,
        lambda weight: pack_gptq(rounded(weight, 8, symmetric=True)),
        ending=("_proj.weight", "lm_head.weight"),
    )(untied, base)
    assert open_format(Checkpoint.open(base)).summary.lm_head
    result = run(asked(base, untied, tiny_adapter, calibration_text, eval_text, out))
    scores = {arm: found["held_out"].perplexity for arm, found in result.arms.items()}
    assert abs(math.log(scores["quantized_base"] / scores["original"])) < 0.01
    assert abs(math.log(scores["release"] / scores["trained"])) < 0.02
    head = Checkpoint.open(out).tensors["lm_head.weight"]
    assert (head.dtype, head.shape) == (torch.bfloat16, tuple(embedding.shape))
    assert [check for check in verify(out).checks if check.outcome == "fail"] == []


def few_bits(base: Path) -> int:
    return open_format(Checkpoint.open(base)).summary.bits or 16
