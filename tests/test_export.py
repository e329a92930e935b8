"""Decoded and merged checkpoints against transformers and PEFT on the same weights."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qmerge.cli import group, status
from qmerge.errors import CheckpointError, InputError, RecipeError
from qmerge.export import export
from qmerge.formats import open_format
from qmerge.recipe import Dtype, Recipe
from qmerge.storage.checkpoint import Checkpoint
from tests.adapters import tiny


def dense_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_dequantized_folder_holds_what_the_reader_decodes(tiny_nf4: Path, tmp_path: Path) -> None:
    export(Recipe(base=tiny_nf4, out=tmp_path / "dense"), dtype="float32")
    form = open_format(Checkpoint.open(tiny_nf4))
    dense = Checkpoint.open(tmp_path / "dense")
    assert set(dense.tensors) == set(form.weights)
    for name in form.weights:
        assert torch.equal(dense.read(name), form.dense(name)), name
    assert "quantization_config" not in dense.config
    dense_model(tmp_path / "dense")


@pytest.mark.parametrize("cores", [1, 3])
def test_pieces_and_threads_change_no_byte(
    tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr("qmerge.model.weights.PIECE", 1000)
    monkeypatch.setattr("qmerge.storage.checkpoint._MAPPED_BYTES", 0)
    monkeypatch.setattr("qmerge.export.cores", lambda: cores)
    threads = torch.get_num_threads()
    written = export(Recipe(base=tiny_nf4, out=tmp_path / "dense"), dtype="float16")
    assert torch.get_num_threads() == threads
    form, dense = open_format(Checkpoint.open(tiny_nf4)), Checkpoint.open(tmp_path / "dense")
    assert written["tensors"] == len(form.weights) == len(dense.tensors)
    for name in form.weights:
        assert torch.equal(dense.read(name), form.dense(name).half()), name


@pytest.mark.parametrize("cores", [1, 2])
def test_units_merged_beside_one_another_equal_peft(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    from peft import PeftModel

    export(Recipe(base=tiny_nf4, out=tmp_path / "dense"), dtype="float32")
    live = PeftModel.from_pretrained(dense_model(tmp_path / "dense"), tiny_adapter)
    want = live.merge_and_unload().state_dict()
    monkeypatch.setattr("qmerge.export.cores", lambda: cores)
    monkeypatch.setattr("qmerge.export.MERGED_AT_ONCE", 1)
    recipe = Recipe(base=tiny_nf4, out=tmp_path / "merged", adapter=(str(tiny_adapter),))
    export(recipe, dtype="float32")
    merged = Checkpoint.open(tmp_path / "merged")
    assert merged.tensors
    for name in merged.tensors:
        assert torch.equal(merged.read(name), want[name]), name


def test_what_ends_one_unit_ends_all(
    tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmerge.formats.bitsandbytes import BitsandbytesReader

    def fail(*_args: object) -> None:
        raise CheckpointError("damaged")

    monkeypatch.setattr(BitsandbytesReader, "_decode", fail)
    with pytest.raises(CheckpointError, match="damaged"):
        export(Recipe(base=tiny_nf4, out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_untouched_16_bit_weights_keep_their_bytes(tiny_original: Path, tmp_path: Path) -> None:
    written = export(Recipe(base=tiny_original, out=tmp_path / "copy"))
    assert written["dtype"] == "bfloat16"
    source, copied = Checkpoint.open(tiny_original), Checkpoint.open(tmp_path / "copy")
    for name in source.tensors:
        assert torch.equal(source.read(name).view(torch.int16), copied.read(name).view(torch.int16))


def test_merged_folder_equals_peft(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    export(Recipe(base=tiny_nf4, out=tmp_path / "dense"), dtype="float32")
    asked = Recipe(base=tiny_nf4, adapter=(str(tiny_adapter),), out=tmp_path / "merged")
    export(asked, dtype="float32")
    live = PeftModel.from_pretrained(dense_model(tmp_path / "dense"), tiny_adapter).eval()
    merged = dense_model(tmp_path / "merged")
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(merged(tokens).logits, live(tokens).logits)
    expected = live.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def adapters(tiny_original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two adapters on the same linears, each moved at random."""
    from peft import LoraConfig, get_peft_model

    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("adapter")
        options = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(dense_model(tiny_original), options).save_pretrained(folder)
        folders.append(str(folder))
    return folders[0], folders[1]


def combined(base: Path, adapters: tuple[str, str], weights: list[float], **options: Any) -> Any:
    """PEFT's own combination, live."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(dense_model(base), adapters[0], adapter_name="a")
    model.load_adapter(adapters[1], "b")
    torch.manual_seed(0)
    model.add_weighted_adapter(["a", "b"], weights, "both", **options)
    model.set_adapter("both")
    return model.eval()


def same_logits(folder: Path, live: Any) -> None:
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(dense_model(folder)(tokens).logits, live(tokens).logits)


def merge(*arguments: object) -> dict[str, Any]:
    """`qmerge merge` as it is typed; what it says on stdout."""
    outcome = CliRunner().invoke(group, ["merge", *map(str, arguments), "--json"])
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


def test_merge_of_a_combination_equals_peft(
    tiny_original: Path, adapters: tuple[str, str], tmp_path: Path
) -> None:
    first, second = adapters
    for method, options in (("cat", ()), ("dare_ties", ("--density", 0.6))):
        out = tmp_path / method
        weighed = (f"{first}@0.7", f"{second}@-0.4")
        how = ("--combine", method, "--dtype", "float32", *options)
        merge(tiny_original, *weighed, out, *how)
        density = {"density": 0.6} if options else {}
        live = combined(tiny_original, adapters, [0.7, -0.4], combination_type=method, **density)
        same_logits(out, live)


def test_merge_of_one_on_the_other_in_part_and_over_a_partial_state(
    tiny_original: Path, adapters: tuple[str, str], tmp_path: Path
) -> None:
    from peft import PeftModel

    state = {"model.norm.weight": torch.full((64,), 1.5)}
    torch.save(state, tmp_path / "state.pt")
    written = merge(
        tiny_original, *adapters, tmp_path / "out", "--dtype", "float32",
        "--only", "*.q_proj", "--except", "re:.*layers\\.1\\..*",
        "--partial-state", tmp_path / "state.pt",
    )  # fmt: skip
    kept = {f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)}
    assert set(written["merged"]) == {*(f"{name}.weight" for name in kept), "model.norm.weight"}
    assert len(written["left_out"]) == 4
    live = dense_model(tiny_original)
    for folder in adapters:
        live = PeftModel.from_pretrained(live, folder)
        for name, module in live.named_modules():
            if hasattr(module, "lora_A") and name.removeprefix("base_model.model.") not in kept:
                module.scale_layer(0.0)
        live = live.merge_and_unload()
    live.load_state_dict(state, strict=False)
    same_logits(tmp_path / "out", live)


def test_an_adapter_goes_on_top_of_what_a_partial_state_replaced(
    tiny_original: Path, adapters: tuple[str, str], tmp_path: Path
) -> None:
    """The weight under a LoRA was trained too, and so was its embedding."""
    from peft import PeftModel

    live = PeftModel.from_pretrained(dense_model(tiny_original), adapters[0]).eval()
    names = ("q_proj.base_layer.weight", "embed_tokens.weight")
    state = {n: p for n, p in live.named_parameters() if n.endswith(names)}
    for parameter in state.values():
        parameter.data += torch.randn_like(parameter) * 0.02
    torch.save(state, tmp_path / "state.pt")
    out = tmp_path / "out"
    given = ("--partial-state", tmp_path / "state.pt", "--dtype", "float32")
    merge(tiny_original, adapters[0], out, *given)
    same_logits(out, live)


def test_merge_of_what_a_vision_language_model_trained(tmp_path: Path) -> None:
    """A LoRA on the language model and a partial state of merger and norm, by their older names."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny.vision_language(), dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    options = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(model, options).save_pretrained(tmp_path / "adapter")
    new = {
        "visual.merger.mlp.0.weight": "model.visual.merger.mlp.0.weight",
        "language_model.model.norm.weight": "model.language_model.norm.weight",
    }
    places = {name: tensor.shape for name, tensor in model.base_model.state_dict().items()}
    places |= {f"model.{name}": shape for name, shape in places.items()}
    state = {old: torch.rand(places[name]) for old, name in new.items()}
    torch.save({f"base_model.model.{n}": t for n, t in state.items()}, tmp_path / "state.bin")
    how = ("--dtype", "float32", "--partial-state", tmp_path / "state.bin")
    written = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", *how)
    assert len(written["merged"]) == 2 + 2
    assert len(written["renamed"]) == 2

    def load(folder: Path) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    live = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    inner = live.base_model.model
    inner.load_state_dict({new[old]: tensor for old, tensor in state.items()}, strict=False)
    found = load(tmp_path / "out")
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        expected = live(input_ids=tokens).logits
        torch.testing.assert_close(found(input_ids=tokens).logits, expected)
    merger = "model.visual.merger.mlp.0.weight"
    assert torch.equal(found.state_dict()[merger], inner.state_dict()[merger])


@pytest.mark.parametrize("dora", [False, True])
def test_merge_of_transposed_linears_equals_peft(dora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    base = tiny.model("gpt2")
    base.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj", "c_fc"]
    options = LoraConfig(target_modules=targets, fan_in_fan_out=True, use_dora=dora)
    tiny.train(base, options, tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--dtype", "float32")
    trained = PeftModel.from_pretrained(dense_model(tmp_path / "base"), tmp_path / "adapter")
    want = trained.merge_and_unload().state_dict()
    assert tiny.differing(dense_model(tmp_path / "out").state_dict(), want) == set()


@pytest.mark.parametrize("whole", ["merger", "mlp"])
def test_merge_of_modules_that_were_trained_whole_with_all_inside(
    whole: str, tmp_path: Path
) -> None:
    """A projector, or the MLPs of layers, tower and projector, each of several linears."""
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny.vision_language(), dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    options = LoraConfig(target_modules=["q_proj"], modules_to_save=[whole])
    tiny.train(model, options, tmp_path / "adapter")
    out = tmp_path / "out"
    merge(tmp_path / "base", tmp_path / "adapter", out, "--dtype", "float32")

    def load(folder: Path) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)

    trained = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    want, found = trained.merge_and_unload().state_dict(), load(out).state_dict()
    assert tiny.differing(found, want) == set()


def test_merge_onto_a_base_that_training_quantized(
    tiny_original: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    on_the_fly = ("--base-quant", "nf4,double", "--dtype", "float32")
    merge(tiny_original, tiny_adapter, tmp_path / "fly", *on_the_fly)
    merge(tiny_nf4, tiny_adapter, tmp_path / "saved", "--dtype", "float32")
    found = (Checkpoint.open(tmp_path / name) for name in ("fly", "saved"))
    fly, saved = ({name: each.read(name) for name in each.tensors} for each in found)
    assert all(torch.equal(fly[name], saved[name]) for name in saved)


def test_merge_of_nothing_is_an_error(tiny_original: Path, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(group, ["merge", str(tiny_original), str(tmp_path / "out")])
    assert isinstance(outcome.exception, RecipeError)
    assert "dequantize" in str(outcome.exception.hint)


def test_nothing_is_left_of_an_export_that_fails(
    tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr("qmerge.export.write_index", fail)
    with pytest.raises(OSError, match="disk"):
        export(Recipe(base=tiny_nf4, out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def with_value(source: Path, folder: Path, name: str, value: float, where: int | slice = 3) -> Path:
    """A copy of a dense model with one value of one tensor changed, or those that are meant."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(-1)[where] = value
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("model.norm.weight", math.nan, "float16"),
        ("model.layers.1.mlp.down_proj.weight", math.nan, "bfloat16"),
        ("model.embed_tokens.weight", -math.inf, "float32"),
    ],
)
def test_a_dense_base_with_values_that_are_not_finite(
    name: str, value: float, dtype: Dtype, tiny_original: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    base = with_value(tiny_original, tmp_path / "base", name, value)
    for adapter in ((), (str(tiny_adapter),)):
        with pytest.raises(InputError, match=name):
            export(Recipe(base=base, adapter=adapter, out=tmp_path / "out"), dtype=dtype)
    assert [folder.name for folder in tmp_path.iterdir()] == ["base"]


def test_large_values_whose_sum_overflows_are_written(tiny_original: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    base = with_value(tiny_original, tmp_path / "base", name, 60000.0, slice(None))
    export(Recipe(base=base, out=tmp_path / "out"), dtype="float16")
    assert float(Checkpoint.open(tmp_path / "out").read(name).min()) > 59000


def test_what_a_merge_brings_beyond_float16(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    asked = Recipe(base=tiny_nf4, adapter=(f"{tiny_adapter}@1e9",), out=tmp_path / "out")
    with pytest.raises(InputError, match="holds values beyond 65504"):
        export(asked, dtype="float16")
    export(asked, dtype="bfloat16")


def test_a_value_that_float16_cannot_hold(tiny_original: Path, tmp_path: Path) -> None:
    base = with_value(tiny_original, tmp_path / "base", "model.norm.weight", -1e5)
    with pytest.raises(InputError, match=r"model\.norm\.weight: holds values beyond 65504"):
        export(Recipe(base=base, out=tmp_path / "out"), dtype="float16")
    assert [folder.name for folder in tmp_path.iterdir()] == ["base"]
    export(Recipe(base=base, out=tmp_path / "out"), dtype="bfloat16")


def test_what_a_killed_one_left_is_told_and_kept(tiny_nf4: Path, tmp_path: Path) -> None:
    asked = ["dequantize", str(tiny_nf4), str(tmp_path / "out")]
    script = "import os\nfrom qmerge import export\nfrom qmerge.cli import main\n"
    script += "export.write_index = lambda *_: os.kill(os.getpid(), 9)\nmain()"
    killed = subprocess.run(
        [sys.executable, "-c", script, *asked], capture_output=True, check=False
    )
    assert killed.returncode == -9
    left = tmp_path / "out.partial"
    assert [folder.name for folder in tmp_path.iterdir()] == [left.name]
    kept = sorted(left.iterdir())
    assert kept
    with pytest.raises(InputError, match="a run that was killed left it") as caught:
        export(Recipe(base=tiny_nf4, out=tmp_path / "out"))
    assert "remove it" in str(caught.value.hint)
    assert sorted(left.iterdir()) == kept
    shutil.rmtree(left)
    export(Recipe(base=tiny_nf4, out=tmp_path / "out"))
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_not_written_to(tiny_nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists"):
        export(Recipe(base=tiny_nf4, out=tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="exists"):
        export(Recipe(base=tiny_nf4, out=tmp_path / "link"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


def test_a_base_without_a_tokenizer_is_told(
    tiny_original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    without = shutil.ignore_patterns("tokenizer*")
    for source, noted in ((tiny_original, False), (base, True)):
        out = tmp_path / f"out-{noted}"
        assert status(["dequantize", str(source), str(out)]) == 0
        assert (f"{base} holds no tokenizer" in capsys.readouterr().err) == noted
        shutil.copytree(tiny_original, base, ignore=without, dirs_exist_ok=True)


def test_what_training_and_quantizers_left_in_a_base_stays_there(
    tiny_nf4: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_nf4, base)
    left = {
        "recipe.yaml", "hf_quant_config.json", "quant_config.json", "quant_log.csv",
        "trainer_state.json", "train_results.json", "trainer_log.jsonl", "train.log",
        "events.out.tfevents.17.host", "config.json.bak", "tokenizer.json~", "optimizer.pt",
    }  # fmt: skip
    kept = {"LICENSE", "modeling_own.py", "mergekit_config.yml", "preprocessor_config.json"}
    for name in left | kept:
        (base / name).write_text("{}")
    export(Recipe(base=base, out=out))
    written = {file.name for file in out.iterdir()}
    assert kept <= written
    assert not left & written
