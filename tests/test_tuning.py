"""What trainers leave in a folder: understood and listed by the plan, or one clear fault of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qmerge.errors import Fault
from qmerge.plan import Plan, make_plan
from qmerge.recipe import Recipe
from qmerge.report.plan import render

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROOT = "base_model.model."
Tensors = dict[str, torch.Tensor]


def folder(asked: Recipe) -> Path:
    return Path(asked.adapter[0])


def edit(asked: Recipe, change: Callable[[Tensors], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder(asked) / FILE).items()}
    change(tensors)
    save_file(tensors, folder(asked) / FILE)


def configure(asked: Recipe, **values: Any) -> None:
    file = folder(asked) / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def good(asked: Recipe) -> Plan:
    plan = make_plan(asked)
    assert plan.faults == ()
    return plan


def fault(asked: Recipe) -> Fault:
    (found,) = make_plan(asked).faults
    assert found.hint
    return found


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trap-was-sprung"),))


def truncate(asked: Recipe) -> None:
    content = (folder(asked) / FILE).read_bytes()
    (folder(asked) / FILE).write_bytes(content[: len(content) // 2])


def pickle_code(asked: Recipe) -> None:
    (folder(asked) / FILE).unlink()
    torch.save({"weight": Trap()}, folder(asked) / "adapter_model.bin")


def poison(tensors: Tensors) -> None:
    next(iter(tensors.values())).fill_(torch.nan)


def widen(tensors: Tensors) -> None:
    tensors[A] = torch.ones(5, tensors[A].shape[1])


def rename(recipe: Recipe) -> None:
    """As if it were a GPT-2's."""
    file = folder(recipe) / FILE
    old = load_file(file)
    save_file({name.replace("model.layers", "transformer.h"): t for name, t in old.items()}, file)
    configure(recipe, target_modules=["c_attn", "c_proj"])


A = f"{ROOT}model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE: dict[str, tuple[Callable[[Recipe], Any], str]] = {
    "missing A": (lambda r: edit(r, lambda t: t.pop(A)), "lacks tensors that this model needs"),
    "extra tensors": (
        lambda r: edit(r, lambda t: t.update({f"{ROOT}model.head.lora_A.weight": t[A].clone()})),
        "no place in this model: model.head.lora_A.weight",
    ),
    "wrong rank": (lambda r: edit(r, widen), "is [5, 64], the model has [4, 64]"),
    "not a number": (lambda r: edit(r, poison), "values that are not finite"),
    "update of zero": (
        lambda r: edit(r, lambda t: [t[n].zero_() for n in t if "lora_B" in n]),
        "its update is zero",
    ),
    "other model": (rename, "PEFT cannot put this adapter (c_attn, c_proj) into Qwen3"),
    "empty file": (lambda r: (folder(r) / FILE).write_bytes(b""), FILE),
    "no tensors": (lambda r: save_file({}, folder(r) / FILE), "holds no tensors"),
    "truncated": (truncate, "truncated"),
    "pickled code": (pickle_code, "more than plain tensors"),
    "prompt tuning": (lambda r: configure(r, peft_type="PROMPT_TUNING"), "PROMPT_TUNING"),
    "weights beside it": (
        lambda r: torch.save({"x": torch.ones(1)}, folder(r) / "non_lora_state_dict.bin"),
        "holds non_lora_state_dict.bin beside the adapter, which would not be merged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_clear_fault(
    damage: str, asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, said = DAMAGE[damage]
    spoil(asked)
    found = fault(asked)
    assert said in found.message
    assert str(folder(asked)) in found.where + found.message
    assert not (tmp_path / "trap-was-sprung").exists()


def test_a_change_of_nothing_is_asked_for(asked: Recipe) -> None:
    edit(asked, lambda t: [t[n].zero_() for n in t if "lora_B" in n])
    good(replace(asked, allow_noop=True))


WHOLE: dict[str, Any] = {
    "head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 9]),
    "tokens alone": TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 9]),
}


@pytest.mark.parametrize("kind", [*WHOLE, "partial state"])
def test_values_that_are_the_bases_own_are_a_change_of_nothing(
    kind: str, asked: Recipe, tmp_path: Path
) -> None:
    """What training saved whole is held against the base, of which one value more is a change."""
    base = AutoModelForCausalLM.from_pretrained(asked.base, dtype=torch.float32)
    if kind == "partial state":
        file, adapters = tmp_path / "state.pt", ()
        asked = replace(asked, adapter=adapters, partial_state=file)
        names = ("model.norm.weight", "model.embed_tokens.weight")
        state = {name: base.state_dict()[name].clone() for name in names}
        torch.save(state, file)
    else:
        shutil.rmtree(folder(asked))
        get_peft_model(base, WHOLE[kind]).save_pretrained(folder(asked))
    assert fault(asked).message == "its update is zero: merging changes nothing"
    good(replace(asked, allow_noop=True))
    if kind == "partial state":
        state["model.embed_tokens.weight"][-1, -1] += 1
        torch.save(state, file)
    else:
        edit(asked, lambda t: t[next(n for n in t if "lora" not in n)].view(-1)[-1:].add_(1))
    good(asked)


def test_what_is_replaced_last_is_told_from_what_is_merged(asked: Recipe, tmp_path: Path) -> None:
    merged, norm = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    state, saved = tmp_path / "state.safetensors", tmp_path / "saved"
    save_file({merged: torch.randn(64, 64), norm: torch.randn(64)}, state)
    model = AutoModelForCausalLM.from_pretrained(asked.base)
    config = LoraConfig(target_modules=["v_proj"], modules_to_save=["q_proj"])
    get_peft_model(model, config).save_pretrained(saved)
    asked = replace(asked, partial_state=state, allow_noop=True)
    for adapter, last in ((asked.adapter[0], {norm}), (str(saved), {norm, merged})):
        change = good(replace(asked, adapter=(adapter,))).ready().change
        assert change is not None
        assert {name for name in (merged, norm) if change.replaces(name)} == last


def test_a_whole_model_inside_an_adapter(asked: Recipe) -> None:
    shutil.rmtree(folder(asked))
    base = AutoModelForCausalLM.from_pretrained(asked.base, dtype=torch.float32)
    options = LoraConfig(target_modules=["lm_head"], modules_to_save=["model"])
    get_peft_model(base, options).save_pretrained(folder(asked))
    edit(asked, lambda t: [tensor.add_(1) for tensor in t.values()])
    assert "replaces model as a whole, with the decoder layers" in str(make_plan(asked).faults)


def test_a_weight_that_is_no_number(asked: Recipe) -> None:
    found = fault(replace(asked, adapter=(f"{folder(asked)}@nan",)))
    assert "no number to weigh by" in found.message


def test_names_that_were_understood_are_listed(asked: Recipe) -> None:
    """FSDP and compiled names; what stays the base's; a base of another name and revision."""
    tensors = {
        name.replace(ROOT, f"{ROOT}_orig_mod.").replace(
            "layers.", "layers._fsdp_wrapped_module."
        ): t
        for name, t in load_file(folder(asked) / FILE).items()
    }
    save_file(tensors, folder(asked) / FILE)
    configure(asked, base_model_name_or_path="org/Other", revision="v2")
    plan = good(replace(asked, exclude=("*.down_proj",)))
    assert len(plan.summary.renamed) == len(tensors) == 42
    assert plan.summary.left_out == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(3))
    text = render(plan.summary)
    assert "42 tensors of training are named otherwise" in text
    assert "left as the base has it: model.layers.0.mlp.down_proj" in text
    assert "names the base org/Other at revision v2" in text


def test_a_revision_of_the_hubs_cache_is_compared(asked: Recipe, tmp_path: Path) -> None:
    mine, other = "a" * 40, "b" * 40
    cached = tmp_path / "models--org--Name" / "snapshots" / mine
    shutil.copytree(asked.base, cached)
    recipe = replace(asked, base=cached)

    def notes(**values: Any) -> str:
        configure(asked, base_model_name_or_path="org/Name", **values)
        return render(good(recipe).summary)

    assert "names the base" not in notes(revision=None)
    assert "names the base" not in notes(revision=mine)
    assert f"org/Name at revision {other}, and this is {mine}" in notes(revision=other)


@pytest.mark.parametrize("depth", ["run", "run/.."])
def test_a_folder_above_names_the_checkpoints(asked: Recipe, depth: str, tmp_path: Path) -> None:
    for step in (1000, 500):
        shutil.copytree(folder(asked), folder(asked).with_name(f"checkpoint-{step}"))
    shutil.rmtree(folder(asked))
    found = fault(replace(asked, adapter=(str(tmp_path / depth),)))
    below = "" if depth == "run" else "run/"
    names = f"{below}checkpoint-500, {below}checkpoint-1000"
    assert found.hint == f"give one of its folders: {names}"


def test_a_whole_model_is_no_adapter(asked: Recipe) -> None:
    found = fault(replace(asked, adapter=(str(asked.base),)))
    assert "qmerge quantize" in str(found.hint)


def test_what_trainers_leave_beside_an_adapter(asked: Recipe) -> None:
    """Optimizers and value heads are no part of the model; a partial state is, once it is given."""
    for name in ("optimizer.pt", "training_args.bin", "rng_state_0.pth", "value_head.bin"):
        (folder(asked) / name).write_bytes(b"anything")
    good(asked)
    state = folder(asked) / "non_lora_state_dict.bin"
    torch.save({f"{ROOT}model.norm.weight": torch.ones(64)}, state)
    plan = good(replace(asked, partial_state=state))
    assert plan.summary.renamed == {f"{ROOT}model.norm.weight": "model.norm.weight"}
    state.unlink()
    assert "is a folder" in fault(replace(asked, partial_state=folder(asked))).message


def test_options_of_another_library_are_told(asked: Recipe) -> None:
    """ms-swift's own configuration, and names that lack PEFT's root and have the adapter's."""
    configure(asked, swift_type="LORA", lora_dtype="bfloat16", lorap_lr_ratio=None)
    tensors = {
        name.removeprefix(ROOT).replace(".weight", ".default.weight"): t
        for name, t in load_file(folder(asked) / FILE).items()
    }
    save_file(tensors, folder(asked) / FILE)
    text = render(good(asked).summary)
    assert "swift_type" in text
    configure(asked, use_qa_lora=True)
    assert "QA-LoRA" in fault(asked).message


def test_a_pattern_that_fits_no_module_is_a_fault(asked: Recipe) -> None:
    found = fault(replace(asked, only=("*.q_proj",), exclude=("*.q_porj",)))
    assert (found.where, found.message.split("'")[1]) == ("--except", "*.q_porj")
