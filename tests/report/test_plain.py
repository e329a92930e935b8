"""The text, JSON and markdown reports and the model card."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from pathlib import PurePath
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from qmerge.measure import Limits, check_limits, compare_results
from qmerge.report import FORMATS, render, render_card, render_comparison
from qmerge.report.checks import of_result
from qmerge.results import LEFT_BESIDE, UNPROVEN, InputRecord, RunResult
from tests.samples import ODD, finished, quantized, without_adapter_figures


def gated(**options: bool) -> RunResult:
    result = finished(**options)
    gate = check_limits(result, Limits(max_kl=1e-9, min_survival=0.1))
    return dataclasses.replace(result, gate=gate)


def bare() -> RunResult:
    return RunResult(qmerge_version="0.1.0")


def test_the_table_is_aligned_and_holds_the_figures() -> None:
    text = render(finished(), "text")
    lines = text.splitlines()
    start = lines.index("plays · in-domain · 16 × 41 tokens")
    header, body = lines[start + 1], lines[start + 2 : start + 9]
    labels = [line[2:23].strip() for line in body]
    assert labels[:3] == ["original", "quantized base", "trained (reference)"]
    assert labels[-1] == "noise floor"
    for title in ("perplexity", "change", "KL", "same top token"):
        end = header.index(title) + len(title)
        # Every figure ends where its column's title does.
        assert all(line[end - 1 : end] not in ("", " ") for line in body), title
        assert all(line[end : end + 1] in ("", " ") for line in body), title
    release = next(line for line in body if line.startswith("  release"))
    score = finished().arms["release"]["plays"]
    assert score.kl is not None
    assert f"{score.kl.mean:.5f} ± {score.kl.stderr:.5f}" in release
    assert f"{score.perplexity:.3f} ± {score.stderr:.3f}" in release


def test_text_is_plain_and_fits_a_terminal() -> None:
    text = render(gated(), "text")
    assert max(map(len, text.splitlines())) <= 110
    assert "\x1b" not in text
    assert text.startswith("The release does not pass")
    assert "gate: 2 of 3 limits hold" not in text
    assert "gate: 1 of 3 limits hold" in text
    assert "warning: calibration" in text
    assert "since the previous release" in text
    assert "adapter: survival 0." in text
    flat = " ".join(text.split())
    assert "original: the base's quantization error is 0.2" in flat
    assert "by layer 0.1 (model.layers.0) to 0.4 (model.layers.3)" in flat


def test_each_layers_figures_stand_in_markdown() -> None:
    text = render(finished(), "md")
    assert "| layer | survival | noise | base's error / adapter's effect |" in text
    assert re.search(r"\| model.layers.3 \| 0\.\d+ \| [\d.]+ \| 0\.4 \|", text)
    assert "## Layers" not in render(without_adapter_figures(finished()), "md")


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "html"])
@pytest.mark.parametrize("result", [bare(), without_adapter_figures(finished()), gated(odd=True)])
def test_every_result_can_be_told(result: RunResult, form: str) -> None:
    assert render(result, form).strip()
    assert render(result, form) == render(result, form)


def test_json_is_strict_whole_and_readable() -> None:
    text = render(finished(), "json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert RunResult.from_dict(json.loads(text, parse_constant=refuse)) == finished()
    windows = [line for line in text.splitlines() if '"window_nll": [' in line]
    assert windows
    assert all(line.rstrip(",").endswith("]") for line in windows)


def test_markdown_tables_are_well_formed() -> None:
    lines = render(gated(odd=True), "md").splitlines()
    tables = [number for number, line in enumerate(lines) if line.startswith("| ---")]
    assert len(tables) >= 4
    for number in tables:
        columns = cells(lines[number])
        assert cells(lines[number - 1]) == columns
        assert cells(lines[number + 1]) == columns


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line))


def test_markdown_lets_no_markup_through() -> None:
    text = render(gated(odd=True), "md") + render_card(gated(odd=True), name=ODD)
    body = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<script" not in body
    assert "<i>" not in body
    assert "\x1b" not in text


@pytest.mark.parametrize(
    "name", ["my release", "été", "it's $HOME", 'a "b" \\', "-rf", "a`b`;ls", "$(id) & | > *"]
)
def test_commands_of_the_card_take_any_folder(name: str) -> None:
    card = render_card(finished(), name=name)
    shell = [line for line in card.splitlines() if line.startswith(("vllm serve", "qmerge "))]
    serve, again, compare = map(shlex.split, shell)
    assert [PurePath(part) for part in (serve[2], compare[2])] == [PurePath(name)] * 2
    assert PurePath(again[2]) == PurePath(name, "qmerge_recipe.yaml")
    assert not any(part.startswith("-") for part in (serve[2], again[2], compare[2]))
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls] == [name, name]


def test_the_card_has_front_matter_that_the_hub_reads() -> None:
    card = render_card(finished(), name="plays-int4")
    _, front, body = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["base_model"] == "org/base-4bit"
    assert found["base_model_relation"] == "quantized"
    assert found["license"] == "apache-2.0"
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert "license_name" not in found
    assert found["datasets"] == ["org/texts"]
    assert {"qmerge", "gptq", "4-bit"} <= set(found["tags"])
    for expected in (
        "# plays-int4",
        'AutoModelForCausalLM.from_pretrained("plays-int4"',
        "vllm serve plays-int4",
        "gptqmodel optimum",
        "qmerge run plays-int4/qmerge_recipe.yaml --out again",
        "as good as the model that was trained",
        "| release |",
    ):
        assert expected in body


def test_the_hubs_own_library_reads_the_card() -> None:
    result = finished()
    own = {"license_name": "llama3", "license_link": "https://example.org/licence"}
    base = dataclasses.replace(result.inputs["base"], license="other", details=own)
    card = ModelCard(render_card(dataclasses.replace(result, inputs={"base": base}), name="x"))
    data: Any = card.data
    assert (data.base_model, data.license, data.license_name) == (
        "org/base-4bit",
        "other",
        "llama3",
    )
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.license_link == own["license_link"]
    assert card.text.lstrip().startswith("# x")


def test_the_card_keeps_the_makers_disk_to_itself() -> None:
    result = finished()
    local = InputRecord(path="/home/somebody/models/base", model="/home/somebody/models/base")
    calibration = result.corpora.calibration
    assert calibration is not None
    corpora = dataclasses.replace(
        result.corpora, calibration=dataclasses.replace(calibration, source="/home/somebody/t.txt")
    )
    card = render_card(
        dataclasses.replace(result, inputs={"base": local}, corpora=corpora), name="x"
    )
    assert "/home/somebody" not in card
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert "base_model" not in front
    assert "license" not in front
    assert "datasets" not in front


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ({"bits": 3, "format": "gptq"}, "3 bits"),
        ({"bits": 4, "symmetric": False, "format": "gptq"}, "symmetric only"),
        ({"bits": 4, "format": "gptq_v2"}, "gptq_v2"),
    ],
)
def test_the_card_says_where_vllm_will_not_load_it(details: dict[str, object], reason: str) -> None:
    release = InputRecord(path="r", details=details)
    card = render_card(dataclasses.replace(finished(), release=release), name="x")
    assert "vllm serve" not in card
    assert reason in card
    packed = {**details, "format": "compressed-tensors"}
    release = InputRecord(path="r", details=packed)
    card = render_card(dataclasses.replace(finished(), release=release), name="x")
    assert "vllm serve" in card
    assert "compressed-tensors" in card


def test_nothing_is_said_to_be_merged_where_nothing_was() -> None:
    card = render_card(quantized(), name="plays-int4")
    assert "`org/base-4bit`, quantized with GPTQ to 4-bit weights" in card
    assert "dense in 16 bits" in card
    assert "qlora" not in card
    for text in (card, *(render(quantized(), form) for form in ("text", "md", "html"))):
        body = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
        assert not re.search(r"merged|\btrained|adapter|strategy|dequantize", body, re.IGNORECASE)


def test_a_name_that_proves_nothing_is_told_once() -> None:
    """On stderr when the run begins; what it writes has it too, what ends it has not."""
    note = f"adapter_config.json names the base org/X, and the folder is called y: {UNPROVEN}"
    result = dataclasses.replace(finished(), warnings=(note, "another"))
    assert "org/X" not in render(result, "text")
    assert "warning: another" in render(result, "text")
    assert of_result(result).warnings == ("another",)
    for form in ("md", "html", "json"):
        assert "org/X" in render(result, form)


def test_the_base_is_the_folder_that_was_used() -> None:
    """An adapter may name another: its word stands as its word."""
    result = finished()
    base = dataclasses.replace(result.inputs["base"], path="models/folder-used", model=None)
    adapter = dataclasses.replace(result.inputs["adapter"], details={"base": "org/named"})
    result = dataclasses.replace(result, inputs={"base": base, "adapter": adapter})
    page = render(result, "html")
    assert '<p class="origin">folder-used + adapter · dequantize' in page
    card = render_card(result)
    assert "`folder-used` with the adapter `adapter` (which names `org/named` as its base)" in card
    assert yaml.safe_load(card.split("---\n", 2)[1])["base_model"] == "org/named"


def test_the_card_gives_no_command_that_cannot_work() -> None:
    """qmerge is on no package index."""
    card = render_card(finished(), name="x")
    assert "Made with qmerge 0.1.0." in card
    assert "pip install qmerge" not in card


def test_the_card_opens_a_release_with_what_reads_it() -> None:
    """transformers would leave packed experts random, and takes all linears for alike."""
    plain = finished()

    def card(**changes: Any) -> str:
        (first, *others), *layers = plain.layers[0].linears, *plain.layers[1:]
        changed = dataclasses.replace(first, **changes)
        layer = dataclasses.replace(plain.layers[0], linears=(changed, *others))
        return render_card(dataclasses.replace(plain, layers=(layer, *layers)), name="x")

    assert "AutoModelForCausalLM.from_pretrained" in card()
    for other in ({"bits": 8}, {"name": "model.layers.0.mlp.experts.0.up_proj", "tokens": 7}):
        assert 'GPTQModel.load("x")' in card(**other)
        assert "AutoModelForCausalLM" not in card(**other)
    head = dataclasses.replace(plain.layers[0], name="lm_head", kind="head")
    with_head = dataclasses.replace(plain, layers=(*plain.layers, head))
    assert "AutoModelForCausalLM" not in render_card(with_head, name="x")
    mixtral = card(name="model.layers.0.mlp.experts.0.w1", tokens=7)
    assert "```python" not in mixtral.partition("vllm serve")[0].rpartition("## ")[2]
    assert "Neither transformers nor gptqmodel" in mixtral


def test_the_card_goes_by_what_the_release_records() -> None:
    plain = finished()

    def card(*files: str, **details: Any) -> str:
        release = InputRecord(path="r", details=details, files=dict.fromkeys(files, ""))
        return render_card(dataclasses.replace(plain, release=release), name="x")

    seeing = card("preprocessor_config.json", auto_class="AutoModelForImageTextToText")
    assert "import AutoModelForImageTextToText, AutoProcessor\n" in seeing
    assert 'processor = AutoProcessor.from_pretrained("x")' in seeing
    assert "AutoTokenizer" not in seeing
    by_vllm = card(format="compressed-tensors", opened_by="vLLM")
    assert "from_pretrained" not in by_vllm
    assert "vllm serve x" in by_vllm
    assert 'GPTQModel.load("x")' in card(opened_by="gptqmodel")


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_the_card_serves_no_release_that_a_fusing_server_cannot_load(form: str) -> None:
    made = InputRecord(path="r", details={"format": form, "bits": 4, "symmetric": True})
    whole = dataclasses.replace(finished(), release=made)
    assert "vllm serve x" in render_card(whole, name="x")
    mixed = dataclasses.replace(whole, warnings=(f"{LEFT_BESIDE}k_proj; and so on",))
    assert "vllm serve" not in render_card(mixed, name="x")
    assert "vLLM does not load it: some linears that it fuses" in render_card(mixed, name="x")


def test_a_comparison_says_better_worse_or_same() -> None:
    same = render_comparison(compare_results(finished(), finished()))
    assert same.startswith("No difference beyond noise.")
    worse = render_comparison(compare_results(finished(), finished(damage=1.0)))
    assert worse.startswith("The new release is worse than the old one.")
    assert "plays: worse, perplexity +" in worse
    assert "larger error: model.layers.2.mlp.down_proj" in worse
