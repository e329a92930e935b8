"""MXFP4 against plain loops over its definition, and against transformers' own decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qmerge.errors import CheckpointError
from qmerge.formats import open_format
from tests.formats import tiny

NAME = "model.layers.0.mlp.experts.down_proj"
SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
EXPERTS, OUTS, GROUPS = 3, 6, 2


def stored() -> dict[str, torch.Tensor]:
    """Every code occurs, and exponents near both ends."""
    random = torch.Generator().manual_seed(0)
    shape = (EXPERTS, OUTS, GROUPS)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(110, 140, shape, dtype=torch.uint8, generator=random)
    scales[0, 0] = torch.tensor([1, 250])
    return {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}


def by_loops(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sign, two bits of exponent and one of mantissa, as the format defines a value."""
    blocks, scales = (tensors[f"{NAME}_{part}"].tolist() for part in ("blocks", "scales"))
    out = torch.empty(EXPERTS, GROUPS * 32, OUTS, dtype=torch.float64)
    for e in range(EXPERTS):
        for o in range(OUTS):
            for i in range(GROUPS * 32):
                byte = blocks[e][o][i // 32][i % 32 // 2]
                code = byte >> 4 if i % 2 else byte & 15
                exponent, mantissa = code >> 1 & 3, code & 1
                size = (2 + mantissa) * 2.0 ** (exponent - 2) if exponent else mantissa / 2
                sign = -1 if code & 8 else 1
                out[e, i, o] = sign * size * 2.0 ** (scales[e][o][i // 32] - 127)
    return out.float()


def test_values_of_every_block(tmp_path: Path) -> None:
    tensors = stored()
    opened = open_format(tiny.save(tmp_path, tensors, SETTINGS))
    wanted = by_loops(tensors)
    assert torch.equal(opened.dense(NAME), wanted)
    assert torch.equal(opened.dense(NAME, torch.bfloat16), wanted.bfloat16())
    assert torch.equal(opened.rows(NAME, 1, 3), wanted[1:3])
    weight = opened.weights[NAME]
    assert (weight.shape, weight.quantized) == ((EXPERTS, GROUPS * 32, OUTS), True)
    assert opened.integer(NAME) is None
    assert (opened.name, opened.summary.bits, opened.summary.quantized) == ("mxfp4", 4, 1)


def test_as_transformers_decodes_it(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = stored()
    opened = open_format(tiny.save(tmp_path, tensors, SETTINGS))
    theirs = module.convert_moe_packed_tensors(*tensors.values(), dtype=torch.bfloat16)
    assert torch.equal(opened.dense(NAME, torch.bfloat16), theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{NAME}_scales": None}, "exponents .* are missing"),
        ({f"{NAME}_blocks": None}, "no tensor is quantized"),
        ({f"{NAME}_scales": torch.zeros(3, 6, 3, dtype=torch.uint8)}, "_blocks: shape"),
        ({f"{NAME}_scales": torch.zeros(3, 6, dtype=torch.uint8)}, "_scales: shape"),
        ({f"{NAME}_scales": torch.zeros(3, 6, 2)}, "no exponent"),
        ({f"{NAME}_blocks": torch.zeros(3, 6, 2, 16)}, "no packed code"),
    ],
)
def test_parts_that_do_not_fit(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = {name: part for name, part in (stored() | change).items() if part is not None}
    with pytest.raises(CheckpointError, match=message):
        open_format(tiny.save(tmp_path, tensors, SETTINGS))


def test_an_exponent_that_is_no_number(tmp_path: Path) -> None:
    tensors = stored()
    tensors[f"{NAME}_scales"][1, 2, 0] = 255
    opened = open_format(tiny.save(tmp_path, tensors, SETTINGS))
    with pytest.raises(CheckpointError, match="_scales: holds values that are not finite"):
        opened.dense(NAME)
