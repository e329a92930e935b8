"""A head in few bits: against transformers, a naive GPTQ, and those that load it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge import precision
from qmerge.errors import PlanError
from qmerge.formats import open_format
from qmerge.pipeline import run
from qmerge.plan import make_plan
from qmerge.recipe import Recipe
from qmerge.results import LinearResult, RunResult
from qmerge.storage.checkpoint import Checkpoint
from qmerge.verify import Against, verify
from qmerge.walk import Walk
from tests.formats.test_gptq_oracle import same_weights
from tests.gptq.reference import Steps, gptq
from tests.test_pipeline import close, decoded_model, perplexity, windows
from tests.test_reshaped import untie

HEAD = "lm_head=bits:8"
LENGTH, SAMPLES, WINDOWS = 64, 16, 16


@pytest.fixture(scope="module")
def untied(tiny_original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untie(tiny_original, tmp_path_factory.mktemp("untied") / "base")


@pytest.fixture(scope="module")
def adapter(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that tunes the head too."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    live = get_peft_model(model, config)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("head") / "adapter"
    live.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked(untied: Path, adapter: Path, calibration_text: Path, eval_text: Path) -> Recipe:
    return Recipe(
        base=untied,
        adapter=(str(adapter),),
        out=Path("unused"),
        calibration=str(calibration_text),
        calibration_samples=SAMPLES,
        eval=(f"held_out={eval_text}",),
        eval_windows=WINDOWS,
        sequence_length=LENGTH,
        group_size=32,
        override=(HEAD,),
    )


def head_of(result: RunResult) -> LinearResult:
    layer = result.layers[-1]
    assert (layer.name, layer.kind) == ("lm_head", "head")
    return layer.linears[0]


def read_by_head(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers feeds the head, float64 [tokens, hidden]."""
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(input_ids=tokens)
    handle.remove()
    return torch.cat(seen).flatten(0, 1).double()


@pytest.fixture(scope="module")
def defaults(asked: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunResult]:
    recipe = replace(asked, out=tmp_path_factory.mktemp("defaults") / "release")
    return recipe, run(recipe)


def test_a_plain_one_is_what_a_naive_gptq_makes(
    asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_backends", dict)  # float32 on any machine
    plain = replace(
        asked,
        adapter=(),
        out=tmp_path / "release",
        objective="symmetric",
        refine=False,
        override=("lm_head=bits:2",),
    )
    tokens = make_plan(plain).ready().calibration.tokens
    said = head_of(run(plain))
    release = decoded_model(plain.out)
    X = read_by_head(release, tokens)
    H = X.T @ X / len(X)
    W = Checkpoint.open(plain.base).read("lm_head.weight").double()
    grid = open_format(Checkpoint.open(plain.out)).integer("lm_head.weight")
    assert grid is not None
    given = Steps(grid.scales_OG.double(), grid.zeros_OG.double(), grid.group_of_column)
    naive = gptq(W, H, given, bits=2, desc_act=True)
    assert (naive.codes == grid.codes_OI).double().mean() > 0.999
    error = ((grid.dense().double() - W) @ X.T).square().sum() / (W @ X.T).square().sum()
    assert said.error == pytest.approx(float(error), rel=1e-3)


def test_the_release_holds_it_and_is_scored_with_it(
    defaults: tuple[Recipe, RunResult], eval_text: Path
) -> None:
    recipe, result = defaults
    said = head_of(result)
    grid = open_format(Checkpoint.open(recipe.out)).integer("lm_head.weight")
    assert grid is not None
    assert (grid.bits, grid.group_size) == (said.bits, said.group_size) == (8, 32)
    assert said.survival is not None
    assert said.survival.survival == pytest.approx(1, abs=0.01)
    settings = json.loads((recipe.out / "config.json").read_text())["quantization_config"]
    assert settings["lm_head"] is True
    assert settings["dynamic"]["+:^lm_head$"] == {"bits": 8, "group_size": 32}
    found = perplexity(decoded_model(recipe.out), windows(recipe.out, eval_text)[:WINDOWS])
    assert close(result.arms["release"]["held_out"].perplexity, found, 1e-5)


def test_it_verifies_from_its_inputs(defaults: tuple[Recipe, RunResult], adapter: Path) -> None:
    recipe, _ = defaults
    against = Against(base=recipe.base, adapters=(adapter,), original=None)
    found = verify(recipe.out, against=against)
    assert found.failed == ()


def test_stopped_behind_the_head_a_run_ends_in_the_same_bytes(
    defaults: tuple[Recipe, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, result = defaults
    again = replace(recipe, out=tmp_path / "again")

    def stop(_self: Walk) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "scores", stop)
        with pytest.raises(KeyboardInterrupt):
            run(again)
    resumed = run(again)
    assert resumed.arms["release"]["held_out"] == result.arms["release"]["held_out"]
    assert len(resumed.layers) == len(result.layers)
    for shard in recipe.out.glob("*.safetensors"):
        assert shard.read_bytes() == (again.out / shard.name).read_bytes(), shard.name


def test_in_compressed_tensors_the_head_is_not_ignored(asked: Recipe, tmp_path: Path) -> None:
    recipe = replace(asked, out=tmp_path / "release", format="compressed-tensors")
    run(recipe)
    settings = json.loads((recipe.out / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == []
    assert "lm_head.weight_packed" in Checkpoint.open(recipe.out).tensors
    assert [c.text for c in verify(recipe.out).checks if c.outcome == "fail"] == []


def test_a_tied_head_is_a_fault(asked: Recipe, tiny_original: Path, tiny_adapter: Path) -> None:
    tied = replace(asked, base=tiny_original, adapter=(str(tiny_adapter),))
    with pytest.raises(PlanError) as caught:
        run(tied)
    assert ["under a second name" in fault.message for fault in caught.value.faults] == [True]


@pytest.mark.slow
def test_gptqmodel_loads_it(
    defaults: tuple[Recipe, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gptqmodel", reason="needs the extra 'verify'")
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    monkeypatch.setattr(TorchLinear, "optimize", lambda *_, **__: None)
    recipe, result = defaults
    loaded = GPTQModel.load(
        str(recipe.out), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16
    )
    assert type(loaded.model.lm_head) is TorchLinear
    linears = sum(len(layer.linears) for layer in result.layers)
    assert same_weights(loaded.model, recipe.out) == linears
