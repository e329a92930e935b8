"""Decoded and merged checkpoints against transformers and PEFT on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge.errors import CheckpointError, InputError
from qmerge.export import export
from qmerge.formats import open_format
from qmerge.storage.checkpoint import Checkpoint


def dense_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_dequantized_folder_holds_what_the_reader_decodes(tiny_nf4: Path, tmp_path: Path) -> None:
    export(tiny_nf4, tmp_path / "dense", dtype="float32")
    form = open_format(Checkpoint.open(tiny_nf4))
    dense = Checkpoint.open(tmp_path / "dense")
    assert set(dense.tensors) == set(form.weights)
    for name in form.weights:
        assert torch.equal(dense.read(name), form.dense(name)), name
    assert "quantization_config" not in dense.config
    dense_model(tmp_path / "dense")


@pytest.mark.parametrize("cores", [1, 3])
def test_pieces_and_threads_change_no_byte(
    tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr("qmerge.model.weights.PIECE", 1000)
    monkeypatch.setattr("qmerge.export.cores", lambda: cores)
    threads = torch.get_num_threads()
    written = export(tiny_nf4, tmp_path / "dense", dtype="float16")
    assert torch.get_num_threads() == threads
    form, dense = open_format(Checkpoint.open(tiny_nf4)), Checkpoint.open(tmp_path / "dense")
    assert written["tensors"] == len(form.weights) == len(dense.tensors)
    for name in form.weights:
        assert torch.equal(dense.read(name), form.dense(name).half()), name


def test_what_ends_one_unit_ends_all(
    tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmerge.formats.bitsandbytes import BitsandbytesReader

    def fail(*_args: object) -> None:
        raise CheckpointError("damaged")

    monkeypatch.setattr(BitsandbytesReader, "_decode", fail)
    with pytest.raises(CheckpointError, match="damaged"):
        export(tiny_nf4, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_untouched_16_bit_weights_keep_their_bytes(tiny_original: Path, tmp_path: Path) -> None:
    written = export(tiny_original, tmp_path / "copy")
    assert written["dtype"] == "bfloat16"
    source, copied = Checkpoint.open(tiny_original), Checkpoint.open(tmp_path / "copy")
    for name in source.tensors:
        assert torch.equal(source.read(name).view(torch.int16), copied.read(name).view(torch.int16))


def test_merged_folder_equals_peft(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    export(tiny_nf4, tmp_path / "dense", dtype="float32")
    export(tiny_nf4, tmp_path / "merged", adapter=tiny_adapter, dtype="float32")
    live = PeftModel.from_pretrained(dense_model(tmp_path / "dense"), tiny_adapter).eval()
    merged = dense_model(tmp_path / "merged")
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(merged(tokens).logits, live(tokens).logits)
    expected = live.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_nothing_is_left_of_an_export_that_fails(
    tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr("qmerge.export.write_index", fail)
    with pytest.raises(OSError, match="disk"):
        export(tiny_nf4, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_written_to(tiny_nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists"):
        export(tiny_nf4, tmp_path)
