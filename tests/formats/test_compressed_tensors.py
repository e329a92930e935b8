"""compressed-tensors read and written, against plain loops and against the package itself.

The package drops old forms as it goes: word-aligned 3-bit codes until 0.17 and act-order groups
until 0.18. Tests that need an installed release say which.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import open_format
from qmerge.formats.compressed_tensors import pack_compressed, quantization_config
from qmerge.formats.gptq import pack_gptq
from qmerge.formats.integer import IntegerWeight
from tests.formats import tiny

NAME = f"{tiny.Q_PROJ}.weight"
CASES = [
    (bits, group_size, symmetric)
    for bits in (2, 3, 4, 8)
    for group_size in (32, -1)
    for symmetric in (True, False)
]


def settings(weights: dict[str, Any], form: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        **more,
    }


def args(weight: IntegerWeight, **more: Any) -> dict[str, Any]:
    channel = weight.group_size == -1
    return {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else weight.group_size,
        **more,
    }


def package() -> Any:
    return pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")


def has_act_order() -> bool:
    from compressed_tensors.quantization import QuantizationArgs

    try:
        QuantizationArgs(num_bits=4, strategy="group", group_size=32, actorder="group")
    except ValueError:
        return False
    return True


def oracle(form: str, weight_args: dict[str, Any]) -> tuple[Any, Any]:
    """The package's compressor for a form, and the scheme that it works by."""
    package()
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weight_args))
    return BaseCompressor.get_value_from_registry(form), scheme


def signed_state(weight: IntegerWeight) -> dict[str, torch.Tensor]:
    """What the package starts from: a dense weight, scales, and zero points that count from 0 in
    the middle of the codes."""
    state = {"weight": weight.dense(), "weight_scale": weight.scales_OG.float()}
    if not weight.symmetric:
        middle = 1 << (weight.bits - 1)
        state["weight_zero_point"] = (weight.zeros_OG - middle).to(torch.int8)
    if weight.g_idx_I is not None:
        state["weight_g_idx"] = weight.g_idx_I
    return state


# --- pack-quantized -----------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
def test_what_is_written_is_read(
    tmp_path: Path, bits: int, group_size: int, symmetric: bool
) -> None:
    weight = tiny.grid(bits=bits, group_size=group_size, symmetric=symmetric)
    tensors = tiny.under(tiny.Q_PROJ, pack_compressed(weight))
    opened = open_format(tiny.save(tmp_path, tensors, settings(args(weight))))
    assert tiny.same_grid(opened.integer(NAME), weight)
    assert torch.equal(opened.dense(NAME), tiny.naive_dense(weight))
    assert torch.equal(opened.rows(NAME, 3, 7), weight.dense()[3:7])
    stored = opened.weights[NAME]
    assert (stored.shape, stored.quantized) == ((32, 64), True)
    assert set(stored.sources) == set(tensors)
    assert opened.name == "compressed-tensors-pack-quantized"
    assert (opened.summary.bits, opened.summary.group_size) == (bits, group_size)
    assert opened.summary.symmetric is symmetric


@pytest.mark.parametrize("bits", [4, 8])
def test_only_transposes_lie_between_the_two_formats(bits: int) -> None:
    weight = tiny.grid(bits=bits, symmetric=False)
    ours, gptq = pack_compressed(weight), pack_gptq(weight, version=2)
    assert torch.equal(ours["weight_packed"], gptq["qweight"].T)
    assert torch.equal(ours["weight_scale"], gptq["scales"].T)
    assert torch.equal(ours["weight_zero_point"], gptq["qzeros"].T)
    assert ours["weight_shape"].tolist() == [32, 64]
    assert all(part.is_contiguous() for part in ours.values())


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
def test_as_the_package_packs_and_decodes(
    tmp_path: Path, bits: int, group_size: int, symmetric: bool
) -> None:
    weight = tiny.grid(bits=bits, group_size=group_size, symmetric=symmetric)
    compressor, scheme = oracle("pack-quantized", args(weight))
    theirs = compressor.compress(signed_state(weight), scheme)
    opened = open_format(
        tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, theirs), settings(args(weight)))
    )
    decoded = compressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(opened.dense(NAME), decoded)
    assert torch.equal(opened.dense(NAME), weight.dense())
    ours = pack_compressed(weight)
    if theirs["weight_packed"].shape == ours["weight_packed"].shape:
        assert set(ours) == set(theirs)
        for suffix, part in ours.items():
            assert torch.equal(part, theirs[suffix].to(part.dtype)), suffix


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_the_package_decodes_in_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """It multiplies in the dtype of the scales; ours is exact, and rounds to the same."""
    weight = tiny.grid(symmetric=False, dtype=dtype)
    compressor, scheme = oracle("pack-quantized", args(weight))
    tensors = pack_compressed(weight)
    theirs = compressor.decompress(tensors, scheme)["weight"]
    opened = open_format(
        tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, tensors), settings(args(weight)))
    )
    assert theirs.dtype == dtype
    assert torch.equal(opened.dense(NAME).to(dtype), theirs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_as_the_package_decodes(tmp_path: Path, symmetric: bool) -> None:
    weight = tiny.grid(symmetric=symmetric, shuffled=True)
    package()
    if not has_act_order():
        pytest.skip("needs compressed-tensors before 0.19")
    own = args(weight, actorder="group")
    compressor, scheme = oracle("pack-quantized", own)
    theirs = compressor.compress(signed_state(weight), scheme)
    opened = open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, theirs), settings(own)))
    assert torch.equal(opened.dense(NAME), compressor.decompress(theirs, scheme)["weight"])
    assert torch.equal(opened.dense(NAME), weight.dense())
    assert opened.summary.desc_act is True


def test_act_order(tmp_path: Path) -> None:
    """The same without the package: a group for each column, and −1 where there is none."""
    weight = tiny.grid(shuffled=True)
    assert weight.g_idx_I is not None
    plain = tiny.grid()
    for place, (index, wanted) in enumerate(
        [(weight.g_idx_I, weight), (torch.full_like(weight.g_idx_I, -1), plain)]
    ):
        parts = pack_compressed(plain) | {"weight_g_idx": index}
        tensors = tiny.under(tiny.Q_PROJ, parts)
        opened = open_format(
            tiny.save(tmp_path / str(place), tensors, settings(args(plain, actorder="group")))
        )
        assert tiny.same_grid(opened.integer(NAME), wanted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_word_aligned_3_bits(tmp_path: Path, symmetric: bool) -> None:
    """Ten codes to a word, as before release 0.18."""
    weight = tiny.grid(bits=3, symmetric=symmetric)
    parts = pack_compressed(weight)
    parts["weight_packed"] = aligned(weight.codes_OI)
    if not symmetric:
        parts["weight_zero_point"] = aligned(weight.zeros_OG.T).T
    opened = open_format(
        tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), settings(args(weight)))
    )
    assert tiny.same_grid(opened.integer(NAME), weight)


def aligned(codes: torch.Tensor) -> torch.Tensor:
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // 10), dtype=torch.int32)
    for place in range(codes.shape[1]):
        words[:, place // 10] |= codes[:, place].int() << (3 * (place % 10))
    return words


def test_zero_points_that_are_not_packed(tmp_path: Path) -> None:
    """Early releases kept them as int8."""
    weight = tiny.grid(symmetric=False)
    parts = pack_compressed(weight)
    parts["weight_zero_point"] = (weight.zeros_OG - 8).to(torch.int8)
    opened = open_format(
        tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), settings(args(weight)))
    )
    assert tiny.same_grid(opened.integer(NAME), weight)


# --- int8 and FP8 as they are -------------------------------------------------------------------

PLAIN = [
    ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}),
    ("naive-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}),
    ("naive-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
    (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
]


@pytest.mark.parametrize(("form", "own"), PLAIN)
def test_plain_codes_as_the_package_decodes(tmp_path: Path, form: str, own: dict[str, Any]) -> None:
    compressor, scheme = oracle(form, own)
    random = torch.Generator().manual_seed(0)
    shapes = {"channel": (32, 1), "tensor": (1,), "group": (32, 2), "block": (2, 2)}
    state = {
        "weight": torch.randn(32, 64, generator=random),
        "weight_scale": torch.rand(shapes[own["strategy"]], generator=random) * 0.02 + 0.01,
    }
    if own.get("symmetric") is False:
        state["weight_zero_point"] = torch.randint(
            -128, 128, (32, 1), generator=random, dtype=torch.int8
        )
    theirs = compressor.compress(state, scheme)
    opened = open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, theirs), settings(own, form)))
    decoded = compressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(opened.dense(NAME), decoded)
    assert torch.equal(opened.rows(NAME, 3, 7), decoded[3:7])
    grid = opened.integer(NAME)
    assert (grid is not None) == (own["type"] == "int")
    if grid is not None:
        assert grid.scales_OG.shape[0] == 32
        assert torch.equal(grid.dense(), decoded)
    assert opened.summary.bits == own["num_bits"]


def test_activation_scales_are_no_leftovers(tmp_path: Path) -> None:
    parts = {
        "weight": torch.ones(4, 8, dtype=torch.int8),
        "weight_scale": torch.ones(4, 1),
        "input_scale": torch.ones(1),
        "input_zero_point": torch.ones(1, dtype=torch.int8),
    }
    own = settings({"num_bits": 8, "strategy": "channel"}, "int-quantized")
    opened = open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), own))
    assert set(opened.weights) == {NAME, tiny.NORM}
    assert torch.equal(opened.dense(NAME), torch.ones(4, 8))


# --- several groups -----------------------------------------------------------------------------


def test_a_target_that_names_a_module_comes_before_its_class(tmp_path: Path) -> None:
    usual, named, matched = tiny.grid(), tiny.grid(bits=8), tiny.grid(group_size=16)
    own = settings(args(usual))
    own["config_groups"] |= {
        "group_1": {"targets": ["model.layers.0.mlp.up_proj"], "weights": args(named)},
        "group_2": {"targets": ["re:.*down_proj$"], "weights": args(matched)},
        "group_3": {"targets": ["Embedding"], "weights": None},
    }
    modules = {
        tiny.Q_PROJ: usual,
        "model.layers.0.mlp.up_proj": named,
        "model.layers.0.mlp.down_proj": matched,
    }
    tensors: dict[str, torch.Tensor] = {"lm_head.weight": torch.ones(2, 2)}
    for module, weight in modules.items():
        tensors |= tiny.under(module, pack_compressed(weight))
    opened = open_format(tiny.save(tmp_path, tensors, own))
    for module, weight in modules.items():
        assert tiny.same_grid(opened.integer(f"{module}.weight"), weight)
    assert opened.summary.overrides == ("model.layers.0.mlp.up_proj", "re:.*down_proj$")
    assert not opened.weights["lm_head.weight"].quantized


def test_groups_of_different_forms(tmp_path: Path) -> None:
    packed = tiny.grid()
    own = settings(args(packed), "mixed-precision")
    own["config_groups"]["group_0"]["format"] = "pack-quantized"
    own["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "format": "float-quantized",
    }
    down = {
        "weight": torch.ones(4, 8).to(torch.float8_e4m3fn),
        "weight_scale": torch.full((1,), 0.5),
    }
    tensors = tiny.under(tiny.Q_PROJ, pack_compressed(packed)) | tiny.under("x.down_proj", down)
    opened = open_format(tiny.save(tmp_path, tensors, own))
    assert tiny.same_grid(opened.integer(NAME), packed)
    assert torch.equal(opened.dense("x.down_proj.weight"), torch.full((4, 8), 0.5))
    assert opened.integer("x.down_proj.weight") is None


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"]
)
def test_a_missing_part_is_named(tmp_path: Path, suffix: str) -> None:
    weight = tiny.grid(symmetric=False)
    parts = pack_compressed(weight)
    tensors = tiny.under("other", parts) | tiny.under(tiny.Q_PROJ, parts)
    del tensors[f"{tiny.Q_PROJ}.{suffix}"]
    with pytest.raises(CheckpointError, match="q_proj"):
        open_format(tiny.save(tmp_path, tensors, settings(args(weight))))


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_part_that_does_not_fit_is_named(tmp_path: Path, suffix: str) -> None:
    weight = tiny.grid(symmetric=False)
    parts = pack_compressed(weight)
    parts[suffix] = parts[suffix][:, :1]
    with pytest.raises(CheckpointError, match=rf"q_proj\.{suffix}: shape"):
        open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), settings(args(weight))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"format": "marlin-24"}, "marlin"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}}, "no weights"),
    ],
)
def test_forms_that_cannot_be_decoded(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    weight = tiny.grid()
    tensors = tiny.under(tiny.Q_PROJ, pack_compressed(weight))
    with pytest.raises(CheckpointError, match=message):
        open_format(tiny.save(tmp_path, tensors, settings(args(weight)) | change))


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": 16},
        {"num_bits": 4, "type": "float"},
        {"num_bits": "x"},
        {"group_size": -7},
        {"block_structure": [1, 2, 3]},
        {"num_bits": 8},
        {"group_size": 16},
    ],
)
def test_settings_of_another_checkpoint_are_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    weight = tiny.grid()
    tensors = tiny.under(tiny.Q_PROJ, pack_compressed(weight))
    with pytest.raises(CheckpointError):
        open_format(tiny.save(tmp_path, tensors, settings(args(weight) | change)))


def test_a_module_that_no_target_names(tmp_path: Path) -> None:
    weight = tiny.grid()
    own = settings(args(weight))
    own["config_groups"]["group_0"]["targets"] = ["re:.*down_proj"]
    with pytest.raises(CheckpointError, match="q_proj: quantized, and no target"):
        open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, pack_compressed(weight)), own))


def test_a_model_saved_before_it_was_compressed(tmp_path: Path) -> None:
    parts = {"weight": torch.ones(4, 8), "weight_scale": torch.ones(4, 1)}
    own = settings({"num_bits": 8, "strategy": "channel"}, "int-quantized")
    with pytest.raises(CheckpointError, match="the settings say int8"):
        open_format(tiny.save(tmp_path, tiny.under(tiny.Q_PROJ, parts), own))


def test_settings_without_one_quantized_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor is quantized"):
        open_format(tiny.save(tmp_path, {}, settings(args(tiny.grid()))))


# --- the settings that are written --------------------------------------------------------------


@pytest.mark.parametrize("order", ["none", "group"])
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_package_takes_our_settings(symmetric: bool, group_size: int, order: Any) -> None:
    package()
    from compressed_tensors.quantization import QuantizationConfig

    ours = quantization_config(
        bits=4,
        group_size=group_size,
        symmetric=symmetric,
        order=order,
        quantized={},
        kept=["model.x"],
    )
    theirs = QuantizationConfig.model_validate(ours)
    weights = theirs.config_groups["group_0"].weights
    assert weights is not None
    assert (weights.num_bits, weights.symmetric) == (4, symmetric)
    assert weights.strategy == ("channel" if group_size == -1 else "group")
    assert theirs.ignore == ["model.x"]
    assert str(theirs.format) == "pack-quantized"


def test_act_order_is_not_written() -> None:
    with pytest.raises(RecipeError, match="act-order"):
        quantization_config(
            bits=4, group_size=32, symmetric=True, order="full", quantized={}, kept=()
        )
    with pytest.raises(RecipeError, match="act-order"):
        pack_compressed(tiny.grid(shuffled=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("symmetric", "own"),
    [
        (True, {}),
        (False, {}),
        (
            True,
            {"model.layers.0.mlp.down_proj": (8, 16), "model.layers.1.self_attn.o_proj": (4, 64)},
        ),
        (True, {"lm_head": (8, 32)}),
    ],
    ids=["symmetric", "asymmetric", "overrides", "packed head"],
)
def test_transformers_loads_a_release(
    tmp_path: Path, symmetric: bool, own: dict[str, tuple[int, int]]
) -> None:
    """Equal logits in fp32: transformers decodes with the package, and so do we."""
    package()
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings="lm_head" not in own,
    )
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    kept = ["model.layers.1.mlp.down_proj", *({"lm_head"} - own.keys())]
    quantized: dict[str, tuple[int, int]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for seed, (name, parameter) in enumerate(reference.named_parameters()):
        module = name.removesuffix(".weight")
        if not module.endswith(("_proj", "lm_head")) or module in kept:
            tensors[name] = parameter.data
            continue
        rows, columns = parameter.shape
        quantized[module] = own.get(module, (4, 32))
        bits, group_size = quantized[module]
        weight = tiny.grid(
            rows=rows,
            columns=columns,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            seed=seed,
            dtype=torch.float32,
        )
        weight.scales_OG.div_(1 << bits)
        parameter.data = weight.dense()
        tensors |= tiny.under(module, pack_compressed(weight))
    settings = quantization_config(
        bits=4, group_size=32, symmetric=symmetric, order="group", quantized=quantized, kept=kept
    )
    whole = config.to_dict() | {"quantization_config": settings, "dtype": "float32"}
    whole["architectures"] = [type(reference).__name__]
    (tmp_path / "config.json").write_text(json.dumps(whole))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        # It decodes ahead with one scheme for all, and needs to for zero points of their own.
        quantization_config=CompressedTensorsConfig(dequantize=not own),
    )
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        wanted, found = reference(tokens).logits, loaded(tokens).logits
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
