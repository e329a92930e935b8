"""The demo's model and texts: small, whole, opened by their own libraries, and well learned."""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qmerge import demo
from qmerge.errors import CorpusError

FOLDERS = (demo.ORIGINAL, demo.BASE, demo.ADAPTER)


def naive_linear(stored: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """[O, I] of a GPTQ v1 linear of 4 bits, code by code as the format says."""
    qweight, qzeros = stored[f"{module}.qweight"].tolist(), stored[f"{module}.qzeros"].tolist()
    scales, groups = stored[f"{module}.scales"].tolist(), stored[f"{module}.g_idx"].tolist()
    rows = []
    for column, group in enumerate(groups):
        word, shift = column // 8, 4 * (column % 8)
        row = []
        for out, scale in enumerate(scales[group]):
            zero = (qzeros[group][out // 8] >> 4 * (out % 8) & 15) + 1
            row.append(scale * ((qweight[word][out] >> shift & 15) - zero))
        rows.append(row)
    return torch.tensor(rows).T.contiguous()


def plain_base() -> Any:
    """The quantized base as transformers builds it, its linears decoded here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(demo.BASE)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stored = load_file(demo.BASE / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    weights = {name: value for name, value in stored.items() if name.endswith(".weight")}
    weights |= {f"{module}.weight": naive_linear(stored, module) for module in modules}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"]
    assert unexpected == []
    return model.eval()


def adapted_base() -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(plain_base(), demo.ADAPTER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.ORIGINAL)


@pytest.fixture(scope="module")
def windows(tokenizer: Any) -> dict[str, torch.Tensor]:
    """The first 12 windows of each evaluation text."""

    def cut(text: str) -> torch.Tensor:
        ids = tokenizer(text, verbose=False)["input_ids"]
        return torch.tensor(ids[: 12 * demo.SEQUENCE_LENGTH]).view(12, demo.SEQUENCE_LENGTH)

    return {"code": cut(demo.in_domain_text()), "reference": cut(demo.general_text())}


@torch.no_grad()
def perplexity(model: Any, windows_WT: torch.Tensor) -> float:
    logits = model(input_ids=windows_WT).logits[:, :-1]
    targets = windows_WT[:, 1:]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def json_strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for each in value.values():
                yield from json_strings(each)
        case list():
            for each in value:
                yield from json_strings(each)


def test_all_assets_are_under_four_megabytes() -> None:
    sizes = [path.stat().st_size for path in demo.ASSETS.rglob("*") if path.is_file()]
    assert 1_000_000 < sum(sizes) < 4_000_000


def test_the_model_has_at_most_eight_hundred_thousand_parameters() -> None:
    weights = load_file(demo.ORIGINAL / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) <= 800_000
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_no_asset_names_a_path_of_a_machine(folder: Path) -> None:
    for path in folder.glob("*config.json"):
        fields = json.loads(path.read_text(encoding="utf-8"))
        assert [text for text in json_strings(fields) if text.startswith(("/", "~"))] == []


def test_the_quantized_base_is_gptq_of_four_bits_in_groups_of_64() -> None:
    for name, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        fields = json.loads((demo.BASE / name).read_text(encoding="utf-8"))
        config = fields[key] if key else fields
        assert (config["quant_method"], config["checkpoint_format"]) == ("gptq", "gptq")
        assert (config["bits"], config["group_size"]) == (4, 64)
        assert (config["sym"], config["desc_act"]) == (True, False)


def test_the_tokenizer_gives_every_text_back(tokenizer: Any) -> None:
    text = demo.in_domain_text()[:4000] + "\n\t\tπ ≠ “quoted” \N{SNOWMAN}"
    assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text


def test_the_base_has_learned_prose_and_the_adapter_code(windows: dict[str, torch.Tensor]) -> None:
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(demo.ORIGINAL, dtype=torch.float32).eval()
    base, adapted = plain_base(), adapted_base()
    prose = perplexity(original, windows["reference"])
    assert prose < 60
    assert perplexity(base, windows["reference"]) == pytest.approx(prose, rel=0.05)
    assert perplexity(adapted, windows["code"]) < 0.6 * perplexity(base, windows["code"])


def test_gptqmodel_computes_what_the_quantized_base_decodes_to(
    windows: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optimum", reason="needs the extra 'verify'")
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    pytest.importorskip("gptqmodel", reason="needs the extra 'verify'")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32)
    for text, windows_WT in windows.items():
        expected = perplexity(plain_base(), windows_WT[:2])
        assert perplexity(loaded, windows_WT[:2]) == pytest.approx(expected, rel=1e-3), text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (demo.calibration_text, demo.CALIBRATION_WINDOWS),
        (demo.in_domain_text, demo.EVALUATION_WINDOWS),
        (demo.general_text, demo.EVALUATION_WINDOWS),
    ],
)
def test_each_text_fills_the_windows_that_the_demo_asks_for(
    tokenizer: Any, text: Callable[[], str], count: int
) -> None:
    ids = tokenizer(text(), verbose=False)["input_ids"]
    assert len(ids) >= count * demo.SEQUENCE_LENGTH


def test_calibration_and_evaluation_share_no_run_of_five_lines() -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        lines = [line for line in text.splitlines() if line.strip()]
        return set(zip(*(lines[shift:] for shift in range(5)), strict=False))

    texts = [runs(text()) for text in (demo.calibration_text, demo.in_domain_text)]
    assert texts[0].isdisjoint(texts[1])


def test_the_domain_is_code_without_prose() -> None:
    tree = ast.parse(demo.module_code("calendar"))
    assert ast.get_docstring(tree) is None
    assert "#" not in demo.module_code("sched")
    compile(demo.calibration_text(), "calibration.txt", "exec", dont_inherit=True)


def test_the_recipe_names_what_is_there(tmp_path: Path) -> None:
    demo.write_texts(tmp_path / "texts")
    recipe = demo.recipe(texts=tmp_path / "texts", out=tmp_path / "release")
    assert recipe.faults() == ()
    named = (recipe.calibration, *recipe.eval, recipe.base, *recipe.adapter, recipe.original)
    assert [path for path in named if path is None or not Path(path).exists()] == []
    assert [text.role for text in recipe.eval_texts()] == ["in_domain", "general"]


def test_a_python_without_sources_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere\.py") as caught:
        demo.split_source(tmp_path / "nowhere.py")
    assert caught.value.hint is not None


def test_a_python_without_reference_topics_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusError, match="pydoc_data"):
        demo.general_text()
