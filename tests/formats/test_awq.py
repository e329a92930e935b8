"""AWQ in the gemm layout: its published order in plain loops, and gptqmodel's own decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge.errors import CheckpointError
from qmerge.formats import open_format
from qmerge.formats.integer import IntegerWeight
from tests.formats import tiny

NAME = f"{tiny.Q_PROJ}.weight"
SETTINGS = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
}
# AutoAWQ's packing: the lowest field of a word holds output 0, the next one output 2, …
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_gemm(codes: torch.Tensor) -> torch.Tensor:
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for word in range(words.shape[1]):
        for field, output in enumerate(ORDER):
            words[:, word] |= codes[:, word * 8 + output].long() << (4 * field)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def parts(weight: IntegerWeight) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack_gemm(weight.codes_OI.T),
        "qzeros": pack_gemm(weight.zeros_OG.T),
        "scales": weight.scales_OG.T,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 16, -1])
@pytest.mark.parametrize("rows", [8, 32])
def test_read_as_autoawq_packs(
    tmp_path: Path, rows: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = tiny.grid(rows=rows, group_size=group_size, symmetric=False, dtype=dtype)
    own = SETTINGS | {"group_size": group_size}
    opened = open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts(weight)), own))
    assert tiny.same_grid(opened.integer(NAME), weight)
    assert torch.equal(opened.dense(NAME), tiny.naive_dense(weight))
    assert torch.equal(opened.rows(NAME, 3, 7), weight.dense()[3:7])
    assert opened.weights[NAME].shape == (rows, 64)
    assert opened.name == "awq-gemm"


def test_the_summary_says_what_inspect_shows(tmp_path: Path) -> None:
    weight = tiny.grid(symmetric=False)
    summary = open_format(
        tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts(weight)), SETTINGS)
    ).summary
    assert (summary.method, summary.checkpoint_format) == ("awq", "gemm")
    assert (summary.bits, summary.group_size, summary.symmetric) == (4, 32, False)
    assert (summary.quantized, summary.dense) == (1, 1)


def test_old_spellings_in_a_file_beside_it(tmp_path: Path) -> None:
    weight = tiny.grid(symmetric=False)
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    tensors = tiny.under(tiny.Q_PROJ, parts(weight))
    opened = open_format(tiny.save(tmp_path, tensors, None, quant_config=old))
    assert tiny.same_grid(opened.integer(NAME), weight)


@pytest.mark.parametrize("symmetric", [False, True])
def test_as_gptqmodel_packs_and_decodes(tmp_path: Path, symmetric: bool) -> None:
    pytest.importorskip("gptqmodel", reason="needs the extra 'verify'")
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight = tiny.grid(symmetric=symmetric)
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = weight.dense()
    theirs = AwqTorchLinear(
        bits=4,
        group_size=32,
        sym=symmetric,
        desc_act=False,
        in_features=64,
        out_features=32,
        register_buffers=True,
    )
    theirs.pack(linear, weight.scales_OG.float(), weight.zeros_OG.float())
    stored = {key: getattr(theirs, key) for key in ("qweight", "qzeros", "scales")}
    for key, part in parts(weight).items():
        assert torch.equal(stored[key], part), key
    own = {"quant_method": "awq", "bits": 4, "group_size": 32, "sym": symmetric, "format": "gemm"}
    opened = open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, stored), own))
    decoded = dequantize_gemm(bits=4, group_size=32, **stored)
    assert decoded.dtype == torch.float16
    assert torch.equal(opened.dense(NAME).half(), decoded.T)
    assert opened.summary.symmetric is symmetric


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_missing_part_is_named(tmp_path: Path, suffix: str) -> None:
    whole = parts(tiny.grid())
    tensors = tiny.under("other", whole) | tiny.under(tiny.Q_PROJ, whole)
    del tensors[f"{tiny.Q_PROJ}.{suffix}"]
    with pytest.raises(CheckpointError, match="q_proj"):
        open_format(tiny.save(tmp_path, tensors, SETTINGS))


@pytest.mark.parametrize("suffix", ["qzeros", "scales"])
def test_a_part_that_does_not_fit_is_named(tmp_path: Path, suffix: str) -> None:
    whole = parts(tiny.grid())
    whole[suffix] = whole[suffix][:1]
    with pytest.raises(CheckpointError, match=f"q_proj.{suffix}: shape"):
        open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, whole), SETTINGS))


def test_a_group_index_belongs_to_another_format(tmp_path: Path) -> None:
    whole = parts(tiny.grid()) | {"g_idx": torch.zeros(64, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"q_proj\.g_idx"):
        open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, whole), SETTINGS))


@pytest.mark.parametrize(
    "change",
    [{"version": "gemv"}, {"version": "marlin"}, {"bits": 8}, {"backend": "llm-awq"}],
)
def test_other_layouts_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    tensors = tiny.under(tiny.Q_PROJ, parts(tiny.grid()))
    with pytest.raises(CheckpointError, match="AWQ with"):
        open_format(tiny.save(tmp_path, tensors, SETTINGS | change))


def test_settings_without_one_quantized_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor is quantized"):
        open_format(tiny.save(tmp_path, {}, SETTINGS))
