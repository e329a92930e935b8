"""The integer grid decoded against plain loops, and what all readers refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qmerge.errors import CheckpointError
from qmerge.formats import open_format
from qmerge.storage.checkpoint import Checkpoint
from tests.formats import tiny


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    ("columns", "group_size"), [(64, 32), (64, -1), (64, 64), (40, 16), (100, 64), (1, -1)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dense_is_scale_times_code_less_zero(
    bits: int, columns: int, group_size: int, shuffled: bool, dtype: torch.dtype
) -> None:
    weight = tiny.grid(
        rows=9,
        columns=columns,
        bits=bits,
        group_size=group_size,
        symmetric=False,
        shuffled=shuffled,
        dtype=dtype,
    )
    assert torch.equal(weight.dense(), tiny.naive_dense(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shuffled", [False, True])
def test_dense_in_pieces_and_rounded_once(
    monkeypatch: pytest.MonkeyPatch, shuffled: bool, dtype: torch.dtype
) -> None:
    weight = tiny.grid(rows=33, symmetric=False, shuffled=shuffled)
    whole = tiny.naive_dense(weight).to(dtype)
    monkeypatch.setattr("qmerge.formats.integer.CHUNK", 256)
    assert torch.equal(weight.dense(dtype), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_checkpoints_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    opened = open_format(tiny.save(tmp_path, {f"{tiny.Q_PROJ}.weight": stored}, None))
    name = f"{tiny.Q_PROJ}.weight"
    assert opened.name == "dense"
    assert opened.summary.method == "none"
    assert (opened.summary.dense, opened.summary.quantized) == (2, 0)
    weight = opened.weights[name]
    assert (weight.shape, weight.dtype, weight.quantized) == ((6, 4), dtype, False)
    assert weight.sources == (name,)
    assert torch.equal(opened.dense(name), stored.float())
    assert torch.equal(opened.rows(name, 2, 5), stored[2:5].float())
    assert torch.equal(opened.dense(name, torch.bfloat16), stored.bfloat16())
    assert opened.integer(name) is None


def test_what_is_read_may_be_written_into(tmp_path: Path) -> None:
    """fp32 tensors too: a merge adds in place, and the file must not change under it."""
    name = f"{tiny.Q_PROJ}.weight"
    checkpoint = tiny.save(tmp_path, {name: torch.ones(2, 2)}, None)
    opened = open_format(checkpoint)
    opened.dense(name).add_(1)
    opened.rows(name, 0, 1).add_(1)
    assert torch.equal(opened.dense(name), torch.ones(2, 2))


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    opened = open_format(tiny.save(tmp_path, {}, None))
    for read in (opened.dense, opened.integer):
        with pytest.raises(CheckpointError, match=r"no tensor model\.lm_head"):
            read("model.lm_head")


@pytest.mark.parametrize(
    "name",
    [
        "x.qweight",
        "x.scales",
        "x.weight_packed",
        "x.weight_scale",
        "x.weight_scale_inv",
        "x.SCB",
        "x.weight.absmax",
        "x.weight.quant_state.bitsandbytes__nf4",
    ],
)
def test_quantized_tensors_without_settings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        open_format(tiny.save(tmp_path, {name: torch.ones(4)}, None))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_weight_of_codes_without_scales_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=r"x\.weight: stored as"):
        open_format(tiny.save(tmp_path, {"x.weight": torch.ones(4, 4).to(dtype)}, None))


def test_buffers_and_activation_scales_are_no_leftovers(tmp_path: Path) -> None:
    opened = open_format(
        tiny.save(tmp_path, {"x.position_ids": torch.arange(4), "x.k_scale": torch.ones(1)}, None)
    )
    assert "x.position_ids" in opened.weights
    assert "x.k_scale" not in opened.weights


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'hqq'") as caught:
        open_format(tiny.save(tmp_path, {}, {"quant_method": "hqq"}))
    assert "gptq" in str(caught.value.hint)


def test_a_real_checkpoint(shared: Path) -> None:
    with Checkpoint.open(shared / "models" / "original") as checkpoint:
        opened = open_format(checkpoint)
        assert opened.summary.dtype == torch.bfloat16
        assert set(opened.weights) == set(checkpoint.tensors)
