"""Heads that training untied and vocabularies that it changed, against PEFT's live model."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from qmerge.errors import PlanError
from qmerge.evaluate import evaluate
from qmerge.export import export
from qmerge.model.opening import open_model
from qmerge.model.reshape import reshape
from qmerge.pipeline import run
from qmerge.plan import make_plan
from qmerge.recipe import EvaluateRecipe, Recipe
from qmerge.storage.checkpoint import Checkpoint
from qmerge.verify import Against, verify
from tests.test_pipeline import decoded_model

LENGTH, WINDOWS, TOKENS = 32, 8, 512
NEW = ["<|call|>", "<|answer|>"]


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def train(
    base: Any, folder: Path, *, scale: float = 0.05, save: Any = "auto", **options: Any
) -> Path:
    """Save an adapter whose every trained value was moved at random; the base is not changed."""
    torch.manual_seed(1)
    asked = LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(base, asked)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * scale
        wrapped.save_pretrained(folder, save_embedding_layers=save)
    return folder


def live(base: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens).logits


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
    export(Recipe(base=base, adapter=(str(adapter),), out=out, **options), dtype="float32")
    return dense(out)


UNTYING: dict[str, dict[str, Any]] = {
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora on the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [3]}},
}
TIED: dict[str, dict[str, Any]] = {
    "saved together": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora on both alike": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 9]},
}


@pytest.mark.parametrize("case", [*UNTYING, *TIED])
def test_merged_head_and_embedding_are_the_live_ones(
    case: str, tiny_original: Path, tmp_path: Path
) -> None:
    options = {**UNTYING, **TIED}[case]
    adapter = train(dense(tiny_original), tmp_path / "adapter", **options)
    found = merged(tiny_original, adapter, tmp_path / "merged")
    tokens = torch.arange(40)[None]
    want = logits(live(dense(tiny_original), adapter), tokens)
    torch.testing.assert_close(logits(found, tokens), want)
    said = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert said is (case in TIED)
    assert ("lm_head.weight" in Checkpoint.open(tmp_path / "merged").tensors) is not said


@pytest.fixture(scope="module")
def asked(calibration_text: Path, eval_text: Path) -> Recipe:
    return Recipe(
        base=Path("unused"),
        out=Path("unused"),
        calibration=str(calibration_text),
        calibration_samples=8,
        eval=(f"held_out={eval_text}",),
        eval_windows=WINDOWS,
        sequence_length=LENGTH,
        group_size=32,
    )


def perplexity(model: Any, tokenizer: Path, text: Path) -> float:
    ids = AutoTokenizer.from_pretrained(tokenizer)(text.read_text(), verbose=False)["input_ids"]
    tokens = torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
    found = logits(model, tokens)[:, :-1].double().flatten(0, 1)
    return math.exp(torch.nn.functional.cross_entropy(found, tokens[:, 1:].flatten()).item())


def grow(base: Path, folder: Path, tokens: int, *, added: bool = True) -> Any:
    """The base with other embeddings, and its tokenizer in `folder`, with NEW tokens in it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if added:
        tokenizer.add_tokens(NEW, special_tokens=True)
    tokenizer.save_pretrained(folder)
    model = dense(base)
    torch.manual_seed(4)
    model.resize_token_embeddings(tokens)
    return model


def on_resized(base: Path, adapter: Path, tokens: int) -> Any:
    """As who trained it loads it: the base resized, and PEFT's model on top."""
    model = dense(base)
    model.resize_token_embeddings(tokens)
    return live(model, adapter)


def untie(base: Path, folder: Path) -> Path:
    """The base with a head of its own."""
    model = dense(base)
    model.config.tie_word_embeddings = False
    torch.manual_seed(7)
    head = model.lm_head.weight.detach() * 1.1
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


GROWN: dict[str, dict[str, Any]] = {
    "resized": {},
    "padded": {"tokens": 576},
    "embedding saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "only new tokens": {"trainable_token_indices": [TOKENS, TOKENS + 1], "save": False},
    "cut": {"tokens": 500, "added": False},
}


HEAD_LOST = ("lora on the embedding", "only new tokens")
"""Where PEFT saves no new rows of a head that is not tied."""


@pytest.mark.parametrize(
    ("case", "tied"),
    [(case, tied) for case in GROWN for tied in (True, False) if tied or case not in HEAD_LOST],
)
def test_vocabulary_that_training_changed(
    case: str, tied: bool, tiny_original: Path, tmp_path: Path
) -> None:
    options = dict(GROWN[case])
    tokens = options.pop("tokens", TOKENS + len(NEW))
    base = tiny_original if tied else untie(tiny_original, tmp_path / "base")
    model = grow(base, tmp_path / "adapter", tokens, added=options.pop("added", True))
    adapter = train(model, tmp_path / "adapter", **{"save": True, **options})
    found = merged(base, adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == tokens == found.get_input_embeddings().weight.shape[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids(NEW) == [TOKENS, TOKENS + 1] or case == "cut"
    ids = torch.tensor([[*range(40), *range(min(tokens, 514) - 20, min(tokens, 514))]])
    want = logits(on_resized(base, adapter, tokens), ids)
    torch.testing.assert_close(logits(found, ids), want, rtol=1e-4, atol=1e-4)


def test_the_mean_of_new_tokens_is_read_once(
    tiny_original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton, weights = open_model(tiny_original)
    grown, name = reshape(skeleton, vocabulary=TOKENS + 8).fit(weights), "model.embed_tokens.weight"
    first = grown.rows(name, TOKENS, TOKENS + 2)
    mean = weights.tensor(name).double().mean(0).float()
    torch.testing.assert_close(first, mean.expand(2, -1), rtol=0, atol=0)
    monkeypatch.setattr(grown.checkpoint, "read_rows", lambda *_: pytest.fail("read again"))
    assert torch.equal(grown.rows(name, TOKENS + 1, TOKENS + 8), mean.expand(7, -1))


def test_run_with_a_head_of_its_own_and_new_tokens(
    asked: Recipe, tiny_original: Path, eval_text: Path, tmp_path: Path
) -> None:
    """Every arm, both strategies; then the same again with this release as an earlier one."""
    tokens = TOKENS + len(NEW)
    model = grow(tiny_original, tmp_path / "adapter", tokens)
    targets = ["q_proj", "down_proj", "embed_tokens"]
    adapter = train(model, tmp_path / "adapter", target_modules=targets, save=True)
    text = tmp_path / "text.txt"
    text.write_text(NEW[0] + eval_text.read_text().replace("value", NEW[1]))
    recipe = replace(
        asked,
        base=tiny_original,
        original=tiny_original,
        strategy="auto",
        adapter=(str(adapter),),
        out=tmp_path / "release",
        eval=(f"held_out={text}",),
    )
    result = run(recipe)
    want = perplexity(on_resized(tiny_original, adapter, tokens), adapter, text)
    assert abs(result.arms["trained"]["held_out"].perplexity / want - 1) < 1e-5
    assert abs(result.arms["merged"]["held_out"].perplexity / want - 1) < 1e-5
    assert any("head of its own" in warning for warning in result.warnings)
    assert any("from 512 to 514 tokens" in warning for warning in result.warnings)
    assert result.merge is not None
    assert 0 < result.merge.logits <= result.merge.worst < 1e-5
    assert result.merge.passed
    config = json.loads((recipe.out / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["vocab_size"]) == (False, tokens)
    release = Checkpoint.open(recipe.out)
    assert release.tensors["lm_head.weight"].shape == (tokens, 64)
    assert len(AutoTokenizer.from_pretrained(recipe.out)) == tokens
    proved = verify(
        recipe.out, against=Against(base=tiny_original, adapters=(adapter,), original=tiny_original)
    )
    assert [check for check in proved.checks if check.outcome == "fail"] == []
    scored = EvaluateRecipe(
        models=(f"release={recipe.out}", f"trained={tiny_original}+{adapter}"),
        eval=(f"held_out={text}",),
        eval_windows=WINDOWS,
        sequence_length=LENGTH,
    )
    arms = evaluate(scored).arms
    for name in ("release", "trained"):
        expected = result.arms[name]["held_out"].perplexity
        assert abs(arms[name]["held_out"].perplexity / expected - 1) < 1e-5
    plain = train(dense(tiny_original), tmp_path / "plain")
    again = run(
        replace(
            asked,
            base=tiny_original,
            adapter=(str(plain),),
            previous=recipe.out,
            out=tmp_path / "again",
        )
    )
    model = EvaluateRecipe(
        models=(f"release={recipe.out}",),
        eval=asked.eval,
        eval_windows=WINDOWS,
        sequence_length=LENGTH,
    )
    expected = evaluate(model).arms["release"]["held_out"].perplexity
    assert abs(again.arms["previous"]["held_out"].perplexity / expected - 1) < 1e-5


def test_a_partial_state_unties_and_an_adapter_follows(tiny_original: Path, tmp_path: Path) -> None:
    base = dense(tiny_original)
    head = base.lm_head.weight.detach() * 1.3
    torch.save(
        {"module.lm_head.weight": head, "module.model.embed_tokens.weight": head / 1.3},
        tmp_path / "state.pt",
    )
    adapter = train(dense(tiny_original), tmp_path / "adapter")
    found = merged(tiny_original, adapter, tmp_path / "out", partial_state=tmp_path / "state.pt")
    trained = live(base, adapter)
    trained.base_model.model.lm_head.weight = torch.nn.Parameter(head)
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(logits(found, tokens), logits(trained, tokens))


def test_a_partial_state_brings_tokens_and_their_tokenizer(
    asked: Recipe, tiny_original: Path, eval_text: Path, tmp_path: Path
) -> None:
    """A trainer that knows no adapters: its output folder has the tokenizer and the parameters."""
    folder, tokens = tmp_path / "trained", TOKENS + len(NEW)
    model = grow(tiny_original, folder, tokens)
    model.model.embed_tokens.weight.data *= 1.1
    torch.save({"model.embed_tokens.weight": model.model.embed_tokens.weight}, folder / "state.pt")
    recipe = replace(
        asked, base=tiny_original, partial_state=folder / "state.pt", out=tmp_path / "release"
    )
    result = run(recipe)
    want = perplexity(model, folder, eval_text)
    assert result.arms["trained"]["held_out"].perplexity == pytest.approx(want, rel=1e-5)
    assert len(AutoTokenizer.from_pretrained(recipe.out)) == tokens
    assert verify(recipe.out).failed == ()
    export(replace(recipe, out=tmp_path / "merged"), dtype="float32")
    ids = torch.arange(tokens)[None, -40:]
    torch.testing.assert_close(logits(dense(tmp_path / "merged"), ids), logits(model, ids))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == tokens


def test_second_adapter_on_an_untied_model(tiny_original: Path, tmp_path: Path) -> None:
    """Each on the result of the one before: tokens trained later are the embedding's alone."""
    first = train(dense(tiny_original), tmp_path / "first", modules_to_save=["lm_head"])
    middle = merged(tiny_original, first, tmp_path / "middle")
    second = train(middle, tmp_path / "second", trainable_token_indices=[5])
    recipe = Recipe(base=tiny_original, adapter=(str(first), str(second)), out=tmp_path / "both")
    export(recipe, dtype="float32")
    tokens = torch.arange(40)[None]
    want = logits(live(dense(tmp_path / "middle"), second), tokens)
    torch.testing.assert_close(logits(dense(tmp_path / "both"), tokens), want)


def faults(asked: Recipe, base: Path, adapter: Path, out: Path) -> str:
    plan = make_plan(replace(asked, base=base, adapter=(str(adapter),), out=out))
    assert plan.job is None
    with pytest.raises(PlanError):
        export(Recipe(base=base, adapter=(str(adapter),), out=out))
    assert all(fault.hint for fault in plan.faults)
    return "\n".join(fault.message for fault in plan.faults)


def test_tokens_without_an_embedding(asked: Recipe, tiny_original: Path, tmp_path: Path) -> None:
    """The tokenizer grew, the model was resized, and the new rows were not saved."""
    model = grow(tiny_original, tmp_path / "adapter", TOKENS + len(NEW))
    adapter = train(model, tmp_path / "adapter", save=False)
    said = faults(asked, tiny_original, adapter, tmp_path / "out")
    assert "'<|call|>' and 1 more beyond the model's 512 embeddings" in said


@pytest.mark.parametrize("case", [*HEAD_LOST, "embedding saved"])
def test_new_rows_of_which_only_half_were_saved(
    case: str, asked: Recipe, tiny_original: Path, tmp_path: Path
) -> None:
    base = untie(tiny_original, tmp_path / "base")
    model = grow(base, tmp_path / "adapter", TOKENS + len(NEW))
    options = {**GROWN[case], "save": case == "lora on the embedding"}
    if case == "embedding saved":
        options["modules_to_save"] = ["embed_tokens"]
    adapter = train(model, tmp_path / "adapter", **options)
    said = faults(asked, base, adapter, tmp_path / "out")
    assert "the rows 512 to 513 of lm_head.weight were trained, and are not there" in said


def test_vocabularies_that_contradict(asked: Recipe, tiny_original: Path, tmp_path: Path) -> None:
    for name, tokens in (("a", 514), ("b", 520)):
        train(grow(tiny_original, tmp_path / name, tokens), tmp_path / name, save=True)
    adapters = (str(tmp_path / "a"), str(tmp_path / "b"))
    plan = make_plan(replace(asked, base=tiny_original, adapter=adapters, out=tmp_path / "out"))
    assert any("different vocabularies: 514 in" in fault.message for fault in plan.faults)


def test_only_the_tokenizer_files_are_taken(tiny_original: Path, tmp_path: Path) -> None:
    model = grow(tiny_original, tmp_path / "adapter", TOKENS + len(NEW))
    adapter = train(model, tmp_path / "adapter", save=True)
    shutil.copy(tiny_original / "generation_config.json", adapter / "extra.json")
    merged(tiny_original, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged" / "extra.json").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def two_heads(folder: Path, kept: str) -> Path:
    """A model whose config ties its head, stored with another head too (`both`), with the same one
    (`copy`), or with the head's tensor alone (`head`)."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    head = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = torch.randn_like(head) / 50 if kept == "both" else head.clone()
    if kept == "head":
        del state["model.embed_tokens.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kept", ["both", "copy", "head"])
def test_a_head_stored_beside_the_embedding_is_taken_as_transformers_does(
    kept: str, tmp_path: Path
) -> None:
    folder, out = two_heads(tmp_path / "base", kept), tmp_path / "out"
    said = export(Recipe(base=folder, out=out), dtype="float32")
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(logits(dense(out), tokens), logits(dense(folder), tokens))
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is (kept != "both")
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    assert (names & Checkpoint.open(out).tensors.keys() == names) is (kept == "both")
    assert any("ties the head to the embedding" in note for note in said["notes"]) is (
        kept == "both"
    )


def head_alone(base: Path, folder: Path) -> Path:
    """The base with its tied weight stored under the head's name alone."""
    dense(base).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("case", "stored"), [("head saved", "embed_tokens"), ("lora on the head", "lm_head")]
)
def test_a_head_that_was_untied_can_be_quantized(
    case: str, stored: str, asked: Recipe, tiny_original: Path, eval_text: Path, tmp_path: Path
) -> None:
    """It goes by its own name, whichever of the two the base has."""
    both = stored == "embed_tokens"
    base = tiny_original if both else head_alone(tiny_original, tmp_path / "base")
    adapter = train(dense(base), tmp_path / "adapter", **UNTYING[case])
    recipe = replace(
        asked,
        base=base,
        adapter=(str(adapter),),
        out=tmp_path / "release",
        override=("lm_head=bits:8",),
        format="gptq" if both else "compressed-tensors",
    )
    result = run(recipe)
    names = Checkpoint.open(recipe.out).tensors.keys()
    packed = {"lm_head.qweight" if both else "lm_head.weight_packed", "model.embed_tokens.weight"}
    assert {name for name in names if "lm_head" in name or "embed" in name} >= packed
    assert "lm_head.weight" not in names
    found = perplexity(decoded_model(recipe.out), recipe.out, eval_text)
    assert result.arms["release"]["held_out"].perplexity == pytest.approx(found, rel=1e-5)
    live_one = perplexity(live(dense(base), adapter), base, eval_text)
    assert result.arms["trained"]["held_out"].perplexity == pytest.approx(live_one, rel=1e-5)
    proved = verify(recipe.out, against=Against(base=base, adapters=(adapter,), original=None))
    assert proved.failed == ()


def test_an_adapter_lands_on_a_head_that_only_the_config_ties(tmp_path: Path) -> None:
    folder = two_heads(tmp_path / "base", "both")
    adapter = train(dense(folder), tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    tokens = torch.arange(24).view(2, 12)
    expected = logits(live(dense(folder), adapter), tokens)
    found = logits(merged(folder, adapter, tmp_path / "out"), tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
