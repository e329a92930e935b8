"""Where quantization settings are found, and which spelling counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmerge.errors import CheckpointError
from qmerge.formats import open_format
from qmerge.formats.gptq import pack_gptq
from qmerge.formats.settings import read_settings
from qmerge.storage.checkpoint import Checkpoint
from tests.formats import tiny

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
OLD = {"w_bit": 4, "q_group_size": 32, "act_order": False, "damp_percent": 0.01}


def save_gptq(folder: Path, settings: dict[str, Any] | None, **files: Any) -> Checkpoint:
    tensors = tiny.under(tiny.Q_PROJ, pack_gptq(tiny.grid()))
    return tiny.save(folder, tensors, settings, **files)


def test_settings_in_the_configuration(tmp_path: Path) -> None:
    found = read_settings(save_gptq(tmp_path, GPTQ))
    assert (found.method, found.file) == ("gptq", "config.json")


@pytest.mark.parametrize("name", ["quantize_config", "quant_config", "quantization_config"])
def test_settings_in_a_file_beside_it(tmp_path: Path, name: str) -> None:
    """AutoGPTQ wrote quantize_config.json alone, without a quant_method."""
    checkpoint = save_gptq(tmp_path, None, **{name: OLD})
    found = read_settings(checkpoint)
    assert (found.method, found.file) == ("gptq", f"{name}.json")
    assert found.integer("bits") == 4
    assert found.integer("group_size") == 32
    assert tiny.same_grid(open_format(checkpoint).integer(f"{tiny.Q_PROJ}.weight"), tiny.grid())


def test_settings_of_the_language_model_in_a_multimodal_one(tmp_path: Path) -> None:
    checkpoint = save_gptq(tmp_path, None)
    config = {**checkpoint.config, "text_config": {"quantization_config": GPTQ}}
    inner = Checkpoint(checkpoint.path, config, checkpoint.tensors)
    assert read_settings(inner).method == "gptq"


def test_a_file_left_behind_in_a_dense_model_says_nothing(tmp_path: Path) -> None:
    checkpoint = tiny.save(tmp_path, {}, None, quantize_config=GPTQ)
    assert open_format(checkpoint).name == "dense"


@pytest.mark.parametrize("key", ["bits", "group_size", "checkpoint_format"])
def test_two_files_that_disagree_are_refused(tmp_path: Path, key: str) -> None:
    side = GPTQ | {"checkpoint_format": "gptq"} | {key: "gptq_v2" if "format" in key else 8}
    own = GPTQ | {"checkpoint_format": "gptq"}
    with pytest.raises(CheckpointError, match=f"config.json says {key}"):
        read_settings(save_gptq(tmp_path, own, quantize_config=side))


def test_a_file_beside_it_fills_what_the_configuration_leaves_out(tmp_path: Path) -> None:
    """gptqmodel reads that file first: who stored the zero points of version 1 stands there."""
    own = {"quant_method": "gptq", "bits": 4, "group_size": 32, "meta": None}
    side = own | {"meta": {"quantizer": ["gptqmodel:7.6.0"]}, "dynamic": {"-:.*k_proj": {}}}
    found = read_settings(tiny.save(tmp_path, {}, own, quantize_config=side))
    assert found.file == "config.json"
    assert found.quantizer == "gptqmodel:7.6.0"
    assert found.values["dynamic"] == side["dynamic"]
    said = own | {"dynamic": {"-:.*q_proj": {}}}
    found = read_settings(tiny.save(tmp_path, {}, said, quantize_config=side))
    assert found.values["dynamic"] == said["dynamic"]
    other = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = read_settings(tiny.save(tmp_path, {}, other, quantize_config=side))
    assert "dynamic" not in found.values


def test_todays_spelling_counts_where_both_are_there(tmp_path: Path) -> None:
    found = read_settings(save_gptq(tmp_path, GPTQ | {"w_bit": 8}))
    assert found.integer("bits") == 4


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"config_groups": {}}, "compressed-tensors"),
        ({"zero_point": True, "w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq"),
        (OLD, "gptq"),
        ({"quant_method": "GPTQ"}, "gptq"),
        ({"method": "gptq"}, "gptq"),
    ],
)
def test_settings_older_than_quant_method(
    tmp_path: Path, settings: dict[str, Any], method: str
) -> None:
    assert read_settings(tiny.save(tmp_path, {}, settings)).method == method


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    checkpoint = save_gptq(tmp_path, None)
    (tmp_path / "quantize_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"quantize_config\.json"):
        read_settings(checkpoint)


@pytest.mark.parametrize("settings", [{"threshold": 6.0}, ["gptq"]])
def test_settings_that_say_nothing_are_refused(tmp_path: Path, settings: Any) -> None:
    checkpoint = tiny.save(tmp_path, {}, None)
    config = {**checkpoint.config, "quantization_config": settings}
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_settings(Checkpoint(checkpoint.path, config, checkpoint.tensors))


def test_numbers_must_be_numbers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bits is 'four'"):
        open_format(save_gptq(tmp_path, GPTQ | {"bits": "four"}))
    with pytest.raises(CheckpointError, match="bits is None"):
        open_format(save_gptq(tmp_path / "b", {"quant_method": "gptq"}))
