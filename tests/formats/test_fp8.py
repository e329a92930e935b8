"""FP8 blocks against plain loops, and against transformers where it decodes them itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge.errors import CheckpointError
from qmerge.formats import open_format
from tests.formats import tiny

NAME = f"{tiny.Q_PROJ}.weight"
SETTINGS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 8],
}


def codes(*shape: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=random) * 20).to(torch.float8_e4m3fn)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.001


def by_block(code: torch.Tensor, scale: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    out = torch.empty(code.shape, dtype=torch.float32)
    for o in range(code.shape[0]):
        for i in range(code.shape[1]):
            out[o, i] = float(code[o, i]) * float(scale[o // high, i // wide])
    return out


@pytest.mark.parametrize("shape", [(32, 24), (33, 25), (5, 3), (48, 8)])
def test_a_scale_per_block(tmp_path: Path, shape: tuple[int, int]) -> None:
    code, scale = codes(*shape), scales(-(-shape[0] // 16), -(-shape[1] // 8))
    opened = open_format(tiny.save(tmp_path, {NAME: code, f"{NAME}_scale_inv": scale}, SETTINGS))
    wanted = by_block(code, scale, 16, 8)
    assert torch.equal(opened.dense(NAME), wanted)
    assert torch.equal(opened.dense(NAME, torch.bfloat16), wanted.bfloat16())
    assert torch.equal(opened.rows(NAME, 3, 5), wanted[3:5])
    stored = opened.weights[NAME]
    assert (stored.shape, stored.dtype, stored.quantized) == (shape, torch.bfloat16, True)
    assert stored.sources == (NAME, f"{NAME}_scale_inv")
    assert opened.integer(NAME) is None
    assert (opened.name, opened.summary.bits) == ("fp8", 8)


@pytest.mark.parametrize("width", [24, 25])
def test_decoded_in_more_than_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr("qmerge.formats.integer.CHUNK", 3 * width)
    code, scale = codes(50, width), scales(4, -(-width // 8))
    opened = open_format(tiny.save(tmp_path, {NAME: code, f"{NAME}_scale_inv": scale}, SETTINGS))
    assert torch.equal(opened.dense(NAME), by_block(code, scale, 16, 8))


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz],
)
def test_every_code_of_every_kind(tmp_path: Path, dtype: torch.dtype) -> None:
    code = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
    opened = open_format(
        tiny.save(tmp_path, {NAME: code, f"{NAME}_scale_inv": torch.ones(1, 2)}, SETTINGS)
    )
    assert torch.equal(opened.dense(NAME).nan_to_num(7), code.float().nan_to_num(7))


def test_as_transformers_decodes_it(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    code, scale = codes(64, 48), scales(4, 6)
    opened = open_format(tiny.save(tmp_path, {NAME: code, f"{NAME}_scale_inv": scale}, SETTINGS))
    theirs = module.Fp8Dequantize(None).convert({"weight": [code], "weight_scale_inv": [scale]})
    assert torch.equal(opened.dense(NAME), theirs["weight"])


def test_powers_of_two_as_scales(tmp_path: Path) -> None:
    code = codes(32, 24)
    scale = torch.tensor([[0.5, 1, 2], [4, 0.25, 0.125]]).to(torch.float8_e8m0fnu)
    opened = open_format(tiny.save(tmp_path, {NAME: code, f"{NAME}_scale_inv": scale}, SETTINGS))
    assert torch.equal(opened.dense(NAME), by_block(code, scale.float(), 16, 8))


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    code, scale = codes(3, 20, 24), scales(3, 2, 3)
    name = "model.layers.0.mlp.experts.down_proj"
    opened = open_format(tiny.save(tmp_path, {name: code, f"{name}_scale_inv": scale}, SETTINGS))
    for expert in range(3):
        wanted = by_block(code[expert], scale[expert], 16, 8)
        assert torch.equal(opened.dense(name)[expert], wanted)


@pytest.mark.parametrize("shape", [(), (1,), (32,), (32, 1)])
def test_a_scale_per_row_or_for_all(tmp_path: Path, shape: tuple[int, ...]) -> None:
    code, scale = codes(32, 24), scales(*shape)
    tensors = {NAME: code, f"{NAME}_scale": scale, f"{tiny.Q_PROJ}.input_scale": torch.ones(1)}
    opened = open_format(tiny.save(tmp_path, tensors, {"quant_method": "fp8"}))
    rows = scale.reshape(-1, 1).expand(32, 1)
    assert torch.equal(opened.dense(NAME), by_block(code, rows, 1, 24))
    assert set(opened.weights) == {NAME, tiny.NORM}


def test_layers_left_alone_stay_dense(tmp_path: Path) -> None:
    tensors = {
        NAME: codes(32, 24),
        f"{NAME}_scale_inv": scales(2, 3),
        "lm_head.weight": torch.ones(4, 4),
    }
    opened = open_format(tiny.save(tmp_path, tensors, SETTINGS))
    assert not opened.weights["lm_head.weight"].quantized
    assert (opened.summary.quantized, opened.summary.dense) == (1, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NAME: codes(32, 24)}, "scale_inv is missing"),
        ({NAME: codes(32, 24), f"{NAME}_scale_inv": scales(3, 3)}, "scale_inv: shape"),
        ({NAME: torch.ones(4, 4), f"{NAME}_scale_inv": scales(1, 1)}, "no tensor is quantized"),
        ({NAME: codes(32, 24), f"{NAME}_scale_inv": scales(2, 3), "x.SCB": scales(2)}, "x.SCB"),
    ],
)
def test_parts_that_do_not_fit(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_format(tiny.save(tmp_path, tensors, SETTINGS))


@pytest.mark.parametrize("block", [[128], ["a", "b"], [0, 8], 128])
def test_block_sizes_that_are_none(tmp_path: Path, block: Any) -> None:
    tensors = {NAME: codes(32, 24), f"{NAME}_scale_inv": scales(2, 3)}
    with pytest.raises(CheckpointError, match="weight_block_size"):
        open_format(tiny.save(tmp_path, tensors, SETTINGS | {"weight_block_size": block}))
