"""Bad input: one clear error each, exit code 2 (1 from `plan`), and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge import machine
from qmerge.cli import status
from qmerge.errors import InputError, PlanError
from qmerge.export import export
from qmerge.job import partial_folder
from qmerge.pipeline import run
from qmerge.plan import make_plan
from qmerge.recipe import Recipe
from qmerge.report.plan import render


def other_shapes(recipe: Recipe) -> Recipe:
    from safetensors.torch import load_file, save_file

    file = Path(recipe.adapter[0]) / "adapter_model.safetensors"
    tensors = {
        name: t.new_ones(t.shape[0] + 8, *t.shape[1:]) for name, t in load_file(file).items()
    }
    save_file(tensors, file)
    return recipe


def other_names(recipe: Recipe) -> Recipe:
    from safetensors.torch import load_file, save_file

    file = Path(recipe.adapter[0]) / "adapter_model.safetensors"
    renamed = {name.replace("layers.2", "layers.7"): t for name, t in load_file(file).items()}
    save_file(renamed, file)
    return recipe


def unknown_kind(recipe: Recipe) -> Recipe:
    edit(Path(recipe.adapter[0]) / "adapter_config.json", peft_type="SUPERLORA")
    return recipe


def missing_shard(recipe: Recipe) -> Recipe:
    sorted(recipe.base.glob("*.safetensors"))[1].unlink()
    return recipe


def truncated_shard(recipe: Recipe) -> Recipe:
    shard = sorted(recipe.base.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    return recipe


def index_leaves_folder(recipe: Recipe) -> Recipe:
    index = recipe.base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../model.safetensors"
    index.write_text(json.dumps(content))
    return recipe


def out_exists(recipe: Recipe) -> Recipe:
    recipe.out.mkdir()
    return recipe


def no_tokenizer(recipe: Recipe) -> Recipe:
    """transformers makes one of the config alone, without a vocabulary."""
    for file in recipe.base.glob("tokenizer*"):
        file.unlink()
    return recipe


def short_calibration(recipe: Recipe) -> Recipe:
    file = recipe.out.with_name("short.txt")
    file.write_text("too short")
    return replace(recipe, calibration=str(file))


def group_does_not_divide(recipe: Recipe) -> Recipe:
    return replace(recipe, group_size=128)


def substitute_without_original(recipe: Recipe) -> Recipe:
    return replace(recipe, strategy="substitute")


def other_config(recipe: Recipe) -> Recipe:
    edit(recipe.base / "config.json", hidden_size=128)
    return recipe


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


BAD = {
    other_shapes: "lora_A",
    other_names: "layers.7",
    unknown_kind: "SUPERLORA",
    missing_shard: "model-00002",
    truncated_shard: "model-00001",
    index_leaves_folder: "../model.safetensors",
    out_exists: "exists",
    no_tokenizer: "holds no tokenizer",
    short_calibration: "short.txt",
    group_does_not_divide: "group size 128",
    substitute_without_original: "original",
    other_config: "hidden_size|shapes differ",
}


@pytest.mark.parametrize(
    ("damage", "said"), BAD.items(), ids=[getattr(f, "__name__", "") for f in BAD]
)
def test_bad_input_is_one_clear_error(
    asked: Recipe,
    damage: Callable[[Recipe], Recipe],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = damage(asked)
    before = sorted(recipe.out.parent.iterdir())
    file = recipe.out.with_name("recipe.yaml")
    file.write_text(recipe.to_yaml())
    assert status(["run", str(file)]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert any(part in printed for part in said.split("|")), printed
    assert "hint:" in printed
    assert status(["plan", str(file)]) == 1
    listed = capsys.readouterr().out
    assert any(part in listed for part in said.split("|"))
    file.unlink()
    assert sorted(recipe.out.parent.iterdir()) == before


def started(recipe: Recipe, **options: Any) -> Recipe:
    edit(Path(recipe.adapter[0]) / "adapter_config.json", **options)
    return recipe


@pytest.mark.parametrize("out", [".", "/", "nowhere/.."])
def test_a_place_without_a_name_is_a_fault(
    asked: Recipe, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = asked.out.with_name("recipe.yaml")
    file.write_text(asked.to_yaml())
    assert status(["run", str(file), "--out", out]) == 2
    assert f"error: --out: {out} exists\nhint:" in capsys.readouterr().err


def test_a_place_where_nothing_can_be_made_is_a_fault(
    asked: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut, long = asked.out.with_name("shut"), asked.out.with_name("x" * 250)
    longer = asked.out.with_name("x" * 300) / "out"
    shut.mkdir()
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda path, how: (path != shut or how == os.F_OK) and may(path, how)
    )
    for out, said in (
        (shut / "new" / "out", f"nothing may be written in {shut}"),
        (long, f"{long}: a longer name than the file system takes"),
        (longer, f"{longer}: a longer name than the file system takes"),
    ):
        recipe = replace(asked, out=out)
        with pytest.raises(PlanError) as caught:
            run(recipe)
        assert [(fault.where, fault.message) for fault in caught.value.faults] == [("--out", said)]
        with pytest.raises(InputError, match=re.escape(said)):
            export(recipe)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_no_base_in_few_bits_can_have_had(
    asked: Recipe, tiny_nf4: Path, start: str
) -> None:
    recipe = started(asked, init_lora_weights=start)
    for other in (replace(recipe, base_quant="nf4"), replace(recipe, base=tiny_nf4)):
        (fault,) = make_plan(other).faults
        assert "on which it cannot have started" in fault.message
        assert "init_lora_weights to true" in str(fault.hint)
    plan = make_plan(recipe)
    assert plan.faults == ()
    assert any("merge onto the base it started from" in note for note in plan.summary.notes)
    with pytest.raises(PlanError, match="cannot have started"):
        export(replace(recipe, base=tiny_nf4))


def test_a_start_that_binds_the_adapter_to_its_base(asked: Recipe, tiny_nf4: Path) -> None:
    config = {"loftq_bits": 4, "loftq_iter": 1}
    recipe = started(asked, init_lora_weights="loftq", loftq_config=config)
    job = make_plan(recipe).ready()
    assert (job.recipe.base_quant, job.strategies) == ("nf4,dtype=bfloat16", ("dequantize",))
    stored = replace(recipe, base=tiny_nf4, original=asked.base)
    assert make_plan(replace(stored, strategy="auto")).ready().strategies == ("dequantize",)
    (fault,) = make_plan(replace(stored, strategy="substitute")).faults
    assert "LoftQ starts from the quantization error" in fault.message


def test_all_faults_are_told_at_once(asked: Recipe) -> None:
    recipe = out_exists(unknown_kind(short_calibration(group_does_not_divide(asked))))
    with pytest.raises(PlanError) as caught:
        run(recipe)
    text = "\n".join(fault.message for fault in caught.value.faults)
    for part in ("exists", "SUPERLORA", "short.txt", "group size"):
        assert part in text


def test_what_needs_no_base_is_checked_without_one(asked: Recipe) -> None:
    table = asked.out.with_name("table.jsonl")
    table.write_text('{"a": "x", "b": "y"}\n')
    recipe = replace(
        asked,
        base=asked.out.with_name("nowhere"),
        calibration=str(asked.out.with_name("missing.txt")),
        eval=(f"{table}:c", f"t={table}", "notes.pdf", "h=hub:nobody"),
        override=("re:(=bits:8", "x=loud", "*.q_proj=bits:8"),
        only=("re:[",),
        device="cuda:99",
    )
    told = "\n".join(f"{fault.where}: {fault.message}" for fault in make_plan(recipe).faults)
    for part in (
        "--base: ", "missing.txt: no such file", "row 1 has no column 'c'",
        "row 1: which column is the text?", "notes.pdf: neither a recipe nor a ",
        "hub:nobody: not the name of a dataset", "--override: pattern 're:(' is not a regular",
        "--override: 'x=loud' is not PATTERN", "--only: pattern 're:[' is not a regular",
        "--device: cuda:99: this machine has no such device",
    ):  # fmt: skip
        assert told.count(part) == 1, told


def test_faults_that_need_the_base_are_told_beside_those_that_do_not(asked: Recipe) -> None:
    recipe = replace(
        asked,
        device="cuda:99",
        symmetric=False,
        format="gptq",
        override=("*.o_prj=skip",),
        only=("re:[",),
    )
    told = "\n".join(f"{fault.where}: {fault.message}" for fault in make_plan(recipe).faults)
    for part in ("cuda:99", "for symmetric grids", "fits no linear", "is not a regular"):
        assert told.count(part) == 1, told


def test_width_that_cannot_be_packed(asked: Recipe, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=100, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    odd, adapter = tmp_path / "odd", tmp_path / "odd-adapter"
    model.to(torch.bfloat16).save_pretrained(odd)
    AutoTokenizer.from_pretrained(asked.base).save_pretrained(odd)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(adapter)
    plan = make_plan(replace(asked, base=odd, adapter=(str(adapter),), group_size=-1))
    assert plan.job is None
    assert any("100" in fault.message and "32-bit words" in fault.message for fault in plan.faults)


def test_plan_tells_every_unit_and_its_bytes(asked: Recipe) -> None:
    plan = make_plan(asked)
    assert plan.faults == ()
    run(asked)
    written = sum(f.stat().st_size for f in asked.out.glob("*.safetensors"))
    planned = sum(unit.bytes_out for unit in plan.summary.units)
    assert abs(planned / written - 1) < 0.25
    stored = sum(f.stat().st_size for f in asked.base.glob("*.safetensors"))
    assert abs(sum(unit.bytes_in for unit in plan.summary.units) / stored - 1) < 0.25
    assert [u.label for u in plan.summary.units] == [
        "embedding", "layer 0", "layer 1", "layer 2", "head"
    ]  # fmt: skip
    assert all(u.quantized == u.adapted == 7 for u in plan.summary.units[1:-1])


def test_a_disk_or_a_memory_that_is_too_small_is_a_fault(
    asked: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(asked)
    needed = plan.summary.disk_bytes
    file = asked.out.with_name("recipe.yaml")
    file.write_text(asked.to_yaml())
    before = sorted(asked.out.parent.iterdir())
    monkeypatch.setattr(machine, "disk_free", lambda _: needed - 1)
    assert status(["run", str(file)]) == 2
    told = capsys.readouterr().err
    assert "error: --out: the run needs about" in told
    assert "hint: free some space" in told
    assert status(["plan", str(file)]) == 1
    told = capsys.readouterr().out
    assert "of memory beside the libraries" in told
    assert "fault: --out: the run needs about" in told
    assert "  hint: free some space" in told
    monkeypatch.setattr(machine, "memory_size", lambda _: plan.summary.memory_bytes - 1)
    assert [fault.where for fault in make_plan(asked).faults] == ["--out", "--memory"]
    assert sorted(asked.out.parent.iterdir()) == before
    # What a stopped run has left is room that it goes on in.
    partial_folder(asked.out).mkdir()
    (partial_folder(asked.out) / "shard").write_bytes(b"1")
    (fault, other) = make_plan(asked).faults
    assert (fault.where, other.where) == ("--memory", "--out")
    assert "no run has left it" in other.message
    (partial_folder(asked.out) / "journal.jsonl").touch()
    assert [fault.where for fault in make_plan(asked).faults] == ["--memory"]


def test_less_memory_than_a_run_takes_is_told(asked: Recipe) -> None:
    plan = make_plan(replace(asked, memory=1 << 20))
    needed = plan.summary.memory_bytes
    note = f"--memory is 1 MiB, and the run needs about {needed >> 20} MiB beside the libraries"
    assert note in plan.ready().notes
    assert note in plan.summary.notes
    assert not any(
        "--memory" in note for note in make_plan(replace(asked, memory=needed)).summary.notes
    )


def test_time_follows_the_work(asked: Recipe) -> None:
    """How fast the machine is has been measured once, so that twice the work is twice the time."""
    some = make_plan(asked).summary.seconds
    more = make_plan(replace(asked, eval_windows=4)).summary.seconds
    assert min(some.values()) > 0
    assert more["score"] == pytest.approx(2 * some["score"])
    assert some["evaluate"] < more["evaluate"] <= 2.01 * some["evaluate"]
    assert more["requantize"] == pytest.approx(some["requantize"])
    again = make_plan(replace(asked, calibration_samples=8, bits=8)).summary.seconds
    assert some["requantize"] < again["requantize"] < 2 * some["requantize"]
    parts = make_plan(replace(asked, memory=1 << 20)).summary.seconds
    assert parts["requantize"] > some["requantize"]


def test_text_that_is_fitted_and_scored_is_told_with_its_share(asked: Recipe) -> None:
    assert not any("calibration text" in note for note in make_plan(asked).summary.notes)
    words = [f"word {number} of {number * number}" for number in range(4000)]
    seen, other = (asked.out.with_name(name) for name in ("seen.txt", "other.txt"))
    seen.write_text("\n".join(words[:3000]))
    other.write_text("\n".join([*words[:1000], *words[3000:]]))
    own = replace(asked, calibration=str(seen), eval=(str(other),))
    plan = make_plan(replace(own, calibration_samples=10000, eval_windows="all"))
    (note,) = (note for note in plan.summary.notes if "calibration text" in note)
    share = float(re.search(r"other: ([\d.]+)% of its tokens", note)[1])  # type: ignore[index]
    assert 35 < share < 65
    assert plan.ready().notes == plan.summary.notes


def test_fewer_windows_than_were_asked_for_are_told(asked: Recipe) -> None:
    file = asked.out.with_name("few.txt")
    file.write_text(" ".join(map(str, range(200))))
    held = make_plan(replace(asked, eval=(str(file),), eval_windows="all"))
    windows = len(held.ready().evaluation[0].tokens)
    assert not any("asked for" in note for note in held.summary.notes)
    plan = make_plan(replace(asked, eval=(str(file),), calibration_samples=4096))
    told = [note for note in plan.summary.notes if "asked for" in note]
    assert len(told) == 1
    said = rf"{asked.calibration} holds \d+ windows of 64 tokens, 4096 were asked for"
    assert re.fullmatch(said, told[0])
    plan = make_plan(replace(asked, eval=(str(file),), eval_windows=windows + 1))
    assert plan.summary.notes[-1] == (
        f"{file} holds {windows} windows of 64 tokens, {windows + 1} were asked for"
    )


def test_limits_are_told_as_they_were_understood(asked: Recipe) -> None:
    limits = replace(asked, max_ppl_increase=0.01, max_kl=0.05, min_same_top=0.95, min_survival=0.9)
    told = "perplexity increase at most 1%, mean KL at most 0.05, same top token at least 95%"
    assert f"limits      {told}, adapter survival at least 0.9" in render(make_plan(limits).summary)
    assert "\nlimits" not in render(make_plan(asked).summary)


def test_code_that_comes_with_a_checkpoint_is_not_run(
    asked: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = asked.out.with_name("ran")
    for file, name in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        (asked.base / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
        kept = (asked.base / file).read_text()
        own = ["own.Own", None] if name == "AutoTokenizer" else "own.Own"
        edit(asked.base / file, auto_map={name: own}, model_type="own", tokenizer_class="Own")
        if name == "AutoTokenizer":
            (asked.base / "tokenizer.json").unlink()
        recipe = asked.out.with_name("recipe.yaml")
        recipe.write_text(asked.to_yaml())
        assert status(["run", str(recipe)]) == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert "--trust-remote-code" in told, told
        assert not ran.exists()
        (asked.base / file).write_text(kept)


def test_stdout_is_for_data_and_gptqmodel_is_not_imported(asked: Recipe) -> None:
    """PEFT would import it where it is installed: seconds, and a banner on stdout."""
    file = asked.out.with_name("recipe.yaml")
    file.write_text(asked.to_yaml())
    script = (
        "import sys\n"
        "from qmerge.cli import status\n"
        "code = status(['plan', sys.argv[1], '--json'])\n"
        "sys.exit(code or 9 * ('gptqmodel' in sys.modules))\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["faults"] == []


def test_what_a_saved_tokenizer_lacks_is_told(asked: Recipe) -> None:
    """A template of the base, and an end of answers that generation does not know."""
    from transformers import AutoTokenizer

    adapter = Path(asked.adapter[0])
    template = "chat_template.jinja"
    (adapter / template).write_text("{{ messages }}")
    stray = f"{adapter / template} is not taken: the tokenizer is that of {asked.base}"
    assert stray in make_plan(asked).summary.notes
    (adapter / template).rename(asked.base / template)
    tokenizer = AutoTokenizer.from_pretrained(asked.base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(adapter)
    lost = f"the base has a chat template, and the tokenizer of {adapter}, which is taken, has none"
    assert lost in (notes := make_plan(asked).summary.notes)
    assert not any("may not stop" in note for note in notes)
    tokenizer.eos_token = "e"
    tokenizer.save_pretrained(adapter)
    (note,) = (note for note in make_plan(asked).summary.notes if "may not stop" in note)
    assert "training ended texts with 'e'" in note
    assert str(asked.base / "generation_config.json") in note
    assert {lost, note} <= set(export(replace(asked, out=asked.out.with_name("x")))["notes"])
