"""bitsandbytes checkpoints against bitsandbytes' own decoding, equal to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from qmerge.errors import CheckpointError
from qmerge.formats import open_format
from qmerge.storage.checkpoint import Checkpoint
from tests.formats import tiny

NAME = f"{tiny.Q_PROJ}.weight"
SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def parts_4bit(
    dense: torch.Tensor,
    *,
    kind: str = "nf4",
    blocksize: int = 64,
    double: bool = False,
    storage: torch.dtype = torch.uint8,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The stored tensors, as `Linear4bit` names them, and what bitsandbytes decodes them to."""
    packed, state = bnb.quantize_4bit(
        dense,
        blocksize=blocksize,
        compress_statistics=double,
        quant_type=kind,
        quant_storage=storage,
    )
    parts = {NAME: packed}
    parts |= {f"{NAME}.{key}": part for key, part in state.as_dict(packed=True).items()}
    return parts, bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 1024])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits(
    tmp_path: Path, kind: str, blocksize: int, double: bool, dtype: torch.dtype
) -> None:
    """640 blocks of 64, so that double quantization has more than one block of its own."""
    parts, theirs = parts_4bit(
        weight(40, 1024).to(dtype), kind=kind, blocksize=blocksize, double=double
    )
    opened = open_format(tiny.save(tmp_path, parts, SETTINGS))
    assert torch.equal(opened.dense(NAME), theirs.float())
    assert torch.equal(opened.dense(NAME, torch.bfloat16), theirs.bfloat16())
    assert torch.equal(opened.rows(NAME, 3, 7), theirs[3:7].float())
    stored = opened.weights[NAME]
    assert (stored.shape, stored.dtype, stored.quantized) == ((40, 1024), dtype, True)
    assert set(stored.sources) == set(parts)
    assert opened.integer(NAME) is None
    assert opened.name == f"bitsandbytes-{kind}"
    assert opened.summary.block_size == blocksize
    assert opened.summary.double_quantization is double
    assert opened.summary.bits == 4


def test_blocks_longer_than_a_row(tmp_path: Path) -> None:
    """Blocks run on over the ends of rows. The reference is written out here: the CPU kernel of
    bitsandbytes 0.50 for AVX-512 gets this case wrong, its other kernels do not."""
    packed, state = bnb.quantize_4bit(weight(16, 96), blocksize=512, quant_type="nf4")
    parts = {NAME: packed}
    parts |= {f"{NAME}.{key}": part for key, part in state.as_dict(packed=True).items()}
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten().long()
    wanted = state.code[codes] * state.absmax.repeat_interleave(512)
    opened = open_format(tiny.save(tmp_path, parts, SETTINGS))
    assert torch.equal(opened.dense(NAME), wanted.view(16, 96))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(7, 9), (5, 13), (3, 64), (33, 70)])
def test_shapes_that_fill_no_block(tmp_path: Path, shape: tuple[int, int], double: bool) -> None:
    # bitsandbytes compiles its plain kernel, which takes seconds and changes no number.
    with torch.compiler.set_stance("force_eager"):
        parts, theirs = parts_4bit(weight(*shape), double=double)
    opened = open_format(tiny.save(tmp_path, parts, SETTINGS))
    assert torch.equal(opened.dense(NAME), theirs)


def test_decoded_in_more_than_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, theirs = parts_4bit(weight(33, 70), double=True)
    monkeypatch.setattr("qmerge.formats.integer.CHUNK", 128)
    assert torch.equal(open_format(tiny.save(tmp_path, parts, SETTINGS)).dense(NAME), theirs)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_kept_in_another_dtype(tmp_path: Path, storage: torch.dtype) -> None:
    """`bnb_4bit_quant_storage`, which sharded training asks for."""
    parts, theirs = parts_4bit(weight(32, 64), storage=storage)
    assert parts[NAME].dtype == storage
    assert torch.equal(open_format(tiny.save(tmp_path, parts, SETTINGS)).dense(NAME), theirs)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_checkpoint_saved_by_transformers(
    tiny_original: Path, tmp_path: Path, kind: str, double: bool
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    AutoModelForCausalLM.from_pretrained(
        tiny_original, quantization_config=config, dtype=torch.float16
    ).save_pretrained(tmp_path)
    compare_with_their_state(Checkpoint.open(tmp_path), kind=kind, double=double)


def test_a_real_checkpoint(shared: Path) -> None:
    folder = shared / "models" / "base-nf4"
    compare_with_their_state(Checkpoint.open(folder), kind="nf4", double=True)


def compare_with_their_state(checkpoint: Checkpoint, *, kind: str, double: bool) -> None:
    opened = open_format(checkpoint)
    quantized = [w for w in opened.weights.values() if w.quantized]
    assert quantized
    for stored in quantized:
        rest = {s.removeprefix(f"{stored.name}."): checkpoint.read(s) for s in stored.sources[1:]}
        state = bnb.QuantState.from_dict(rest, device="cpu")
        theirs = bnb.dequantize_4bit(checkpoint.read(stored.name), state)
        assert torch.equal(opened.dense(stored.name), theirs.float())
    assert opened.summary.checkpoint_format == kind
    assert opened.summary.double_quantization is double
    assert not opened.summary.lm_head


def test_int8(tmp_path: Path) -> None:
    codes, scales, _ = bnb.int8_vectorwise_quant(weight(24, 40).half())
    parts = {
        NAME: codes,
        f"{tiny.Q_PROJ}.SCB": scales,
        f"{tiny.Q_PROJ}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    own = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    opened = open_format(tiny.save(tmp_path, parts, own))
    theirs = bnb.int8_vectorwise_dequant(codes, scales)
    assert torch.equal(opened.dense(NAME), theirs)
    assert torch.equal(opened.dense(NAME, torch.float16), theirs.half())
    assert torch.equal(opened.rows(NAME, 3, 7), theirs[3:7])
    assert opened.name == "bitsandbytes-int8"
    assert (opened.summary.bits, opened.summary.block_size) == (8, None)
    assert opened.weights[NAME].dtype == torch.bfloat16
    assert set(opened.weights[NAME].sources) == set(parts)


def test_int8_saved_by_transformers(tiny_original: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        tiny_original, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    model.save_pretrained(tmp_path)
    opened = open_format(Checkpoint.open(tmp_path))
    compared = 0
    for name, module in model.named_modules():
        if type(module).__name__ != "Linear8bitLt":
            continue
        theirs = bnb.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        assert torch.equal(opened.dense(f"{name}.weight"), theirs)
        compared += 1
    assert compared == opened.summary.quantized == 21


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
)
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    parts, _ = parts_4bit(weight(32, 64), double=True)
    del parts[f"{NAME}{part}"]
    with pytest.raises(CheckpointError, match=f"{NAME}{part} is missing"):
        open_format(tiny.save(tmp_path, parts, SETTINGS))


def test_parts_without_a_state_are_named(tmp_path: Path) -> None:
    parts, _ = parts_4bit(weight(32, 64))
    whole = dict(parts) | {f"other.{name}": part.clone() for name, part in parts.items()}
    del whole[f"{NAME}.quant_state.bitsandbytes__nf4"]
    with pytest.raises(CheckpointError, match=r"q_proj\.weight"):
        open_format(tiny.save(tmp_path, whole, SETTINGS))


@pytest.mark.parametrize("part", ["", ".absmax"])
def test_a_part_that_does_not_fit_is_named(tmp_path: Path, part: str) -> None:
    parts, _ = parts_4bit(weight(32, 64))
    parts[f"{NAME}{part}"] = parts[f"{NAME}{part}"][:3]
    with pytest.raises(CheckpointError, match=f"{NAME}{part}: shape"):
        open_format(tiny.save(tmp_path, parts, SETTINGS))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int8"},
        {"dtype": "nonsense"},
        {"dtype": "nn"},
        {"blocksize": 0},
        {"shape": None},
        {"quant_type": "nf2"},
        None,
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, change: dict[str, Any] | None) -> None:
    parts, _ = parts_4bit(weight(32, 64))
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    text = "{" if change is None else json.dumps(json.loads(bytes(parts[key].tolist())) | change)
    parts[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="quant_state"):
        open_format(tiny.save(tmp_path, parts, SETTINGS))


def test_int8_that_is_none_is_refused(tmp_path: Path) -> None:
    scale = {f"{tiny.Q_PROJ}.SCB": torch.ones(4)}
    own = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for place, codes in enumerate((None, torch.ones(4, 4), torch.ones(5, 4, dtype=torch.int8))):
        parts = scale if codes is None else scale | {NAME: codes}
        with pytest.raises(CheckpointError, match="q_proj"):
            open_format(tiny.save(tmp_path / str(place), parts, own))


def test_tiled_int8_is_refused(tmp_path: Path) -> None:
    parts = {
        NAME: torch.ones(4, 4, dtype=torch.int8),
        f"{tiny.Q_PROJ}.SCB": torch.ones(4),
        f"{tiny.Q_PROJ}.weight_format": torch.tensor(2, dtype=torch.uint8),
    }
    with pytest.raises(CheckpointError, match="weight_format"):
        open_format(tiny.save(tmp_path, parts, SETTINGS))


def test_settings_without_one_quantized_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor is quantized"):
        open_format(tiny.save(tmp_path, {}, SETTINGS))
