"""A base that is wider inside than its original, padded as the published Int4 of Qwen2-72B is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.errors import ModelError
from qmerge.model.opening import open_model, open_original
from qmerge.pipeline import run
from qmerge.plan import make_plan
from qmerge.recipe import Recipe
from qmerge.storage.checkpoint import Checkpoint

NARROW, ADDED = 192, 32
WIDE = NARROW + ADDED


def interleaved(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """A zero behind each of the first ADDED rows or columns, then the rest as it was."""
    head, rest = weight.narrow(dim, 0, ADDED), weight.narrow(dim, ADDED, NARROW - ADDED)
    pairs = torch.stack((head, torch.zeros_like(head)), dim=dim + 1)
    return torch.cat((pairs.flatten(dim, dim + 1), rest), dim=dim)


def padded(original: Path, folder: Path) -> Path:
    """A dense copy of the model with a wider intermediate size."""
    shutil.copytree(original, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if "gate_proj" in name or "up_proj" in name:
                tensors[name] = interleaved(weight, 0)
            elif "down_proj" in name:
                tensors[name] = interleaved(weight, 1)
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": WIDE}))
    return folder


@pytest.fixture(scope="module")
def bases(tiny_original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The padded model, dense and as bitsandbytes quantizes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dense = padded(tiny_original, tmp_path_factory.mktemp("padded") / "dense")
    int8 = dense.with_name("int8")
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.bfloat16
    )
    model.save_pretrained(int8)
    AutoTokenizer.from_pretrained(dense).save_pretrained(int8)
    return {"dense": dense, "int8": int8}


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path]) -> Path:
    """Any adapter for the padded model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(bases["dense"], dtype=torch.float32)
    options = LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    folder = bases["dense"].with_name("adapter")
    get_peft_model(model, options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_the_original_is_laid_out_as_its_padded_copy(
    bases: dict[str, Path], tiny_original: Path, kind: str
) -> None:
    skeleton, base = open_model(bases[kind])
    original = open_original(Checkpoint.open(tiny_original), skeleton, base)
    wanted = Checkpoint.open(bases["dense"])
    for parameter, stored in original.names.stored.items():
        found, expected = original.tensor(parameter), wanted.read(stored).float()
        assert torch.equal(found, expected), parameter
        assert torch.equal(original.rows(parameter, 1, 9), expected[1:9])
        pieces = original.format.pieces(stored, 5)
        assert torch.equal(torch.cat([*pieces]), expected), parameter
    assert set(original.format.kept) == {(NARROW, WIDE)}  # type: ignore[attr-defined]


def test_a_wider_base_without_the_zeros_is_another_model(
    bases: dict[str, Path], tiny_original: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bases["dense"], other)
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: torch.where(t == 0, 0.01, t) for n, t in tensors.items()}, file)
    skeleton, base = open_model(other)
    with pytest.raises(ModelError, match=r"224 rows where the original has 192, and 0 of them"):
        open_original(Checkpoint.open(tiny_original), skeleton, base)


def test_a_run_substitutes_the_original_of_a_padded_base(
    bases: dict[str, Path],
    adapter: Path,
    tiny_original: Path,
    calibration_text: Path,
    eval_text: Path,
    tmp_path: Path,
) -> None:
    recipe = Recipe(
        base=bases["int8"],
        adapter=(str(adapter),),
        original=tiny_original,
        strategy="substitute",
        out=tmp_path / "release",
        calibration=str(calibration_text),
        calibration_samples=16,
        eval=(f"held_out={eval_text}",),
        eval_windows=8,
        sequence_length=64,
        group_size=32,
    )
    notes = make_plan(recipe).summary.notes
    assert any(f"padded with zeros, from {NARROW} to {WIDE}" in note for note in notes)
    result = run(recipe)
    out = tmp_path / "dense"
    plain = replace(recipe, base=bases["dense"], original=None, strategy="dequantize", out=out)
    dense = run(plain)
    merged, wanted = (found.arms["merged"]["held_out"] for found in (result, dense))
    assert merged.perplexity == pytest.approx(wanted.perplexity, rel=1e-6)
    assert json.loads((recipe.out / "config.json").read_text())["intermediate_size"] == WIDE
    assert result.survival is not None
    assert 0 < (result.survival.error_ratio or 0) < 1
