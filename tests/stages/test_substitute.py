"""Whether a model is a base's original: by the bits of each linear, and where scales were moved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.errors import ModelError, PlanError
from qmerge.formats import open_format
from qmerge.formats.gptq import pack_gptq
from qmerge.model.opening import open_model, open_original
from qmerge.pipeline import run
from qmerge.recipe import Recipe
from qmerge.stages.substitute import likeness, unlike
from qmerge.storage.checkpoint import Checkpoint
from tests import checkpoints
from tests import test_matrix as forms

Change = Callable[[str, torch.Tensor], torch.Tensor]


def changed(original: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(original, folder)
    for file in folder.glob("*.safetensors"):
        tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def scaled(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Scales moved out of the MLP's norm into the linears behind it, as AWQ does."""
    scale = torch.linspace(0.9, 1.1, 64)
    if "post_attention_layernorm" in name:
        return (tensor.float() / scale).to(tensor)
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return (tensor.float() * scale).to(tensor)
    return tensor


def compared(base: Path, original: Path, *, alone: bool = False) -> str | None:
    skeleton, weights = open_model(base)
    found = open_original(Checkpoint.open(original), skeleton, weights)
    linears = {f"{name}.weight" for name in skeleton.linears()}
    return unlike(likeness(weights, found, skeleton.units(), linears, lambda _: None, alone=alone))


def test_each_linear_by_its_own_bits(tiny_original: Path, tmp_path: Path) -> None:
    """8 bits and, in one layer, 2, which cost a hundred times as much."""
    base = tmp_path / "base"
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": forms.GROUP,
        "sym": True,
        "desc_act": False,
        "dynamic": {r"+:.*up_proj": {"bits": 2}},
    }

    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        bits = 2 if tuple(weight.shape) == (192, 64) else 8
        return pack_gptq(forms.rounded(weight, bits, symmetric=True))

    settings["dynamic"] |= {r"+:.*gate_proj": {"bits": 2}}
    forms.packed(settings, pack)(tiny_original, base)
    assert compared(base, tiny_original) is None
    generator = torch.Generator().manual_seed(0)

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator) * 0.2 * tensor.float().std()
        return (tensor.float() + noise).to(tensor) if "o_proj" in name else tensor

    other = changed(tiny_original, tmp_path / "other", moved)
    message = compared(base, other)
    assert message is not None
    assert "o_proj.weight 0.2, where 8 bits explain up to 0.08" in message
    assert "up_proj" not in message


def test_a_dense_base_is_compared_too(tiny_original: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    from qmerge.export import export

    export(Recipe(base=tiny_nf4, out=tmp_path / "decoded"))
    assert compared(tmp_path / "decoded", tiny_original) is None
    assert compared(tiny_original, tiny_original) is None
    other = changed(
        tiny_original, tmp_path / "other", lambda name, t: -t if "q_proj" in name else t
    )
    assert "q_proj.weight 2, where" in str(compared(tmp_path / "decoded", other))
    # What is only measured against is judged by what no quantizer touches.
    assert compared(tmp_path / "decoded", other, alone=True) is None
    again = changed(other, tmp_path / "again", lambda name, t: 2 * t if "norm" in name else t)
    assert "norm" in str(compared(tmp_path / "decoded", again, alone=True))


def test_a_model_of_other_shapes_is_told_of_beside_the_base(tiny_nf4: Path, tmp_path: Path) -> None:
    skeleton, base = open_model(tiny_nf4)
    for name, options, said in (
        ("vocabulary", {"vocab_size": 600}, "[600, 64], the base says [512, 64]"),
        ("shallow", {"num_hidden_layers": 2}, "no tensor for model.layers.2"),
    ):
        checkpoints.write_untrained(tmp_path / name, **options)
        with pytest.raises(PlanError) as caught:
            open_original(Checkpoint.open(tmp_path / name), skeleton, base)
        (fault,) = caught.value.faults
        assert said in fault.message
        assert fault.hint == "give the very model that the base was made of"


def asked(
    base: Path, original: Path, adapter: Path, calibration: Path, evaluation: Path, out: Path
) -> Recipe:
    recipe = forms.asked(base, original, adapter, calibration, evaluation, out)
    return replace(recipe, calibration_samples=8, eval_windows=2)


def test_moved_scales_are_told(
    tiny_original: Path,
    tiny_adapter: Path,
    calibration_text: Path,
    eval_text: Path,
    tmp_path: Path,
) -> None:
    """What was trained on such a base is not merged onto the original, and the error of quantizing
    it, which would be that of the scales, is not told."""
    base, out = tmp_path / "base", tmp_path / "release"
    forms.awq()(changed(tiny_original, tmp_path / "scaled", scaled), base)
    recipe = asked(base, tiny_original, tiny_adapter, calibration_text, eval_text, out)
    with pytest.raises(ModelError, match="AWQ and SmoothQuant") as caught:
        run(replace(recipe, strategy="substitute"))
    assert "--strategy dequantize" in str(caught.value.hint)
    result = run(replace(recipe, restart=True))
    assert any("AWQ and SmoothQuant" in warning for warning in result.warnings)
    assert result.survival is not None
    assert result.survival.error_ratio is None
    assert "original" in result.arms


@pytest.mark.slow
def test_a_base_that_gptqmodel_made_with_awq(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gptqmodel = pytest.importorskip("gptqmodel", reason="needs the extra 'verify'")
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    original, base = tmp_path / "original", tmp_path / "base"
    checkpoints.write_original(original, num_key_value_heads=4)
    checkpoints.write_gptq(
        original, base, method="awq", format="gemm", sym=False, backend=gptqmodel.BACKEND.AWQ_TORCH
    )
    assert "AWQ and SmoothQuant" in str(compared(base, original))
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    checkpoint = Checkpoint.open(base)
    opened = open_format(checkpoint)
    packed = [weight for weight in opened.weights.values() if weight.quantized]
    assert len(packed) == 21
    for weight in packed:
        codes, zeros, scales = (checkpoint.read(name) for name in weight.sources)
        theirs = dequantize_gemm(codes, zeros, scales, 4, forms.GROUP).T
        assert torch.equal(opened.dense(weight.name).to(theirs.dtype), theirs)
