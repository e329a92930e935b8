"""Vision-language models: the language model is quantized, what sees is merged and left dense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from qmerge import machine
from qmerge.model.frame import Frame
from qmerge.model.layer import WindowCalls, called_bytes, fill
from qmerge.model.layer import run as run_layer
from qmerge.model.skeleton import build_skeleton
from qmerge.pipeline import run
from qmerge.plan import make_plan
from qmerge.progress import Silent
from qmerge.storage.checkpoint import Checkpoint
from qmerge.verify import Against, verify
from tests import checkpoints
from tests.families import rig
from tests.model.test_frame import State, layer_weights
from tests.test_images import write_processor, write_rows

IMAGE, START, END, VIDEO = range(checkpoints.VOCABULARY, checkpoints.VOCABULARY + 4)
"""Tokens behind those of text that stand for an image, begin and end one, and stand for a video."""
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": checkpoints.VOCABULARY + 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
EYES: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}


def config(name: str) -> Any:
    text = {**TEXT, "rope_parameters": MROPE}
    if name == "Qwen2-VL":
        eyes = {**EYES, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=eyes, **TOKENS)
    wide = {**EYES, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128}
    if name == "Qwen2.5-VL":
        eyes = {**wide, "fullatt_block_indexes": [1], "window_size": 16}
        return Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **TOKENS)
    if name == "Qwen3-VL":
        eyes = {**wide, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        return Qwen3VLConfig(text_config={**text, "head_dim": 16}, vision_config=eyes, **TOKENS)
    clip = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    llama = LlamaConfig(**TEXT)
    return LlavaConfig(text_config=llama, vision_config=clip, image_token_index=IMAGE)


FAMILIES = {
    "Qwen2-VL": "visual.blocks.0.attn.qkv",
    "Qwen2.5-VL": "visual.merger.mlp.0",
    "Qwen3-VL": "visual.deepstack_merger_list.0.linear_fc1",
    "LLaVA": "multi_modal_projector.linear_1",
}
"""With a module that sees, which the adapter of each targets too."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    checkpoints.write_tokenizer(folder)
    return folder


def write(name: str, folder: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config(name), dtype=torch.float32)
    rig.write_model(folder / "original", model, tokenizer)
    targets = [*checkpoints.LINEARS, FAMILIES[name]]
    rig.write_adapter(folder / "adapter", model.float(), target_modules=targets)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "LLaVA" else pytest.mark.slow) for n in FAMILIES]
)
def test_every_arm_equals_transformers_and_peft_on_text(
    name: str, tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    write(name, tmp_path, tokenizer)
    original, base, adapter, out = (tmp_path / p for p in ("original", "nf4", "adapter", "release"))
    (original / "preprocessor_config.json").write_text("{}")
    rig.write_nf4(original, base, AutoModelForImageTextToText)
    (base / "preprocessor_config.json").write_text("{}")
    result = run(rig.recipe(base, spelt_before(adapter, tmp_path), out, eval_text))
    quantized = rig.dense(base, AutoModelForImageTextToText)
    release = rig.reopened(out, tmp_path / "decoded", AutoModelForImageTextToText)
    rig.check_arms(result, quantized, adapter, release, rig.windows(original, eval_text))
    assert (out / "preprocessor_config.json").read_text() == "{}"
    check_names(original, out, FAMILIES[name])
    check_merged(rig.dense(base, AutoModelForImageTextToText), adapter, release, FAMILIES[name])


def spelt_before(adapter: Path, folder: Path) -> Path:
    """The adapter with the names of a time when the language model had no part of its own."""
    from safetensors.torch import load_file, save_file

    old = folder / "spelt before"
    old.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    before = {
        name.replace("model.language_model.", "model.").replace(
            "model.model.visual", "model.visual"
        ): t
        for name, t in tensors.items()
    }
    assert before.keys() != tensors.keys()
    save_file(before, old / "adapter_model.safetensors")
    (old / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return old


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLaVA", "Qwen2.5-VL"])
def test_transformers_loads_the_release_through_gptqmodel(
    name: str, tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    write(name, tmp_path, tokenizer)
    base, adapter, out = (tmp_path / part for part in ("original", "adapter", "release"))
    run(rig.recipe(base, adapter, out, eval_text))
    checks = verify(out, load=True).checks
    assert not [check for check in checks if check.outcome == "fail"], checks
    assert any(check.name == "perplexity-text" and check.outcome == "pass" for check in checks)


def pictures(name: str) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Windows without an image, with one and with two, and what the model takes beside tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 500, (3, 40), generator=generator)
    count = 16 if name == "LLaVA" else 4
    places: list[list[int]] = [[], [3], [1, 20]]
    inputs: list[dict[str, torch.Tensor]] = []
    for window, starts in zip(tokens, places, strict=True):
        for start in starts:
            window[start : start + count] = IMAGE
        own = {} if name == "LLaVA" else {"mm_token_type_ids": (window == IMAGE).long()[None]}
        if starts:
            shape = (3, 16, 16) if name == "LLaVA" else (16, 96)
            pixels = torch.randn(len(starts), *shape, generator=generator)
            own["pixel_values"] = pixels if name == "LLaVA" else pixels.flatten(0, 1)
        if starts and name != "LLaVA":
            own["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(starts))
        inputs.append(own)
    return tokens, inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_windows_with_images_streamed_equal_forward(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config(name), dtype=torch.float32).eval()
    rig.make_loud(model)
    tokens, inputs = pictures(name)
    with torch.inference_mode():
        expected = [
            model(input_ids=window[None], use_cache=False, **own).logits[0]
            for window, own in zip(tokens, inputs, strict=True)
        ]
        blind = model(input_ids=tokens[1:2], use_cache=False).logits[0]
    assert not torch.allclose(blind, expected[1], atol=1e-2)
    skeleton = build_skeleton(config(name))
    frame = Frame(skeleton, State(model))
    entered: list[torch.Tensor] = []
    calls = frame.enter_all(tokens, inputs, 1, entered.append)
    each = [call for own in calls if isinstance(own, WindowCalls) for call in own.windows]
    planned = len(tokens) * machine.called_bytes(skeleton, tokens.shape[1])
    without = called_bytes([replace(call, added=None) for call in each])
    assert without == pytest.approx(planned, rel=0.1)
    hidden = torch.cat(entered)
    for index, call in enumerate(calls):
        layer = skeleton.layer(index)
        fill(layer, layer_weights(model, skeleton.layer_path(index)))
        hidden = run_layer(layer, hidden, call.part(0, 3))
    found = frame.logits(
        frame.leave(hidden).flatten(0, 1), 0, frame.head_rows(0, TEXT["vocab_size"])
    )
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def illustrated(name: str, tokenizer: Path, folder: Path) -> tuple[Path, Path, Path, str]:
    """A model with its processor, an adapter, where the release goes, and rows with images."""
    write(name, folder, tokenizer)
    base = folder / "original"
    if name == "LLaVA":
        write_processor(tokenizer, base)
    else:
        write_qwen_processor(tokenizer, base)
    write_rows(folder / "rows.jsonl", checkpoints.texts()[0])
    return base, folder / "adapter", folder / "release", str(folder / "rows.jsonl")


def test_the_code_on_the_card_opens_the_release(
    tokenizer: Path, eval_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    base, adapter, out, _ = illustrated("LLaVA", tokenizer, tmp_path)
    result = run(rig.recipe(base, adapter, out, eval_text, format="compressed-tensors"))
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert type(found["model"]).__name__ == "LlavaForConditionalGeneration"
    assert type(found["processor"]).__name__ == "LlavaProcessor"
    score = rig.perplexity(found["model"], rig.windows(base, eval_text))
    assert score == pytest.approx(result.arms["release"]["text"].perplexity, rel=0.01)


def write_qwen_processor(tokenizer: Path, folder: Path) -> None:
    pytest.importorskip("torchvision")  # transformers wants it for the part that reads videos
    from transformers import (
        AutoTokenizer,
        Qwen2VLImageProcessorPil,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    inner = AutoTokenizer.from_pretrained(tokenizer)
    tokens = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    inner.add_special_tokens({"additional_special_tokens": tokens})
    sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**sizes),
        tokenizer=inner,
        video_processor=Qwen2VLVideoProcessor(**sizes),
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    ["LLaVA", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Qwen2.5-VL", "Qwen3-VL"))],
)
def test_calibration_on_text_with_images(
    name: str, tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    base, adapter, out, rows = illustrated(name, tokenizer, tmp_path)
    asked = rig.recipe(base, adapter, out, eval_text, calibration=rows, sequence_length=64)
    result = run(replace(asked, calibration_samples=8, eval_windows=4, memory=1 << 20))
    release = rig.reopened(out, tmp_path / "decoded", AutoModelForImageTextToText)
    quantized = rig.dense(base, AutoModelForImageTextToText)
    tokens = rig.windows(base, eval_text).view(-1, 64)
    rig.check_arms(result, quantized, adapter, release, tokens)
    assert (out / "processor_config.json").is_file()
    against = Against(base=base, adapters=(adapter,), original=None)
    checks = {check.name: check.outcome for check in verify(out, against=against).checks}
    assert checks["error"] == "pass"  # second moments of the same windows, images included
    assert checks["untouched"] == "pass"


class Stopped(Silent):
    """Ends a run when it comes to its second layer."""

    def step(self, label: str) -> None:
        if label == "layer 1":
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_on_images_goes_on_where_it_was_stopped(
    tokenizer: Path, eval_text: Path, tmp_path: Path
) -> None:
    base, adapter, out, rows = illustrated("LLaVA", tokenizer, tmp_path)
    asked = rig.recipe(base, adapter, out, eval_text, calibration=rows, sequence_length=64)
    asked = replace(asked, calibration_samples=8, eval_windows=2)
    with pytest.raises(KeyboardInterrupt):
        run(asked, Stopped())
    stopped = run(asked)
    once = run(replace(asked, out=tmp_path / "once"))
    shards = {name: digest for name, digest in once.release.files.items() if "model-" in name}
    assert shards.items() <= stopped.release.files.items()


def test_images_are_for_calibration_alone(tokenizer: Path, eval_text: Path, tmp_path: Path) -> None:
    base, adapter, out, rows = illustrated("LLaVA", tokenizer, tmp_path)
    (fault,) = make_plan(rig.recipe(base, adapter, out, eval_text, eval=(rows,))).faults
    assert "only calibration text may" in fault.message


def check_names(original: Path, release: Path, seeing: str) -> None:
    """On disk a release is named as the original is; only linears of the language are packed."""
    before = set(Checkpoint.open(original).tensors)
    after = set(Checkpoint.open(release).tensors)
    packed = {name.rpartition(".")[0] for name in after if name.endswith(".qweight")}
    assert {name for name in before if name.rpartition(".")[0] not in packed} <= after
    assert {f"{module}.weight" for module in packed} == before - after
    assert len(packed) == 2 * len(checkpoints.LINEARS)
    assert not any(seeing in module for module in packed)
    assert json.loads((release / "config.json").read_text())["quantization_config"]


def check_merged(quantized: Any, adapter: Path, release: Any, seeing: str) -> None:
    """The adapted module of the tower, which no text passes through, is PEFT's merge of it."""
    from peft import PeftModel

    name = next(n for n in release.state_dict() if n.endswith(f"{seeing}.weight"))
    before = quantized.state_dict()[name].clone()
    merged = PeftModel.from_pretrained(quantized, adapter).merge_and_unload().state_dict()[name]
    assert not torch.equal(merged, before)
    torch.testing.assert_close(release.state_dict()[name], merged, atol=1e-2, rtol=1e-2)
