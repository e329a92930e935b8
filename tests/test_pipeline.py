"""The main job on tiny real checkpoints, against plain transformers, PEFT and gptqmodel."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge import cli
from qmerge.cli.outputs import Outputs
from qmerge.errors import ModelError, PlanError, StorageError
from qmerge.evaluate import evaluate
from qmerge.formats import open_format
from qmerge.pipeline import _hash_inputs, run
from qmerge.plan import make_plan
from qmerge.progress import Silent
from qmerge.recipe import EvaluateRecipe, Recipe
from qmerge.report import render
from qmerge.report.plan import render as render_plan
from qmerge.results import RunResult
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.journal import Journal

LENGTH, WINDOWS = 64, 24


def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """Mean over all targets, by transformers alone."""
    with torch.inference_mode():
        logits = model(input_ids=tokens).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return math.exp(loss.item())


def windows(folder: Path, text: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), verbose=False)["input_ids"]
    return torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


def load(folder: Path, adapter: Path | None = None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found / expected - 1) < tolerance


@pytest.fixture(scope="module")
def asked(
    tiny_original: Path, tiny_adapter: Path, calibration_text: Path, eval_text: Path
) -> Recipe:
    return Recipe(
        base=tiny_original,
        adapter=(str(tiny_adapter),),
        out=Path("unused"),
        calibration=str(calibration_text),
        calibration_samples=32,
        eval=(f"held_out={eval_text}",),
        eval_windows=WINDOWS,
        sequence_length=LENGTH,
        group_size=32,
    )


@pytest.fixture(scope="module")
def nf4_run(
    asked: Recipe, tiny_nf4: Path, tiny_original: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, RunResult]:
    """Both strategies, scored on the text and on its capitals, which the adapter was tuned for."""
    folder = tmp_path_factory.mktemp("nf4")
    capitals = folder / "capitals.txt"
    capitals.write_text(Path(asked.eval[0].partition("=")[2]).read_text().upper())
    recipe = replace(
        asked,
        base=tiny_nf4,
        original=tiny_original,
        out=folder / "release",
        strategy="auto",
        eval=(*asked.eval, f"capitals={capitals}"),
    )
    return recipe, run(recipe)


def texts_of(recipe: Recipe) -> dict[str, Path]:
    return {name: Path(file) for name, _, file in (text.partition("=") for text in recipe.eval)}


def test_arms_equal_transformers_and_peft_on_every_text(
    nf4_run: tuple[Recipe, RunResult], tiny_original: Path, tiny_adapter: Path
) -> None:
    from peft import PeftModel

    recipe, result = nf4_run

    def merged(base: Any) -> Any:
        return PeftModel.from_pretrained(base, tiny_adapter).merge_and_unload().eval()

    decoded = decoded_model(recipe.base)
    chosen = result.strategy.chosen
    other = next(c.strategy for c in result.strategy.candidates if c.strategy != chosen)
    onto = {"dequantize": merged(decoded_model(recipe.base)), "substitute": None}
    onto["substitute"] = merged(load(tiny_original))
    arms = {
        "original": (load(tiny_original), 1e-4),
        # bitsandbytes multiplies in its compute dtype, bf16; both sides decode the same weights.
        "quantized_base": (load(recipe.base), 1e-2),
        "merged": (onto[chosen], 1e-5),
        f"merged_{other}": (onto[other], 1e-5),
        "release": (decoded_model(recipe.out), 1e-5),
        # The adapter goes live on this very model, so it comes last.
        "trained": (PeftModel.from_pretrained(decoded, tiny_adapter).eval(), 1e-5),
    }
    assert set(arms) == set(result.arms) - {f"release_{other}"}
    for corpus, text in texts_of(recipe).items():
        tokens = windows(tiny_original, text)
        for arm, (model, tolerance) in arms.items():
            found = result.arms[arm][corpus].perplexity
            assert close(found, perplexity(model, tokens), tolerance), (arm, corpus)
        base = perplexity(decoded_model(recipe.base), tokens)
        assert close(result.arms["quantized_base"][corpus].perplexity, base, 1e-5)


def test_divergence_equals_that_of_full_logits(
    nf4_run: tuple[Recipe, RunResult], tiny_adapter: Path
) -> None:
    from peft import PeftModel

    recipe, result = nf4_run
    trained = PeftModel.from_pretrained(decoded_model(recipe.base), tiny_adapter).eval()
    release = decoded_model(recipe.out)
    for corpus, text in texts_of(recipe).items():
        tokens = windows(recipe.out, text)
        with torch.inference_mode():
            p, q = (
                model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
                for model in (trained, release)
            )
        kl = (p.exp() * (p - q)).sum(-1)
        found = result.arms["release"][corpus]
        assert found.kl.mean == pytest.approx(kl.mean().item(), rel=1e-4)
        shares = torch.tensor([0.5, 0.9, 0.95, 0.99, 0.999, 1.0], dtype=torch.float64)
        told = (getattr(found.kl, name) for name in ("median", "p90", "p95", "p99", "p999", "max"))
        assert list(told) == pytest.approx(kl.flatten().quantile(shares).tolist(), rel=1e-3)
        same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        assert found.same_top.mean == pytest.approx(same, abs=1e-3)
        right = [x.exp().gather(-1, tokens[:, 1:, None]) for x in (p, q)]
        moved = (right[0] - right[1]).square().mean().sqrt().item()
        assert found.probability_change.rms == pytest.approx(moved, rel=1e-4)


def decoded_model(folder: Path) -> Any:
    """A dense transformers model with the weights that the readers decode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    form = open_format(Checkpoint.open(folder))
    model.load_state_dict({name: form.dense(name) for name in form.weights}, strict=False)
    return model


def test_kl_by_depth_equals_final_norm_and_head_on_hidden_states(
    nf4_run: tuple[Recipe, RunResult], tiny_adapter: Path, eval_text: Path
) -> None:
    from peft import PeftModel

    recipe, result = nf4_run
    tokens = windows(recipe.out, eval_text)[:16]
    base = decoded_model(recipe.base)
    trained = PeftModel.from_pretrained(base, tiny_adapter).merge_and_unload().eval()
    ended = [logits_by_depth(model, tokens) for model in (trained, decoded_model(recipe.out))]
    for layer, reference, release in zip(result.layers, *ended, strict=True):
        expected = torch.nn.functional.kl_div(
            release, reference, reduction="batchmean", log_target=True
        )
        assert layer.kl == pytest.approx(expected.item(), rel=1e-3)
    assert result.layers[-1].kl < 3 * result.arms["release"]["held_out"].kl.mean


def logits_by_depth(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities behind each layer, of every fourth token."""
    hidden: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: hidden.append(out))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(input_ids=tokens)
        rows = [model.model.norm(h[:, 2::4]).flatten(0, 1) for h in hidden]
        found = [model.lm_head(row).double().log_softmax(-1) for row in rows]
    for hook in hooks:
        hook.remove()
    return found


def test_auto_publishes_the_nearer_release(nf4_run: tuple[Recipe, RunResult]) -> None:
    _, result = nf4_run
    assert {c.strategy for c in result.strategy.candidates} == {"dequantize", "substitute"}
    kl = {c.strategy: c.kl.mean for c in result.strategy.candidates}
    assert (
        result.strategy.chosen == min(kl, key=lambda name: kl[name])
        or "within two" in result.strategy.why
    )
    assert result.arms["release"]["held_out"].kl.mean == kl[result.strategy.chosen]
    other = next(s for s in kl if s != result.strategy.chosen)
    assert result.arms[f"release_{other}"]["held_out"].kl.mean == kl[other]


def test_the_bases_error_is_set_against_the_adapters_effect(
    nf4_run: tuple[Recipe, RunResult], tiny_original: Path, tiny_adapter: Path
) -> None:
    """In the first linears every arm has the same input, which transformers shows as well."""
    from peft import PeftModel

    recipe, result = nf4_run
    model = load(tiny_original)
    inputs: list[torch.Tensor] = []
    q_proj = model.model.layers[0].self_attn.q_proj
    q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.inference_mode():
        model(input_ids=make_plan(replace(recipe, out=Path("unused"))).ready().calibration.tokens)
    name = "model.layers.0.self_attn.q_proj"
    wanted, base = q_proj.weight.detach(), decoded_model(recipe.base)
    decoded = base.get_submodule(name).weight.detach().clone()
    merged = PeftModel.from_pretrained(base, tiny_adapter).merge_and_unload()
    update = merged.get_submodule(name).weight.detach() - decoded
    ratio = ((wanted - decoded) @ inputs[0].T).norm() / (update @ inputs[0].T).norm()
    linear = next(x for layer in result.layers for x in layer.linears if x.name == name)
    assert linear.survival is not None
    assert close(linear.survival.error_ratio or 0.0, float(ratio), 1e-3)
    assert all(layer.survival and layer.survival.error_ratio for layer in result.layers)


def test_report_keeps_its_keys(nf4_run: tuple[Recipe, RunResult]) -> None:
    recipe, result = nf4_run
    report = json.loads((recipe.out / "qmerge_report.json").read_text())
    for key in (
        *("schema_version", "qmerge_version", "recipe", "strategy", "corpora", "arms", "change"),
        *("survival", "layers", "timings", "peak_rss_bytes"),
    ):
        assert report[key] is not None, key
    assert RunResult.from_dict(report).to_dict() == result.to_dict()
    score = report["arms"]["release"]["held_out"]
    assert {"perplexity", "stderr", "tokens", "kl", "same_top"} <= score.keys()
    assert score["tokens"] == WINDOWS * (LENGTH - 1)
    assert {"ratio", "ratio_stderr", "difference", "ci95"} <= report["change"]["held_out"].keys()
    assert len(report["layers"]) == 3
    stages = {"plan", "digest", "dequantize", "merge", "evaluate", "requantize", "write", "score"}
    assert stages <= report["timings"].keys()
    assert set(report["memory"]) == report["timings"].keys() - {"total"}
    most = 1.1 * report["peak_rss_bytes"]  # which the kernel counts by another clock
    assert all(1 << 24 < peak <= most for peak in report["memory"].values())
    measured = sum(seconds for name, seconds in report["timings"].items() if name != "total")
    assert measured <= report["timings"]["total"]
    assert {"calibration", "evaluation"} <= report["corpora"].keys()


def test_the_report_says_where_figures_come_from(nf4_run: tuple[Recipe, RunResult]) -> None:
    recipe, result = nf4_run
    for role, folder in (
        ("base", recipe.base),
        ("original", recipe.original),
        ("adapter", Path(recipe.adapter[0])),
    ):
        assert folder is not None
        expected = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
        }
        assert result.inputs[role].files == expected
    assert result.versions["torch"] == torch.__version__
    assert {"transformers", "peft", "safetensors", "bitsandbytes"} <= result.versions.keys()
    assert result.recipe["seed"] == recipe.seed
    text = Path(str(recipe.calibration)).read_bytes()
    assert result.corpora.calibration.text_sha256 == hashlib.sha256(text).hexdigest()
    assert result.corpora.evaluation["held_out"].sha256 is not None


def test_release_holds_what_its_users_need(
    nf4_run: tuple[Recipe, RunResult], tiny_original: Path
) -> None:
    recipe, _ = nf4_run
    names = {path.name for path in recipe.out.iterdir()}
    assert {"config.json", "quantize_config.json", "README.md", "qmerge_recipe.yaml"} <= names
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (recipe.out / name).read_bytes() == (recipe.base / name).read_bytes()
    original = Checkpoint.open(tiny_original).tensors
    release = Checkpoint.open(recipe.out)
    assert set(open_format(release).weights) == set(original)
    assert not recipe.out.with_name("release.partial").exists()


def test_release_opens_in_transformers_as_it_was_scored(
    nf4_run: tuple[Recipe, RunResult], eval_text: Path
) -> None:
    pytest.importorskip("gptqmodel", reason="opening a release needs the extra 'verify'")
    recipe, result = nf4_run
    found = perplexity(load(recipe.out), windows(recipe.out, eval_text))
    assert close(found, result.arms["release"]["held_out"].perplexity, 2e-3)


def test_untouched_weights_are_the_base_s(nf4_run: tuple[Recipe, RunResult]) -> None:
    recipe, result = nf4_run
    source = recipe.base if result.strategy.chosen == "dequantize" else recipe.original
    assert source is not None
    base, release = Checkpoint.open(source), Checkpoint.open(recipe.out)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(base.read(name), release.read(name))


def test_gptq_base_lends_its_settings(
    asked: Recipe, tiny_gptq: Path, tiny_adapter: Path, eval_text: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    out = tmp_path / "release"
    result = run(replace(asked, base=tiny_gptq, out=out, group_size=None, act_order="full"))
    assert result.recipe["group_size"] == 32
    settings = json.loads((out / "quantize_config.json").read_text())
    assert (settings["bits"], settings["group_size"], settings["desc_act"]) == (4, 32, True)
    tokens = windows(tiny_gptq, eval_text)
    base = perplexity(load(tiny_gptq), tokens)
    assert close(result.arms["quantized_base"]["held_out"].perplexity, base, 1e-3)
    trained = PeftModel.from_pretrained(decoded_model(tiny_gptq), tiny_adapter).eval()
    expected = perplexity(trained, tokens)
    assert close(result.arms["trained"]["held_out"].perplexity, expected, 1e-5)
    live = perplexity(load(tiny_gptq, tiny_adapter), tokens)
    assert close(result.arms["trained"]["held_out"].perplexity, live, 1e-3)
    released = perplexity(load(out), tokens)
    assert close(released, result.arms["release"]["held_out"].perplexity, 2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 8, "group_size": -1, "act_order": "none"},
        {"bits": 3, "format": "gptq_v2"},
        {"bits": 2, "symmetric": False, "format": "gptq_v2"},
        {"symmetric": False},
        {"format": "compressed-tensors"},
        {"memory": 1 << 20},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_setting_makes_a_release_that_decodes_as_scored(
    asked: Recipe, tiny_nf4: Path, eval_text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    out = tmp_path / "release"
    result = run(replace(asked, base=tiny_nf4, out=out, **changes))
    found = perplexity(decoded_model(out), windows(out, eval_text))
    assert close(found, result.arms["release"]["held_out"].perplexity, 1e-5)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_overrides_stand_in_the_release_and_its_config(
    asked: Recipe, tiny_nf4: Path, eval_text: Path, tmp_path: Path, form: Any
) -> None:
    recipe = replace(
        asked,
        base=tiny_nf4,
        out=tmp_path / "out",
        format=form,
        override=("*.down_proj=bits:8", "*.layers.1.mlp.down_proj=group:64", "*.2.*=skip"),
    )
    result = run(recipe)
    linears = {each.name: each for layer in result.layers for each in layer.linears}
    opened = open_format(Checkpoint.open(recipe.out))
    for name, each in linears.items():
        found = opened.integer(f"{name}.weight")
        down, second = name.endswith("down_proj"), ".1." in name
        assert (found.bits, found.group_size) == (
            8 if down else 4, 64 if down and second else 32
        ), name  # fmt: skip
        assert (each.bits, each.group_size) == (found.bits, found.group_size)
    assert len(linears) == 14
    assert not opened.weights["model.layers.2.mlp.down_proj.weight"].quantized
    decoded = perplexity(decoded_model(recipe.out), windows(recipe.out, eval_text))
    assert close(decoded, result.arms["release"]["held_out"].perplexity, 1e-5)


def test_overrides_that_tear_siblings_or_fit_nothing_are_faults(
    asked: Recipe, tiny_nf4: Path
) -> None:
    torn = replace(asked, base=tiny_nf4, override=("*.q_proj=bits:8", "*.no_proj=skip"))
    with pytest.raises(PlanError) as caught:
        run(torn)
    said = [fault.message for fault in caught.value.faults]
    assert any("fits no linear" in text for text in said)
    names = "self_attn.q_proj and self_attn.k_proj and self_attn.v_proj"
    assert f"gives {names} of 3 layers, which servers fuse, different grids" in said


@pytest.mark.parametrize(
    ("given", "proposed"),
    [
        ("*.q_proj=bits:8", r"re:.*\.self_attn\.(q_proj|k_proj|v_proj)=bits:8"),
        ("*.layers.1.mlp.up_proj=skip", r"re:model\.layers\.(1)\.mlp\.(gate_proj|up_proj)=skip"),
        ("re:.*[12].*v_proj=group:64",
         r"re:model\.layers\.(1|2)\.self_attn\.(q_proj|k_proj|v_proj)=group:64"),
    ],
)  # fmt: skip
def test_a_torn_pattern_is_one_fault_and_the_proposed_one_is_none(
    asked: Recipe, given: str, proposed: str
) -> None:
    (fault,) = make_plan(replace(asked, override=(given,))).faults
    assert f"--override '{proposed}'" in str(fault.hint)
    assert make_plan(replace(asked, override=(proposed,))).faults == ()


def test_micro_batches_quantize_alike(asked: Recipe, tiny_nf4: Path, tmp_path: Path) -> None:
    whole = run(replace(asked, base=tiny_nf4, out=tmp_path / "whole"))
    parts = run(replace(asked, base=tiny_nf4, out=tmp_path / "parts", memory=1 << 20))
    first, second = whole.arms["release"]["held_out"], parts.arms["release"]["held_out"]
    assert close(first.perplexity, second.perplexity, 1e-2)
    assert abs(whole.survival.survival - parts.survival.survival) < 0.02


def test_a_stopped_run_goes_on_to_the_same_bytes(
    asked: Recipe, tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmerge.walk import Walk

    straight = replace(asked, base=tiny_nf4, out=tmp_path / "straight")
    run(straight)
    stopped = replace(asked, base=tiny_nf4, out=tmp_path / "stopped")
    layer = Walk.layer

    def stop(self: Walk, unit: Any) -> None:
        if unit.index == 1:
            raise KeyboardInterrupt
        layer(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "layer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    assert not stopped.out.exists()
    assert (tmp_path / "stopped.partial" / "journal.jsonl").is_file()
    journal = tmp_path / "stopped.partial" / "journal.jsonl"
    held = journal.read_bytes()
    with Journal.open(journal), pytest.raises(StorageError, match="another process is at work"):
        make_plan(stopped)
    os.utime(journal, ns=(0, 0))
    planned = make_plan(stopped).summary
    assert (journal.read_bytes(), journal.stat().st_mtime_ns) == (held, 0)
    going_on = f"goes on from {tmp_path / 'stopped.partial'}: 2 of 5 units are done"
    assert f"note: {going_on}" in render_plan(planned)
    anew = make_plan(replace(stopped, restart=True)).summary
    assert anew.goes_on == ""
    assert planned.seconds["requantize"] == pytest.approx(2 / 3 * anew.seconds["requantize"])
    other = make_plan(replace(stopped, damping=0.02))
    (fault,) = other.faults
    assert "holds another run that was stopped: recipe.damping was 0.01, is 0.02" in fault.message
    assert f"fault: --out: {fault.message}" in render_plan(other.summary)
    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Silent, "warn", lambda _, message: told.append(message))
        resumed = run(stopped)
    assert told[0] == going_on
    assert going_on not in resumed.warnings
    before = [layer.seconds for layer in resumed.layers]
    assert resumed.timings["total"] > sum(before)
    assert resumed.timings["requantize"] > 0.5 * sum(before) / len(before)
    timed_or_named = ("qmerge_report.json", "report.html", "README.md", "qmerge_recipe.yaml")
    for path in straight.out.iterdir():
        if path.name not in timed_or_named:
            assert path.read_bytes() == (stopped.out / path.name).read_bytes(), path.name


def test_quantize_needs_no_adapter(
    asked: Recipe, tiny_original: Path, eval_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "release"
    result = run(replace(asked, adapter=(), out=out))
    assert result.reference == "dense"
    assert list(result.arms) == ["dense", "release"]
    tokens = windows(tiny_original, eval_text)
    expected = perplexity(load(tiny_original), tokens)
    assert close(result.arms["dense"]["held_out"].perplexity, expected, 1e-4)
    assert result.survival is None or result.survival.survival is None
    again = tmp_path / "again"
    assert cli.status(["run", str(out / "qmerge_recipe.yaml"), "--out", str(again)]) == 0
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_the_base_that_an_adapter_names_is_its_own_word(
    asked: Recipe, tiny_adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    named = {"base_model_name_or_path": "org/named"}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    recipe = replace(asked, adapter=(str(tmp_path / "adapter"),), out=tmp_path / "release")
    inputs = _hash_inputs(make_plan(recipe).ready(), Silent())
    assert inputs["base"].model is None
    assert inputs["adapter"].details["base"] == "org/named"


def test_a_release_without_finite_scores_does_not_pass(asked: Recipe, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, junit, out = (tmp_path / part for part in ("base", "gate.xml", "release"))
    shutil.copytree(asked.base, base)
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][3] = math.nan
        save_file(tensors, file, metadata={"format": "pt"})
    result = run(replace(asked, base=base, adapter=(), out=out))
    assert Outputs(junit=junit).finish(result) == 1
    assert 'failures="1"' in junit.read_text()
    assert (out / "qmerge_report.json").is_file()


def test_previous_release_is_an_arm_and_the_gate_speaks(
    asked: Recipe, nf4_run: tuple[Recipe, RunResult], tiny_nf4: Path, tmp_path: Path
) -> None:
    earlier, before = nf4_run
    out = tmp_path / "release"
    result = run(replace(asked, base=tiny_nf4, out=out, previous=earlier.out, bits=2, max_kl=1e-6))
    arm = result.arms["previous"]["held_out"]
    assert close(arm.perplexity, before.arms["release"]["held_out"].perplexity, 1e-6)
    assert result.change_from_previous["held_out"].ci95 is not None
    assert arm.kl.mean < result.arms["release"]["held_out"].kl.mean
    assert [verdict.passed for verdict in result.gate] == [False]
    assert (out / "qmerge_report.json").is_file()
    floor = result.noise_floor["held_out"].kl
    assert floor is not None
    assert 0 < floor.mean < result.arms["release"]["held_out"].kl.mean


def test_a_release_is_held_to_the_survival_that_its_report_has(
    nf4_run: tuple[Recipe, RunResult], eval_text: Path, tmp_path: Path
) -> None:
    recipe, result = nf4_run
    assert result.survival is not None
    asked = EvaluateRecipe(
        models=(f"new={recipe.out}",),
        eval=(str(eval_text),),
        eval_windows=2,
        sequence_length=LENGTH,
        min_survival=0.9,
    )
    evaluated = evaluate(asked)
    (verdict,) = evaluated.gate
    assert (verdict.value, verdict.passed) == (result.survival.survival, True)
    assert {"open", "layers of new", "score"} == set(evaluated.memory)
    assert not evaluate(replace(asked, min_survival=1.5)).gate[0].passed
    with pytest.raises(PlanError, match="holds no qmerge_report"):
        evaluate(replace(asked, models=(str(recipe.base),)))
    other = tmp_path / "other"
    shutil.copytree(recipe.out, other)
    shard = next(iter(other.glob("*.safetensors")))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(PlanError, match="is of other weights"):
        evaluate(replace(asked, models=(str(other),)))


def test_several_adapters_one_on_the_other_and_only_where_asked(
    asked: Recipe, tiny_original: Path, tiny_adapter: Path, eval_text: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    tokens = windows(tiny_original, eval_text)
    once = PeftModel.from_pretrained(load(tiny_original), tiny_adapter).merge_and_unload()
    twice = PeftModel.from_pretrained(once, tiny_adapter).merge_and_unload()
    both = (str(tiny_adapter), f"{tiny_adapter}@1.0")
    result = run(replace(asked, adapter=both, out=tmp_path / "both"))
    found = result.arms["trained"]["held_out"].perplexity
    assert close(found, perplexity(twice.eval(), tokens), 1e-5)

    part = replace(asked, only=("*.mlp.*",), exclude=("*.down_proj",), out=tmp_path / "part")
    told = run(part)
    assert "model.layers.1.mlp.down_proj" in told.left_out
    assert "model.layers.1.mlp.up_proj" not in told.left_out
    for form in ("text", "md", "html"):
        page = " ".join(render(told, form).replace("\\_", "_").split())
        assert "eft as the base has it: model.layers.0.self_attn.q_proj" in page
        assert "of the live adapter in every layer" in page
    base, release = Checkpoint.open(tiny_original), open_format(Checkpoint.open(part.out))
    name = "model.layers.1.{}.weight"
    kept = PeftModel.from_pretrained(load(tiny_original), tiny_adapter).merge_and_unload()
    for module, merged in (("mlp.up_proj", True), ("mlp.down_proj", False)):
        target = kept.state_dict() if merged else base_state(base)
        other = base_state(base) if merged else kept.state_dict()
        stored = release.dense(name.format(module))
        near = (stored - target[name.format(module)].float()).norm()
        assert near < (stored - other[name.format(module)].float()).norm()


def test_merge_is_held_against_the_live_adapter(
    asked: Recipe, tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmerge.stages.merge import merge_layer

    few = replace(asked, calibration_samples=4, eval_windows=2)
    recipe = replace(few, base=tiny_nf4, out=tmp_path / "whole")
    whole = run(recipe)
    found = whole.merge
    assert found is not None
    assert found.passed
    assert not whole.gate
    assert found.worst < 1e-5
    assert (found.dtype, found.rounding) == ("bfloat16", 2**-8)

    def lossy(change: Any, live: Any) -> dict[str, torch.Tensor]:
        merged = merge_layer(change, live)
        return {name: t * 1.05 if "up_proj" in name else t for name, t in merged.items()}

    monkeypatch.setattr("qmerge.walk.merge_layer", lossy)
    result = run(replace(recipe, out=tmp_path / "lossy"))
    assert result.merge is not None
    assert not result.merge.passed
    (verdict,) = result.gate  # no limit was asked for
    assert (verdict.limit, verdict.passed) == ("merge", False)
    assert "merging moved model.layers." in verdict.text
    assert "does not pass: what merging moved" in " ".join(render(result, "text").split())
    assert Outputs(as_json=True).finish(result) == 1
    assert Outputs(as_json=True).finish(whole) == 0
    moved = [layer.merge for layer in result.layers]
    assert all(each is not None and each > 2**-8 for each in moved)


def base_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_another_model_is_not_taken_for_the_original(
    asked: Recipe, tiny_nf4: Path, tiny_original: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_original, other)
    generator = torch.Generator().manual_seed(0)
    for file in other.glob("*.safetensors"):
        tensors = {
            name: torch.randn(t.shape, generator=generator).to(t) * 0.05 if t.dim() == 2 else t
            for name, t in load_file(file).items()
        }
        save_file(tensors, file)
    recipe = replace(
        asked, base=tiny_nf4, original=other, out=tmp_path / "out", strategy="substitute"
    )
    with pytest.raises(ModelError, match=r"not what the base was quantized from.*model\.layers"):
        run(recipe)
    assert not recipe.out.exists()
    run(replace(recipe, force=True, restart=True))
    assert recipe.out.is_dir()


def test_another_revision_is_not_taken_for_the_original(
    asked: Recipe, tiny_nf4: Path, tiny_original: Path, tmp_path: Path
) -> None:
    """Fine-tuning moves linears by less than quantizing does; what is not quantized shows it."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_original, other)
    generator = torch.Generator().manual_seed(0)
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            moved = torch.randn(weight.shape, generator=generator) * 0.03 * weight.float().std()
            tensors[name] = (weight.float() + moved).to(weight) if weight.dim() == 2 else weight
        save_file(tensors, file, metadata={"format": "pt"})
    recipe = replace(
        asked, base=tiny_nf4, original=other, out=tmp_path / "out", strategy="substitute"
    )
    with pytest.raises(
        ModelError, match=r"embed_tokens\.weight 0\.03, where nothing was quantized"
    ):
        run(recipe)


def test_a_base_quantized_on_the_fly_is_the_one_that_was_saved(
    asked: Recipe, nf4_run: tuple[Recipe, RunResult], tmp_path: Path
) -> None:
    result = run(replace(asked, base_quant="nf4,double", out=tmp_path / "release"))
    saved = nf4_run[1]
    assert result.survival is not None
    assert result.survival.error_ratio
    for arm in ("quantized_base", "trained", "original"):
        found = result.arms[arm]["held_out"].perplexity
        assert close(found, saved.arms[arm]["held_out"].perplexity, 1e-9)
