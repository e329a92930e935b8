"""Mixtures of experts through the whole job, against plain transformers and PEFT."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qmerge.export import export
from qmerge.formats import open_format
from qmerge.pipeline import run
from qmerge.plan import make_plan
from qmerge.recipe import Recipe
from qmerge.results import RunResult
from qmerge.storage.checkpoint import Checkpoint
from qmerge.verify import Against, verify
from tests import checkpoints
from tests.families import rig

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": checkpoints.VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {**SIZES, **EXPERTS, "head_dim": 16},
    "Qwen2Moe": {
        **SIZES,
        **EXPERTS,
        "intermediate_size": 96,
        "shared_expert_intermediate_size": 64,
    },
    "Mixtral": {**SIZES, "intermediate_size": 96, "num_local_experts": 4},
    "DeepseekV2": {**SIZES, **LATENT},
    "DeepseekV3": {**SIZES, **LATENT, "n_group": 2, "topk_group": 1},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_b_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "tokenizer"
    checkpoints.write_tokenizer(folder)
    return folder


FAST = ("Qwen3Moe", "DeepseekV3")
PARAMS = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in FAMILIES]


@pytest.fixture(scope="module", params=PARAMS)
def family(
    request: pytest.FixtureRequest,
    tokenizer: Path,
    eval_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, RunResult]:
    """A folder with a model, an adapter on its experts and a release, and the release's report."""
    folder = tmp_path_factory.mktemp(request.param)
    config = getattr(transformers, f"{request.param}Config")(**FAMILIES[request.param])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    rig.write_model(folder / "base", model, tokenizer)
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in ATTENTION if name in modules]
    rig.write_adapter(
        folder / "adapter", model.float(), target_modules=targets, target_parameters=FUSED
    )
    asked = rig.recipe(folder / "base", folder / "adapter", folder / "release", eval_text)
    return folder, run(asked)


def test_arms_equal_transformers_and_peft(
    family: tuple[Path, RunResult], eval_text: Path, tmp_path: Path
) -> None:
    folder, result = family
    base = rig.dense(folder / "base", AutoModelForCausalLM)
    release = rig.reopened(folder / "release", tmp_path / "dense", AutoModelForCausalLM)
    tokens = rig.windows(folder / "base", eval_text)
    rig.check_arms(result, base, folder / "adapter", release, tokens)


def test_release_holds_single_experts_under_the_names_of_the_base(
    family: tuple[Path, RunResult],
) -> None:
    folder, result = family
    base, release = (Checkpoint.open(folder / name) for name in ("base", "release"))
    experts = {name.removesuffix(".weight") for name in base.tensors if ".experts." in name}
    assert experts
    for name in experts:
        assert f"{name}.qweight" in release.tensors
        assert f"{name}.weight" not in release.tensors
    settings = json.loads((folder / "release" / "config.json").read_text())["quantization_config"]
    dense = [
        name.removesuffix(".weight")
        for name, info in release.tensors.items()
        if ".layers." in name and name.endswith(".weight") and len(info.shape) == 2
    ]
    kept = {key.removeprefix("-:") for key in settings["dynamic"]}
    assert dense  # the routers
    assert {name.replace(".", r"\.") for name in dense} == {k.strip("^$") for k in kept}
    reported = [linear for layer in result.layers for linear in layer.linears]
    counted = [linear for linear in reported if linear.tokens is not None]
    assert len(counted) == len(experts)
    assert {linear.name for linear in reported} >= {linear.name for linear in counted}


def test_export_writes_single_experts(family: tuple[Path, RunResult], tmp_path: Path) -> None:
    """`qmerge merge` against PEFT's own merge, each tensor of the checkpoint."""
    from peft import PeftModel
    from safetensors.torch import load_file

    folder, _ = family
    asked = Recipe(
        base=folder / "base", adapter=(str(folder / "adapter"),), out=tmp_path / "merged"
    )
    export(asked, dtype="float32")
    base = rig.dense(folder / "base", AutoModelForCausalLM)
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    opened = Checkpoint.open(tmp_path / "merged")
    assert opened.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(opened.read(name), tensor, rtol=0, atol=1e-6)


needs_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None,
    reason="opening packed experts needs the extra 'verify'",
)


GPTQMODEL = """
import sys, torch
from pathlib import Path
from tests import checkpoints
model, tokens = checkpoints.read_gptq(Path(sys.argv[1])), torch.load(sys.argv[2])
with torch.inference_mode():
    torch.save(model(input_ids=tokens, use_cache=False).logits.clone(), sys.argv[3])
"""


def logits_of_gptqmodel(release: Path, tokens: torch.Tensor, scratch: Path) -> torch.Tensor:
    """In a process of its own: gptqmodel takes the experts of transformers' classes apart."""
    files = [scratch / name for name in ("tokens.pt", "logits.pt")]
    torch.save(tokens, files[0])
    command = [sys.executable, "-c", GPTQMODEL, str(release), *map(str, files)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    return torch.load(files[1])


def knows(result: RunResult) -> bool:
    """Whether gptqmodel goes by the names that this family's experts have on disk."""
    return "w1" not in {linear.name[-2:] for layer in result.layers for linear in layer.linears}


@needs_gptqmodel
@pytest.mark.parametrize(
    "family",
    ["Qwen3Moe", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n != "Qwen3Moe")],
    indirect=True,
)
def test_gptqmodel_opens_it_where_it_knows_the_names(
    family: tuple[Path, RunResult], eval_text: Path, tmp_path: Path
) -> None:
    folder, result = family
    tokens = rig.windows(folder / "base", eval_text)
    if not knows(result):
        with pytest.raises(subprocess.CalledProcessError) as raised:
            logits_of_gptqmodel(folder / "release", tokens, tmp_path)
        assert b"Missing required quantized weights" in raised.value.stderr
        return
    found = logits_of_gptqmodel(folder / "release", tokens, tmp_path)
    decoded = rig.reopened(folder / "release", tmp_path / "dense", AutoModelForCausalLM)
    with torch.inference_mode():
        expected = decoded(input_ids=tokens, use_cache=False).logits
    # Its kernel computes in 16 bits, by which some tokens go to other experts.
    assert (found - expected).abs().median() < 0.02 * expected.std()


@needs_gptqmodel
@pytest.mark.slow
def test_verify_loads_it_or_says_why_not(family: tuple[Path, RunResult]) -> None:
    folder, result = family
    checks = {check.name: check for check in verify(folder / "release", load=True).checks}
    assert "leaves those of a gptq release random" in checks["loads"].text
    for name in ("vllm-experts", "experts", "siblings", "kept-modules"):
        assert checks[name].outcome == "pass"
    if knows(result):
        assert checks["loads"].outcome == checks["perplexity-text"].outcome == "pass"
    else:
        assert checks["loads"].outcome == "fail"
        assert "gptqmodel does not load it: Missing required" in checks["loads"].text


@pytest.mark.parametrize(
    "family",
    ["Qwen3Moe", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n != "Qwen3Moe")],
    indirect=True,
)
def test_transformers_opens_it_as_compressed_tensors(
    family: tuple[Path, RunResult], eval_text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    folder, _ = family
    out = tmp_path / "release"
    asked = rig.recipe(folder / "base", folder / "adapter", out, eval_text)
    result = run(replace(asked, format="compressed-tensors"))
    opened, told = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    found = rig.perplexity(opened.eval(), rig.windows(folder / "base", eval_text))
    assert found == pytest.approx(result.arms["release"]["text"].perplexity, rel=rig.TOLERANCE)


WHOLE = ("*.layers.0.mlp.experts.*=bits:8", "*.layers.1.mlp.experts.*=skip")


@pytest.mark.parametrize("family", ["Qwen3Moe"], indirect=True)
def test_experts_of_a_block_have_one_grid(
    family: tuple[Path, RunResult], eval_text: Path, tmp_path: Path
) -> None:
    folder, _ = family
    asked = rig.recipe(folder / "base", folder / "adapter", tmp_path / "out", eval_text)
    for torn in ("*.experts.3.*=bits:8", "*.experts.*.down_proj=group:64", "*.experts.0.*=skip"):
        faults = make_plan(replace(asked, override=(torn,))).faults
        told = [fault.message for fault in faults if "which servers run together" in fault.message]
        assert len(told) == 1
        assert " and 1 more, " in told[0]  # layers
        assert len(faults) <= 2
        assert {fault.where for fault in faults} == {"--override"}
    job = make_plan(replace(asked, override=WHOLE)).ready()
    assert job.specs["model.layers.0.mlp.experts.7.down_proj"].bits == 8
    assert "model.layers.1.mlp.experts.7.down_proj" not in job.specs


@needs_gptqmodel
@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen3Moe"], indirect=True)
def test_blocks_of_other_grids_are_written_for_gptqmodel_and_vllm(
    family: tuple[Path, RunResult], eval_text: Path, tmp_path: Path
) -> None:
    folder, _ = family
    out = tmp_path / "release"
    run(replace(rig.recipe(folder / "base", folder / "adapter", out, eval_text), override=WHOLE))
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    # vLLM asks for a block as a whole, and takes the first pattern that matches its start.
    asked = [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    first = [next(k for k in settings["dynamic"] if re.match(k[2:], each)) for each in asked]
    assert settings["dynamic"][first[0]] == {"bits": 8, "group_size": rig.GROUP}
    assert first[1].startswith("-:")
    checks = {check.name: check.outcome for check in verify(out, load=True).checks}
    assert "fail" not in checks.values()
    assert checks["loads"] == checks["vllm-experts"] == "pass"


@pytest.fixture(scope="module")
def old_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on every expert of FAMILIES["Qwen3Moe"], as saved while each was a module."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("old")
    sizes = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (64, 64))
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        for expert in range(8):
            for name, (height, width) in sizes.items():
                place = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{place}.lora_A.weight"] = torch.randn(2, width, generator=generator) * 0.3
                tensors[f"{place}.lora_B.weight"] = (
                    torch.randn(height, 2, generator=generator) * 0.3
                )
    LoraConfig(r=2, lora_alpha=4, target_modules=[*sizes], task_type="CAUSAL_LM").save_pretrained(
        folder
    )
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_nf4_experts(dense: Path, folder: Path, decoded: Path) -> None:
    """nf4 as transformers saved it while each expert was a module, and what bitsandbytes makes of
    it again."""
    import bitsandbytes.functional as bnb
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    decoded.mkdir()
    tensors, plain = {}, {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = plain[name] = weight
            continue
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        tensors[name] = packed
        tensors |= {f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}
        plain[name] = bnb.dequantize_4bit(packed, state)
    save_file(tensors, folder / "model.safetensors")
    save_file(plain, decoded / "model.safetensors")
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
            (decoded / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["Qwen3Moe"], indirect=True)
def test_experts_that_a_checkpoint_holds_fused_are_read_one_by_one(
    family: tuple[Path, RunResult], eval_text: Path, tmp_path: Path
) -> None:
    """As transformers writes them where it is not asked for the names of older checkpoints."""
    folder, _ = family
    base, out = tmp_path / "base", tmp_path / "release"
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model.save_pretrained(base, save_original_format=False)
    for file in (folder / "base").glob("token*"):
        (base / file.name).write_bytes(file.read_bytes())
    fused = Checkpoint.open(base).tensors
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused
    run(rig.recipe(base, folder / "adapter", out, eval_text))
    expected, found = Checkpoint.open(folder / "release"), Checkpoint.open(out)
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name

    for source, dense in ((folder / "base", "single"), (base, "fused")):
        export(Recipe(base=source, out=tmp_path / dense, base_quant="nf4"))
    single, again = Checkpoint.open(tmp_path / "single"), Checkpoint.open(tmp_path / "fused")
    assert again.tensors.keys() == fused.keys()
    path = "model.layers.0"
    query = f"{path}.self_attn.q_proj.weight"
    assert torch.equal(again.read(query), single.read(query))
    down = [single.read(f"{path}.mlp.experts.{number}.down_proj.weight") for number in range(8)]
    assert torch.equal(again.read(f"{path}.mlp.experts.down_proj"), torch.stack(down))


def seeing() -> Any:
    """Qwen3-VL's mixture: transformers knows no names of single experts of it."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**SIZES, **EXPERTS, "intermediate_size": 96, "head_dim": 16, "rope_parameters": rope}
    eyes: dict[str, Any] = {"depth": 2, "num_heads": 2, "hidden_size": 64, "intermediate_size": 128}
    eyes |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return transformers.Qwen3VLMoeConfig(
        text_config={**text, "moe_intermediate_size": 96}, vision_config=eyes
    )


@pytest.mark.parametrize(
    ("form", "program"), [("gptq", "gptqmodel"), ("compressed-tensors", "vLLM")]
)
def test_what_transformers_opens_fused_alone_is_told_and_exported_so(
    form: str, program: str, tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    base, adapter, out, dense = (tmp_path / n for n in ("base", "adapter", "release", "dense"))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(seeing(), dtype=torch.float32)
    rig.write_model(base, model, tokenizer)
    rig.write_adapter(adapter, model.float(), target_modules=["q_proj"], target_parameters=FUSED)
    result = run(rig.recipe(base, adapter, out, eval_text, format=form))
    (told,) = [warning for warning in result.warnings if "random" in warning]
    assert told.partition(": ")[2].startswith(f"open this one with {program}")
    assert "--format" not in told
    card = (out / "README.md").read_text()
    assert "from_pretrained" not in card
    assert ("GPTQModel" in card) is (form == "gptq")
    assert "vllm serve" in card

    export(Recipe(base=out, out=dense), dtype="float32")
    opened, info = AutoModelForImageTextToText.from_pretrained(
        dense, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    score = rig.perplexity(opened.eval(), rig.windows(base, eval_text))
    assert score == pytest.approx(result.arms["release"]["text"].perplexity, rel=rig.TOLERANCE)
    merged = tmp_path / "merged"
    export(Recipe(base=out, adapter=(str(adapter),), out=merged), dtype="float32")
    expected = PeftModel.from_pretrained(opened, adapter).merge_and_unload().state_dict()
    for name, tensor in rig.dense(merged, AutoModelForImageTextToText).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_experts_that_are_published_fused_and_transposed(
    tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    """Qwen3-VL's: transformers knows no names of single ones, quantizers and servers do."""
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    config = seeing()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    base, adapter, out, merged = (tmp_path / n for n in ("base", "adapter", "release", "merged"))
    rig.write_model(base, model, tokenizer)
    prefix, published = "model.language_model.layers", load_file(base / "model.safetensors")
    for name in published:
        if ".experts." in name:
            published[name] = published[name].transpose(1, 2).contiguous()
    assert published[f"{prefix}.0.mlp.experts.gate_up_proj"].shape == (8, 64, 192)
    save_file(published, base / "model.safetensors", metadata={"format": "pt"})
    rig.write_adapter(adapter, model.float(), target_modules=["q_proj"], target_parameters=FUSED)
    asked = rig.recipe(base, adapter, out, eval_text)
    result = run(asked)
    export(replace(asked, out=merged), dtype="float32")

    trained = PeftModel.from_pretrained(rig.dense(base, AutoModelForImageTextToText), adapter)
    expected = trained.merge_and_unload().state_dict()
    for name, tensor in rig.dense(merged, AutoModelForImageTextToText).state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    release = open_format(Checkpoint.open(out))
    tensors = {name: release.dense(name) for name in release.weights}
    for layer in range(2):
        path = f"{prefix}.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{path}.{n}.{name}.weight").T for n in range(8)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        tensors[f"{path}.gate_up_proj"] = torch.cat([gate, up], dim=2)
        tensors[f"{path}.down_proj"] = down.contiguous()
    shutil.copytree(base, tmp_path / "decoded")
    save_file(tensors, tmp_path / "decoded" / "model.safetensors")
    rig.check_arms(
        result,
        rig.dense(base, AutoModelForImageTextToText),
        adapter,
        rig.dense(tmp_path / "decoded", AutoModelForImageTextToText),
        rig.windows(base, eval_text),
    )


@pytest.mark.parametrize("family", ["Qwen3Moe"], indirect=True)
def test_quantized_experts_and_an_adapter_of_single_experts(
    family: tuple[Path, RunResult], old_adapter: Path, eval_text: Path, tmp_path: Path
) -> None:
    folder, _ = family
    write_nf4_experts(folder / "base", tmp_path / "nf4", tmp_path / "decoded")
    out = tmp_path / "release"
    asked = rig.recipe(tmp_path / "nf4", old_adapter, out, eval_text, format="compressed-tensors")
    result = run(asked)
    base = rig.dense(tmp_path / "decoded", AutoModelForCausalLM)
    release = rig.reopened(out, tmp_path / "dense", AutoModelForCausalLM)
    tokens = rig.windows(folder / "base", eval_text)
    rig.check_arms(result, base, old_adapter, release, tokens)
    names = Checkpoint.open(out).tensors
    assert "model.layers.0.mlp.experts.7.up_proj.weight_packed" in names


@pytest.mark.parametrize("family", ["Qwen3Moe"], indirect=True)
def test_a_release_is_a_base_again_and_is_proved(
    family: tuple[Path, RunResult], old_adapter: Path, eval_text: Path, tmp_path: Path
) -> None:
    folder, _ = family
    out = tmp_path / "second"
    result = run(rig.recipe(folder / "release", old_adapter, out, eval_text))
    base = rig.reopened(folder / "release", tmp_path / "first", AutoModelForCausalLM)
    release = rig.reopened(out, tmp_path / "dense", AutoModelForCausalLM)
    rig.check_arms(result, base, old_adapter, release, rig.windows(folder / "base", eval_text))
    against = Against(base=folder / "release", adapters=(old_adapter,), original=None)
    checks = {check.name: check for check in verify(out, against=against).checks}
    assert not [check for check in checks.values() if check.outcome == "fail"]
    assert checks["error"].outcome == checks["survival"].outcome == "pass"


@pytest.mark.parametrize("family", ["Qwen3Moe"], indirect=True)
def test_training_on_the_fly_quantizes_experts_only_where_they_were_modules(
    family: tuple[Path, RunResult], old_adapter: Path, eval_text: Path, tmp_path: Path
) -> None:
    folder, _ = family
    expert = "model.layers.0.mlp.experts.0.up_proj"
    for adapter, quantized in ((folder / "adapter", False), (old_adapter, True)):
        asked = rig.recipe(folder / "base", adapter, tmp_path / "out", eval_text, base_quant="nf4")
        job = make_plan(asked).ready()
        assert job.base.is_quantized(f"{expert}.weight") is quantized
        assert job.base.is_quantized("model.layers.0.self_attn.q_proj.weight")
        assert expert in job.specs
        assert any("experts are taken in 16 bits" in note for note in job.notes) is not quantized


def write_mxfp4(dense: Path, folder: Path) -> None:
    """Any codes in the layout in which gpt-oss is published, in place of a model's experts."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    tensors = load_file(dense / "model.safetensors")
    random = torch.Generator().manual_seed(4)
    for name in [
        name for name in tensors if name.endswith(("gate_up_proj", "mlp.experts.down_proj"))
    ]:
        experts, width, outs = tensors.pop(name).shape
        shape = (experts, outs, width // 32)
        codes = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        tensors[f"{name}_blocks"] = codes
        steps = torch.randint(121, 124, shape, dtype=torch.uint8, generator=random)
        tensors[f"{name}_scales"] = steps
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", ["dense", "mxfp4"])
def test_fused_experts_with_biases_stay_dense(
    form: str, tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    config = transformers.GptOssConfig(
        **{**SIZES, "head_dim": 16, "intermediate_size": 96, "num_local_experts": 4}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    rig.write_model(tmp_path / "dense", model, tokenizer)
    targets = [name for name in ATTENTION if name.endswith("_proj")]
    rig.write_adapter(
        tmp_path / "adapter", model.float(), target_modules=targets[:4], target_parameters=FUSED
    )
    if form == "mxfp4":
        write_mxfp4(tmp_path / "dense", tmp_path / "mxfp4")
    base, out = tmp_path / form, tmp_path / "release"
    result = run(rig.recipe(base, tmp_path / "adapter", out, eval_text))
    quantized = rig.loaded(base, AutoModelForCausalLM)
    release = rig.reopened(out, tmp_path / "decoded", AutoModelForCausalLM)
    tokens = rig.windows(base, eval_text)
    rig.check_arms(result, quantized, tmp_path / "adapter", release, tokens)
    assert any("mlp.experts.gate_up_proj" in warning for warning in result.warnings)
    assert any("the experts of 2 layers have biases" in warning for warning in result.warnings)
    stored = Checkpoint.open(out).tensors
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    assert "model.layers.0.self_attn.q_proj.qweight" in stored
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.0\.mlp\.experts(\..*)?$" in settings["dynamic"]


@pytest.mark.slow
def test_a_trained_mixture_keeps_its_adapter(
    tokenizer: Path, calibration_text: Path, eval_text: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    train, capitals = checkpoints.texts()[0], checkpoints.texts()[0].upper()
    speech = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**FAMILIES["Qwen3Moe"], router_aux_loss_coef=0.01)
    model = AutoModelForCausalLM.from_config(config)
    checkpoints._train(model, speech, train, steps=300)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    speech.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "o_proj"],
        target_parameters=FUSED,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model.float(), lora)
    checkpoints._train(tuned, speech, capitals, steps=30)
    tuned.save_pretrained(tmp_path / "adapter")
    capital = tmp_path / "capitals.txt"
    capital.write_text(checkpoints.texts()[1].upper(), encoding="utf-8")
    result = run(
        rig.recipe(
            tmp_path / "base",
            tmp_path / "adapter",
            tmp_path / "release",
            capital,
            calibration=str(calibration_text),
            calibration_samples=64,
        )
    )
    assert result.survival is not None
    assert result.survival.survival == pytest.approx(1, abs=0.1)
    kl = {arm: score["text"].kl.mean for arm, score in result.arms.items() if score["text"].kl}
    assert kl["release"] < 0.2 * kl["quantized_base"]
    experts = [each for layer in result.layers for each in layer.linears if each.tokens]
    assert len(experts) > 16  # of 48 linears some tokens chose
    counted = {each.name.rpartition(".")[0]: each.tokens for each in experts}
    top, tokens = config.num_experts_per_tok, 64 * rig.LENGTH
    for layer in range(config.num_hidden_layers):
        own = [n or 0 for name, n in counted.items() if f"layers.{layer}." in name]
        assert sum(own) == top * tokens
