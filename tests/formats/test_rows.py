"""Rows of a weight are the rows of the whole weight, wherever they begin and end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qmerge.formats import Format, open_format
from qmerge.formats.compressed_tensors import pack_compressed
from qmerge.formats.gptq import pack_gptq
from tests.formats import test_awq, test_bitsandbytes, test_compressed_tensors, test_fp8, tiny

NAME = f"{tiny.Q_PROJ}.weight"
ROWS, COLUMNS = 96, 64
PARTS = [(0, 96), (0, 1), (3, 7), (9, 42), (31, 33), (64, 96), (95, 96), (5, 5)]


def gptq(bits: int, *, shuffled: bool = False, words: bool = False) -> Callable[[Path], Format]:
    def write(folder: Path) -> Format:
        weight = tiny.grid(
            rows=ROWS, bits=bits, symmetric=False, shuffled=shuffled, lowest_zero=int(words)
        )
        settings = {
            "quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False,
            "desc_act": shuffled, "checkpoint_format": "gptq" if words else "gptq_v2",
            "meta": {"quantizer": ["gptqmodel:7.6.0"]},
        }  # fmt: skip
        parts = pack_gptq(weight, version=1 if words else 2)
        return open_format(tiny.save(folder, tiny.under(tiny.Q_PROJ, parts), settings))

    return write


def awq(folder: Path) -> Format:
    parts = test_awq.parts(tiny.grid(rows=ROWS, symmetric=False))
    return open_format(tiny.save(folder, tiny.under(tiny.Q_PROJ, parts), dict(test_awq.SETTINGS)))


def compressed(bits: int) -> Callable[[Path], Format]:
    def write(folder: Path) -> Format:
        weight = tiny.grid(rows=ROWS, bits=bits, symmetric=False)
        settings = test_compressed_tensors.settings(test_compressed_tensors.args(weight))
        parts = pack_compressed(weight)
        return open_format(tiny.save(folder, tiny.under(tiny.Q_PROJ, parts), settings))

    return write


def bitsandbytes(width: int, *, double: bool) -> Callable[[Path], Format]:
    """With 70 columns blocks of 64 run over the ends of rows, and the last one is not full."""

    def write(folder: Path) -> Format:
        dense = test_bitsandbytes.weight(ROWS, width).bfloat16()
        parts, _ = test_bitsandbytes.parts_4bit(dense, double=double)
        return open_format(tiny.save(folder, parts, test_bitsandbytes.SETTINGS))

    return write


def fp8(*shape: int) -> Callable[[Path], Format]:
    def write(folder: Path) -> Format:
        blocks = (-(-shape[-2] // 16), -(-shape[-1] // 8))
        tensors = {
            NAME: test_fp8.codes(*shape),
            f"{NAME}_scale_inv": test_fp8.scales(*shape[:-2], *blocks),
        }
        return open_format(tiny.save(folder, tensors, test_fp8.SETTINGS))

    return write


FORMS: dict[str, Callable[[Path], Format]] = {
    **{f"gptq {bits}": gptq(bits) for bits in (2, 3, 4, 8)},
    "gptq act-order": gptq(4, shuffled=True),
    "gptq v1 by words": gptq(4, words=True),
    "awq": awq,
    "compressed-tensors 3": compressed(3),
    "compressed-tensors 4": compressed(4),
    "nf4": bitsandbytes(COLUMNS, double=False),
    "nf4 double, odd": bitsandbytes(70, double=True),
    "fp8": fp8(ROWS, 25),
    "fp8 experts": fp8(ROWS, 20, 24),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_whole(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    opened = FORMS[form](tmp_path)
    whole = opened.dense(NAME, dtype)
    for start, stop in PARTS:
        found = opened.rows(NAME, start, stop, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, whole[start:stop]), (start, stop)
    for rows in (1, 5, ROWS, 2 * ROWS):
        pieces = [*opened.pieces(NAME, rows, dtype)]
        assert {len(piece) for piece in pieces[:-1]} <= {rows}
        assert torch.equal(torch.cat(pieces), whole), rows
