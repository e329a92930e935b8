"""GPTQ read and written, against the format's definition written out in plain loops.

What gptqmodel itself makes of the same tensors is in test_gptq_oracle.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import open_format
from qmerge.formats.gptq import V1Zeros, pack_gptq, quantization_config, true_zeros
from qmerge.formats.integer import IntegerWeight
from qmerge.formats.writing import packed_bytes
from tests.formats import tiny

NAME = f"{tiny.Q_PROJ}.weight"
Version = Literal[1, 2]
FEW = hypothesis_settings(max_examples=40)


def settings(weight: IntegerWeight, *, version: Version = 2, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": weight.bits,
        "group_size": weight.group_size,
        "desc_act": weight.g_idx_I is not None,
        "sym": weight.symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **more,
    }


def plain_pack(fields: list[int], bits: int) -> list[int]:
    """int32 words of one long number, least significant first."""
    number = sum(field << (bits * place) for place, field in enumerate(fields))
    words = -(-len(fields) * bits // 32)
    unsigned = [(number >> (32 * place)) & 0xFFFFFFFF for place in range(words)]
    return [word - (1 << 32) if word >> 31 else word for word in unsigned]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_written_words_follow_the_format(bits: int, version: Version) -> None:
    weight = tiny.grid(rows=32, columns=64, bits=bits, symmetric=False, lowest_zero=1)
    parts = pack_gptq(weight, version=version)
    for o in range(32):
        assert parts["qweight"][:, o].tolist() == plain_pack(weight.codes_OI[o].tolist(), bits)
    for g in range(2):
        stored = [zero - (version == 1) for zero in weight.zeros_OG[:, g].tolist()]
        assert parts["qzeros"][g].tolist() == plain_pack(stored, bits)
    assert torch.equal(parts["scales"], weight.scales_OG.T)
    assert parts["g_idx"].tolist() == [i // 32 for i in range(64)]
    assert {suffix: part.dtype for suffix, part in parts.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }
    assert all(part.is_contiguous() for part in parts.values())


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_v1_zeros_are_the_well_known_words(bits: int, word: int) -> None:
    assert set(pack_gptq(tiny.grid(bits=bits))["qzeros"].flatten().tolist()) == {word}


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (64, -1), (96, 64), (40, 16)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_written_is_read(
    tmp_path: Path, bits: int, columns: int, group_size: int, symmetric: bool, shuffled: bool
) -> None:
    weight = tiny.grid(
        rows=36,
        columns=columns,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        shuffled=shuffled,
    )
    tensors = tiny.under(tiny.Q_PROJ, pack_gptq(weight, version=2))
    opened = open_format(tiny.save(tmp_path, tensors, settings(weight)))
    assert opened.name == "gptq_v2"
    assert tiny.same_grid(opened.integer(NAME), weight)
    assert torch.equal(opened.dense(NAME), weight.dense())
    assert torch.equal(opened.rows(NAME, 3, 7), weight.dense()[3:7])
    assert torch.equal(opened.dense(NAME, torch.bfloat16), weight.dense().bfloat16())


@pytest.mark.parametrize("group_size", [128, 1024])
def test_groups_wider_than_the_input(tmp_path: Path, group_size: int) -> None:
    weight = tiny.grid(group_size=-1)
    tensors = tiny.under(tiny.Q_PROJ, pack_gptq(weight))
    opened = open_format(
        tiny.save(tmp_path, tensors, settings(weight, version=1) | {"group_size": group_size})
    )
    assert torch.equal(opened.dense(NAME), weight.dense())
    assert opened.summary.group_size == group_size


def test_the_summary_says_what_inspect_shows(tmp_path: Path) -> None:
    weight = tiny.grid()
    tensors = tiny.under(tiny.Q_PROJ, pack_gptq(weight)) | tiny.under("lm_head", pack_gptq(weight))
    own = settings(weight, version=1, meta={"quantizer": ["optimum:2", "gptqmodel:7"]})
    summary = open_format(tiny.save(tmp_path, tensors, own)).summary
    assert summary.method == "gptq"
    assert summary.checkpoint_format == "gptq"
    assert (summary.bits, summary.group_size) == (4, 32)
    assert (summary.symmetric, summary.desc_act) == (True, False)
    assert summary.quantizer == "optimum:2, gptqmodel:7"
    assert (summary.quantized, summary.dense, summary.lm_head) == (2, 1, True)
    assert summary.dtype == torch.bfloat16


def test_sources_name_the_stored_tensors(tmp_path: Path) -> None:
    weight = tiny.grid()
    parts = pack_gptq(weight)
    opened = open_format(
        tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), settings(weight, version=1))
    )
    stored = opened.weights[NAME]
    assert stored.shape == (32, 64)
    assert stored.quantized
    assert set(stored.sources) == {f"{tiny.Q_PROJ}.{suffix}" for suffix in parts}


def test_a_checkpoint_without_group_indices(tmp_path: Path) -> None:
    weight = tiny.grid()
    parts = pack_gptq(weight)
    del parts["g_idx"]
    tensors, own = tiny.under(tiny.Q_PROJ, parts), settings(weight, version=1)
    opened = open_format(tiny.save(tmp_path / "plain", tensors, own))
    assert torch.equal(opened.dense(NAME), weight.dense())
    with pytest.raises(CheckpointError, match=r"q_proj\.g_idx is missing"):
        open_format(tiny.save(tmp_path / "act-order", tensors, own | {"desc_act": True}))


def test_an_index_never_filled_in_is_trivial(tmp_path: Path) -> None:
    weight = tiny.grid()
    parts = pack_gptq(weight)
    parts["g_idx"].zero_()
    opened = open_format(
        tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), settings(weight, version=1))
    )
    assert torch.equal(opened.dense(NAME), weight.dense())


@pytest.mark.parametrize("missing", ["checkpoint_format", "sym", "desc_act", "group_size"])
def test_old_settings_leave_things_out(tmp_path: Path, missing: str) -> None:
    weight = tiny.grid(group_size=-1 if missing == "group_size" else 32)
    own = settings(weight, version=1)
    del own[missing]
    opened = open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, pack_gptq(weight)), own))
    assert torch.equal(opened.dense(NAME), weight.dense())


# --- version 1 zero points ----------------------------------------------------------------------


def pack_fields(zeros_GO: torch.Tensor, bits: int) -> torch.Tensor:
    """AutoGPTQ: one less within each field."""
    mask = (1 << bits) - 1
    rows = [plain_pack([(zero - 1) & mask for zero in row], bits) for row in zeros_GO.tolist()]
    return torch.tensor(rows, dtype=torch.int32)


def pack_words(zeros_GO: torch.Tensor, bits: int) -> torch.Tensor:
    """gptqmodel: fields packed as they are, then one less in each by subtracting whole words."""
    ones = sum(1 << place for place in range(0, 32, bits))
    rows = []
    for row in zeros_GO.tolist():
        words = [(word - ones) & 0xFFFFFFFF for word in plain_pack(row, bits)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@st.composite
def zero_points(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Any zero points, 0 and the highest often, and their width in bits."""
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    top = (1 << bits) - 1
    zero = st.one_of(st.sampled_from([0, top]), st.integers(0, top))
    rows, columns = 1, 32
    flat = draw(st.lists(zero, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=torch.int32).view(rows, columns), bits


@FEW
@given(zero_points())
def test_zeros_stored_by_field(case: tuple[torch.Tensor, int]) -> None:
    zeros, bits = case
    assert torch.equal(true_zeros(pack_fields(zeros, bits), bits, 32, "field"), zeros)


@FEW
@given(zero_points())
def test_zeros_stored_by_word(case: tuple[torch.Tensor, int]) -> None:
    zeros, bits = case
    stored = pack_fields(zeros, bits) if bits == 3 else pack_words(zeros, bits)
    assert torch.equal(true_zeros(stored, bits, 32, "word"), zeros)


@pytest.mark.parametrize(
    ("quantizer", "convention"),
    [
        ("gptqmodel:7.6.0", "word"),
        (["optimum:2.3.0", "gptqmodel:7.6.0"], "word"),
        ("auto_gptq:0.7.1", "field"),
        (None, "field"),
    ],
)
def test_the_writer_decides(tmp_path: Path, quantizer: Any, convention: V1Zeros) -> None:
    weight = tiny.grid(symmetric=False)
    assert bool((weight.zeros_OG == 0).any())
    parts = pack_gptq(weight, version=2)
    store = pack_words if convention == "word" else pack_fields
    parts["qzeros"] = store(weight.zeros_OG.T, 4)
    own = settings(weight, version=1, meta={"quantizer": quantizer})
    checkpoint = tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), own)
    opened = open_format(checkpoint)
    assert tiny.same_grid(opened.integer(NAME), weight)


def test_version_1_refuses_to_write_a_zero_of_0() -> None:
    with pytest.raises(RecipeError, match="zero point of 0"):
        pack_gptq(tiny.grid(symmetric=False), version=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_holds_the_highest_zero(tmp_path: Path, bits: int) -> None:
    weight = tiny.grid(bits=bits, symmetric=False, lowest_zero=1)
    weight.zeros_OG.view(-1)[::2] = (1 << bits) - 1
    tensors = tiny.under(tiny.Q_PROJ, pack_gptq(weight, version=1))
    for writer in ("auto_gptq", "gptqmodel"):
        own = settings(weight, version=1, meta={"quantizer": writer})
        opened = open_format(tiny.save(tmp_path / writer, tensors, own))
        assert tiny.same_grid(opened.integer(NAME), weight)


# --- dynamic overrides --------------------------------------------------------------------------


def test_the_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    usual, finer = tiny.grid(), tiny.grid(bits=8, group_size=16)
    modules = {f"model.layers.{i}.mlp.up_proj": (usual if i == 2 else finer) for i in range(3)}
    tensors: dict[str, torch.Tensor] = {}
    for module, weight in modules.items():
        tensors |= tiny.under(module, pack_gptq(weight))
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.ones(2, 2)
    dynamic: dict[str, Any] = {
        r"-:.*gate_proj": {},
        r"+:model\.layers\.0\..*": {"bits": 8, "group_size": 16},
        r"model\.layers\.1": {"w_bit": 8, "q_group_size": 16},
        r"+:model\.layers\.[01]": {"bits": 2},
    }
    opened = open_format(tiny.save(tmp_path, tensors, settings(usual, version=1, dynamic=dynamic)))
    for module, weight in modules.items():
        assert tiny.same_grid(opened.integer(f"{module}.weight"), weight)
    assert not opened.weights["model.layers.0.mlp.gate_proj.weight"].quantized
    assert opened.summary.overrides == tuple(dynamic)


def test_a_module_kept_out_must_not_be_packed(tmp_path: Path) -> None:
    weight = tiny.grid()
    own = settings(weight, version=1, dynamic={"-:.*q_proj": {}})
    with pytest.raises(CheckpointError, match=r"q_proj\.qweight"):
        open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, pack_gptq(weight)), own))


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_missing_part_is_named(tmp_path: Path, suffix: str) -> None:
    weight = tiny.grid()
    parts = pack_gptq(weight)
    tensors = tiny.under("other", parts) | tiny.under(tiny.Q_PROJ, parts)
    del tensors[f"{tiny.Q_PROJ}.{suffix}"]
    named = "q_proj.g_idx" if suffix == "qweight" else f"q_proj.{suffix} is missing"
    with pytest.raises(CheckpointError, match=named):
        open_format(tiny.save(tmp_path, tensors, settings(weight, version=1)))


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_part_that_does_not_fit_is_named(tmp_path: Path, suffix: str) -> None:
    weight = tiny.grid()
    parts = pack_gptq(weight)
    parts[suffix] = parts[suffix][:1]
    with pytest.raises(CheckpointError, match=rf"q_proj\.{suffix}: shape \[1, "):
        open_format(
            tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), settings(weight, version=1))
        )


def test_settings_of_another_checkpoint_are_noticed(tmp_path: Path) -> None:
    weight = tiny.grid()
    tensors = tiny.under(tiny.Q_PROJ, pack_gptq(weight))
    own = settings(weight, version=1)
    for place, wrong in enumerate([{"bits": 8}, {"group_size": 16}, {"group_size": 0}]):
        with pytest.raises(CheckpointError, match="q_proj"):
            open_format(tiny.save(tmp_path / str(place), tensors, own | wrong))


def test_a_group_that_is_not_there(tmp_path: Path) -> None:
    weight = tiny.grid()
    parts = pack_gptq(weight)
    parts["g_idx"][0] = 7
    opened = open_format(
        tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), settings(weight, version=1))
    )
    with pytest.raises(CheckpointError, match=r"q_proj\.g_idx"):
        opened.dense(NAME)


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    weight = tiny.grid()
    parts = pack_gptq(weight)
    parts["scales"][0, 0] = float("nan")
    opened = open_format(
        tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), settings(weight, version=1))
    )
    with pytest.raises(CheckpointError, match=r"q_proj\.scales"):
        opened.dense(NAME)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_format": "marlin"},
        {"is_marlin_format": True},
        {"checkpoint_format": "gptq_p"},
        {"bits": 5},
        {"dynamic": {"+:(": {}}},
        {"dynamic": ["q_proj"]},
    ],
)
def test_layouts_and_settings_of_other_kernels(tmp_path: Path, change: dict[str, Any]) -> None:
    weight = tiny.grid()
    own = settings(weight, version=1) | change
    with pytest.raises(CheckpointError):
        open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, pack_gptq(weight)), own))


def test_settings_without_one_quantized_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor is quantized"):
        open_format(tiny.save(tmp_path, {}, settings(tiny.grid())))


# --- the settings that are written --------------------------------------------------------------


def written(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "bits": 4,
        "group_size": 128,
        "symmetric": True,
        "desc_act": False,
        "damping": 0.01,
        "writer": "qmerge:0.1.0",
        "quantized": {"model.layers.0.mlp.up_proj": (4, 128)},
    }
    return quantization_config(**(arguments | changes))


def test_settings_have_what_loaders_require() -> None:
    found = written()
    assert found["quant_method"] == "gptq"
    assert (found["bits"], found["group_size"]) == (4, 128)
    assert (found["desc_act"], found["sym"], found["lm_head"]) == (False, True, False)
    assert (found["checkpoint_format"], found["pack_dtype"]) == ("gptq", "int32")
    assert found["meta"]["quantizer"] == ["qmerge:0.1.0"]
    assert "dynamic" not in found
    assert written(version=2, symmetric=False)["checkpoint_format"] == "gptq_v2"


def test_kept_linears_are_named_for_every_loader() -> None:
    found = written(kept=["model.layers.1.mlp.up_proj"])
    assert found["dynamic"] == {r"-:^model\.layers\.1\.mlp\.(up_proj|gate_up_proj)$": {}}
    assert found["modules_in_block_to_quantize"] == [["model.layers.0.mlp.up_proj"]]


def test_patterns_fit_what_vllm_makes_of_several_linears() -> None:
    """It asks for its own modules, by their names, and takes the first pattern that matches."""
    experts = [f"model.layers.1.mlp.experts.{i}.{n}_proj" for i in (0, 10) for n in ("up", "down")]
    own = {"model.layers.1.self_attn.k_proj": (8, 128), "model.layers.1.mlp.gate_proj": (4, 64)}
    own |= dict.fromkeys(experts, (8, 32))
    kept = [
        name.replace("layers.1.", "layers.2.") for name in (*experts, "model.layers.1.mlp.gate")
    ]
    dynamic = written(quantized=own, kept=kept)["dynamic"]

    def said(module: str) -> Any:
        keys = (key for key in dynamic if re.match(key[2:], module))
        return next(((key[:2], dynamic[key]) for key in keys), None)

    assert said("model.layers.1.self_attn.qkv_proj") == ("+:", {"bits": 8, "group_size": 128})
    assert said("model.layers.1.mlp.gate_up_proj") == ("+:", {"bits": 4, "group_size": 64})
    for whole in ("experts", "experts.routed_experts", *(e[19:] for e in experts)):
        assert said(f"model.layers.1.mlp.{whole}") == ("+:", {"bits": 8, "group_size": 32})
        assert said(f"model.layers.2.mlp.{whole}") == ("-:", {})
    assert said("model.layers.2.mlp.gate") == ("-:", {})
    for other in ("2.mlp.gate_up_proj", "1.mlp.shared_experts.up_proj", "11.mlp.experts"):
        assert said(f"model.layers.{other}") is None


def test_asymmetric_version_1_is_refused() -> None:
    with pytest.raises(RecipeError, match="symmetric"):
        written(symmetric=False)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 32), (4, -1), (8, 64)])
def test_bytes_are_those_of_the_packed_tensors(bits: int, group: int) -> None:
    outputs, inputs = 96, 128
    groups = 1 if group == -1 else inputs // group
    weight = IntegerWeight(
        codes_OI=torch.zeros(outputs, inputs, dtype=torch.uint8),
        scales_OG=torch.ones(outputs, groups, dtype=torch.float16),
        zeros_OG=torch.full((outputs, groups), 1 << (bits - 1), dtype=torch.int32),
        g_idx_I=None,
        bits=bits,
        group_size=group,
        symmetric=True,
    )
    packed = pack_gptq(weight, version=1)
    expected = sum(tensor.nbytes for tensor in packed.values())
    assert packed_bytes((outputs, inputs), bits, group) == expected
