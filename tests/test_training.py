"""What trainers leave beside an adapter, as each of them writes it, and what follows from it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge.errors import RecipeError
from qmerge.evaluate import evaluate
from qmerge.formats.base import FormatSummary
from qmerge.formats.simulated import BaseQuant
from qmerge.plan import make_plan
from qmerge.recipe import EvaluateRecipe, Recipe
from qmerge.training import decide, read_told

NF4 = BaseQuant(kind="nf4", double=True)
DENSE = FormatSummary(method="none", checkpoint_format="bfloat16", dtype=torch.bfloat16, dense=9)
SWIFT = {
    "quant_method": "bnb",
    "quant_bits": 4,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "model": "Qwen/Qwen3-8B",
}
FACTORY = "finetuning_type: lora\nmodel_name_or_path: Qwen/Qwen3-8B\nquantization_bit: 4\n"
BOARD = "top.finetuning_type: lora\ntop.quantization_bit: '{}'\ntop.quantization_method: bnb\n"
AXOLOTL = "base_model: Qwen/Qwen3-8B\nadapter: qlora\nload_in_4bit: true\nload_in_8bit: false\n"
CARD = """---
base_model: Qwen/Qwen3-8B
library_name: peft
---
## Training procedure

The following `bitsandbytes` quantization config was used during training:
{}
### Framework versions

- PEFT 0.6.0
"""


def bitsandbytes(**options: Any) -> dict[str, Any]:
    """As transformers itself writes the settings."""
    from transformers import BitsAndBytesConfig

    found: dict[str, Any] = BitsAndBytesConfig(**options).to_dict()
    return found


def nf4(**options: Any) -> dict[str, Any]:
    return bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **options
    )


def card(settings: dict[str, Any]) -> str:
    return CARD.format("\n".join(f"- {name}: {value}" for name, value in settings.items()))


def configuration(settings: dict[str, Any]) -> str:
    return json.dumps({"model_type": "qwen3", "quantization_config": settings})


FILES: dict[str, tuple[str, str, BaseQuant | None]] = {
    "ms-swift": ("args.json", json.dumps(SWIFT), NF4),
    "ms-swift, 8 bits": (
        "args.json",
        json.dumps(SWIFT | {"quant_bits": 8}),
        BaseQuant(kind="int8"),
    ),
    "ms-swift, none": (
        "args.json",
        json.dumps(SWIFT | {"quant_method": None, "quant_bits": None}),
        None,
    ),
    "ms-swift 2": (
        "sft_args.json",
        json.dumps({"quantization_bit": 4, "bnb_4bit_quant_type": "fp4", "quant_method": "bnb"}),
        BaseQuant(kind="fp4", double=True),
    ),
    "ms-swift, in bf16": (
        "args.json",
        json.dumps(SWIFT | {"torch_dtype": "bfloat16"}),
        replace(NF4, dtype="bfloat16"),
    ),
    "LLaMA-Factory, in fp16": (
        "training_args.yaml",
        FACTORY + "fp16: true\n",
        replace(NF4, dtype="float16"),
    ),
    "LLaMA Board, in bf16": (
        "llamaboard_config.yaml",
        BOARD.format(4) + "train.compute_type: pure_bf16\n",
        replace(NF4, dtype="bfloat16"),
    ),
    "axolotl, in bf16": (
        "axolotl_config.yaml",
        AXOLOTL + "bf16: auto\n",
        replace(NF4, dtype="bfloat16"),
    ),
    "config.json, in fp16": (
        "config.json",
        json.dumps(json.loads(configuration(nf4())) | {"dtype": "float16"}),
        replace(NF4, dtype="float16"),
    ),
    "LLaMA-Factory": ("training_args.yaml", FACTORY, NF4),
    "LLaMA-Factory, plain": (
        "training_args.yaml",
        FACTORY + "quantization_type: nf4\ndouble_quantization: false\n",
        BaseQuant(kind="nf4"),
    ),
    "LLaMA-Factory, none": ("training_args.yaml", FACTORY.replace("4", "null"), None),
    "LLaMA Board": ("llamaboard_config.yaml", BOARD.format(8), BaseQuant(kind="int8")),
    "LLaMA Board, none": ("llamaboard_config.yaml", BOARD.format("none"), None),
    "axolotl": ("axolotl_config.yaml", AXOLOTL, NF4),
    "axolotl's card": ("README.md", f"# model\n\n```yaml\n{AXOLOTL}```\n", NF4),
    "axolotl, 8 bits": (
        "axolotl_config.yaml",
        AXOLOTL.replace("true", "null").replace("false", "true"),
        BaseQuant(kind="int8"),
    ),
    "config.json": ("config.json", configuration(nf4()), NF4),
    "config.json, skipping": (
        "config.json",
        configuration(nf4(llm_int8_skip_modules=["lm_head", "mlp"])),
        replace(NF4, skip=("lm_head", "mlp")),
    ),
    "config.json, skipping the head": (
        "config.json",
        configuration(nf4(llm_int8_skip_modules=["lm_head"])),
        NF4,
    ),
    "config.json, defaults": (
        "config.json",
        configuration(bitsandbytes(load_in_4bit=True)),
        BaseQuant(kind="fp4"),
    ),
    "PEFT's card": ("README.md", card(nf4()), NF4),
    "PEFT's card, 8 bits": (
        "README.md",
        card(bitsandbytes(load_in_8bit=True)),
        BaseQuant(kind="int8"),
    ),
    "LoftQ in one step": (
        "adapter_config.json",
        '{"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}',
        BaseQuant(kind="nf4"),
    ),
    "unsloth's name": (
        "adapter_config.json",
        '{"base_model_name_or_path": "unsloth/Qwen3-8B-bnb-4bit"}',
        NF4,
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_what_a_trainer_wrote_is_used_and_said(case: str, tmp_path: Path) -> None:
    name, text, wanted = FILES[case]
    (tmp_path / name).write_text(text)
    found = decide(None, DENSE, (tmp_path,))
    assert found.quant == wanted
    (note,) = found.notes
    assert f"{tmp_path / name} says that training loaded the base" in note
    assert (wanted.option if wanted else "as it is stored") in note


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("args.json", "{"),
        ("args.json", "[4]"),
        ("args.json", '{"quantize": 4}'),
        ("training_args.yaml", "a: [" * 9),
        ("training_args.yaml", "learning_rate: 1.0e-4"),
        ("axolotl_config.yaml", "!!python/object/apply:os.system [exit]"),
        ("README.md", "# a model\n\nload_in_4bit: true\n"),
        ("README.md", "```yaml\nload_in_4bit: true\n```\n"),
        ("config.json", '{"model_type": "qwen3"}'),
        ("adapter_config.json", '{"base_model_name_or_path": "Qwen/Qwen3-8B"}'),
        ("training_args.bin", "anything"),
    ],
)
def test_files_that_do_not_tell(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    found = decide(None, DENSE, (tmp_path,))
    assert found.quant is None
    assert "taken as it is stored" in found.notes[0]
    assert "--base-quant nf4,double" in found.notes[0]


def test_files_of_a_run_lie_one_folder_above_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(json.dumps(SWIFT))
    for name, told in (("checkpoint-20", 1), ("final", 0)):
        (tmp_path / name).mkdir()
        assert len(read_told(tmp_path / name)) == told


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("args.json", json.dumps(SWIFT | {"quant_method": "hqq"}), "4 bits of hqq"),
        ("training_args.yaml", FACTORY + "quantization_method: eetq\n", "4 bits of eetq"),
        ("config.json", configuration({"quant_method": "gptq", "bits": 4}), "gptq"),
        ("adapter_config.json", '{"base_model_name_or_path": "Q/Q3-8B-GPTQ-Int4"}', "Q3-8B-GPTQ"),
        ("adapter_config.json", '{"base_model_name_or_path": "/a/Qwen3-AWQ/"}', "Qwen3-AWQ"),
        (
            "adapter_config.json",
            '{"base_model_name_or_path": "unsloth/Qwen3-8B-unsloth-bnb-4bit"}',
            "unsloth-bnb-4bit",
        ),
    ],
)
def test_a_base_that_cannot_be_made_again_is_told(
    name: str, text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    found = decide(None, DENSE, (tmp_path,))
    assert found.quant is None
    assert words in found.notes[0]
    assert "give that very base as --base" in found.notes[0]


def test_what_loftq_left_of_the_base_cannot_be_made_again(tmp_path: Path) -> None:
    text = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 5}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(text))
    (tmp_path / "args.json").write_text(json.dumps(SWIFT | {"quant_bits": None}))
    with pytest.raises(RecipeError, match="4 bits by LoftQ in 5 steps, and needs that very base"):
        decide(None, DENSE, (tmp_path,))
    found = decide("none", DENSE, (tmp_path,))
    assert found.quant is None
    assert "by LoftQ in 5 steps; --base-quant none" in found.notes[0]


def test_an_option_wins_and_the_contradiction_is_told(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(json.dumps(SWIFT))
    assert decide("nf4,double", DENSE, (tmp_path,)).notes == ()
    for asked, quant in (("int8", BaseQuant(kind="int8")), ("none", None)):
        found = decide(asked, DENSE, (tmp_path,))
        assert found.quant == quant
        assert re.search(f"args.json says .* in nf4,double; --base-quant {asked}", found.notes[0])


def test_files_that_contradict_one_another_are_a_fault(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(json.dumps(SWIFT | {"quant_bits": 8}))
    (tmp_path / "config.json").write_text(configuration(nf4()))
    with pytest.raises(RecipeError, match=r"args\.json in int8, .*config\.json in nf4,double"):
        decide(None, DENSE, (tmp_path,))
    assert decide("nf4,double", DENSE, (tmp_path,)).quant == NF4


def test_a_dtype_that_one_file_says_is_no_contradiction(tmp_path: Path) -> None:
    half = json.dumps(json.loads(configuration(nf4())) | {"dtype": "float16"})
    (tmp_path / "args.json").write_text(json.dumps(SWIFT))
    (tmp_path / "config.json").write_text(half)
    for asked in (None, "nf4,double", "nf4,double,dtype=float16"):
        assert decide(asked, DENSE, (tmp_path,)).quant == replace(NF4, dtype="float16")
    found = decide("nf4,double,dtype=bfloat16", DENSE, (tmp_path,))
    assert found.quant == replace(NF4, dtype="bfloat16")
    assert "in nf4,double,dtype=float16; --base-quant nf4,double,dtype=bfloat16" in found.notes[0]
    (tmp_path / "args.json").write_text(json.dumps(SWIFT | {"torch_dtype": "bfloat16"}))
    with pytest.raises(RecipeError, match="in different ways"):
        decide(None, DENSE, (tmp_path,))


def test_a_base_that_is_stored_in_few_bits_is_decoded_from_its_codes(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(json.dumps(SWIFT))
    stored = replace(DENSE, method="bitsandbytes", checkpoint_format="nf4", quantized=7)
    same = replace(stored, double_quantization=True)
    assert decide(None, same, (tmp_path,)).notes == ()
    for other in (stored, replace(stored, method="gptq", checkpoint_format="gptq_v2")):
        found = decide(None, other, (tmp_path,))
        assert found.quant is None
        assert f"stored as {other.checkpoint_format}" in found.notes[0]
    with pytest.raises(RecipeError, match="for a dense base"):
        decide("nf4", same, (tmp_path,))


def test_the_plan_uses_it_and_its_recipe_says_so(asked: Recipe) -> None:
    adapter = Path(asked.adapter[0])
    (adapter / "args.json").write_text(json.dumps(SWIFT))
    (adapter / "config.json").write_text(
        configuration(nf4(llm_int8_skip_modules=["lm_head", "down_proj"]))
    )
    recipe = replace(asked, calibration_samples=8, sequence_length=32)
    plan = make_plan(recipe)
    assert [fault.where for fault in plan.faults] == ["--base"]
    (adapter / "args.json").unlink()
    plan = make_plan(recipe)
    job = plan.ready()
    assert job.recipe.base_quant == "nf4,double,dtype=bfloat16,skip=lm_head,skip=down_proj"
    assert job.original is not None
    assert job.original.format.name == "dense"
    auto, substitute = replace(recipe, strategy="auto"), replace(recipe, strategy="substitute")
    assert make_plan(auto).ready().strategies == ("dequantize", "substitute")
    assert make_plan(substitute).ready().strategies == ("substitute",)
    assert any("nf4,double,skip=lm_head,skip=down_proj" in note for note in plan.summary.notes)
    stored = job.base.format.weights
    assert stored["model.layers.0.mlp.up_proj.weight"].quantized
    assert not stored["model.layers.0.mlp.down_proj.weight"].quantized


@pytest.fixture(scope="module")
def told(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter with what ms-swift leaves beside it of a base loaded in nf4."""
    import shutil

    folder = tmp_path_factory.mktemp("swift") / "adapter"
    shutil.copytree(tiny_adapter, folder)
    (folder / "args.json").write_text(json.dumps(SWIFT))
    return folder


def test_merge_uses_it_and_says_so(
    tiny_original: Path, tiny_nf4: Path, told: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from qmerge.cli import group
    from qmerge.storage.checkpoint import Checkpoint

    for base in (tiny_original, tiny_nf4):
        out = tmp_path / base.name
        done = CliRunner().invoke(group, ["merge", str(base), str(told), str(out)])
        assert done.exit_code == 0, done.stderr
        said = f"{told / 'args.json'} says that training loaded the base in nf4,double"
        assert (said in " ".join(done.stderr.split())) == (base == tiny_original)
    fly, saved = (Checkpoint.open(tmp_path / base.name) for base in (tiny_original, tiny_nf4))
    assert all(torch.equal(fly.read(name), saved.read(name)) for name in saved.tensors)


def test_evaluate_uses_it_and_says_so(
    tiny_original: Path, tiny_nf4: Path, tiny_adapter: Path, told: Path, eval_text: Path
) -> None:
    models = {
        "fly": f"{tiny_original}+{told}",
        "saved": f"{tiny_nf4}+{told}",
        "stored": f"{tiny_original}+{tiny_adapter}",
    }
    asked = EvaluateRecipe(
        models=tuple(f"{name}={model}" for name, model in models.items()),
        eval=(str(eval_text),),
        eval_windows=2,
        sequence_length=32,
    )
    found = evaluate(asked)
    fly, saved, stored = (found.arms[name]["evaluation"].perplexity for name in models)
    assert fly == pytest.approx(saved, rel=1e-9)
    assert fly != pytest.approx(stored, rel=1e-6)
    first, *others = found.warnings
    assert first.startswith(f"fly: {told / 'args.json'} says that training loaded the base in nf4")
    assert any(
        note.startswith("stored: the base is dense and is taken as it is") for note in others
    )
    assert not any(note.startswith("saved:") and "loaded" in note for note in others)
    again = evaluate(replace(asked, models=asked.models[1:], base_quant="nf4,double"))
    assert again.arms["stored"]["evaluation"].perplexity == pytest.approx(fly, rel=1e-9)
