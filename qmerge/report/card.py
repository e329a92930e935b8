"""The release's README.md: front matter that the hub reads, then what a user needs to know."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import PurePath
from typing import Any

import yaml

from qmerge.report.figures import size
from qmerge.report.glossary import legend
from qmerge.report.lines import findings
from qmerge.report.markdown import coded, doubted, escape, grid, summary
from qmerge.report.verdict import verdict
from qmerge.results import LEFT_BESIDE, RunResult

# The hub's own identifier: organisation and name; anything else is a folder on somebody's disk.
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+\Z")
HUB_SOURCE = re.compile(r"hub:([\w.-]+/[\w.-]+?)(?:[@/:]|\Z)")


def render(result: RunResult, *, name: str = "release") -> str:
    """The card of a release; `name` is what the folder is called, for title and commands."""
    blocks = [
        f"---\n{yaml.safe_dump(front_matter(result), sort_keys=False, allow_unicode=True)}---",
        f"# {escape(name)}",
        _origin(result),
        f"**{escape(_for_others(verdict(result).sentence))}**",
        _for_others(doubted(result)),
        "\n".join(f"- {coded(line, result)}" for line in findings(result)),
        "## What it costs",
        _arms_legend(result),
        summary(result),
        "## Use",
        _use(result, name),
        "## How it was made",
        _made(result),
        "## Make it again",
        _again(result, name),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def front_matter(result: RunResult) -> dict[str, Any]:
    """Keys of the hub's model cards; a key whose value is not known is left out."""
    roles = ("original", "base", "adapter")
    records = [(role, result.inputs[role]) for role in roles if role in result.inputs]
    named = [(role, r.model) for role, r in records if r.model and HUB_NAME.match(r.model)]
    bases = [model for role, model in named if role != "adapter"] + _claims(result)
    found: dict[str, Any] = {}
    if bases:
        found["base_model"] = bases[0]
        found["base_model_relation"] = "quantized"
    licensed = [record for role, record in records if record.license and role != "adapter"]
    if licensed:
        found["license"] = licensed[0].license
        own = ("license_name", "license_link") if licensed[0].license == "other" else ()
        found |= {key: licensed[0].details[key] for key in own if key in licensed[0].details}
    found["library_name"] = "transformers"
    found["pipeline_tag"] = "text-generation"
    found["tags"] = _tags(result)
    sets = [text.source for text in [result.corpora.calibration] if text is not None]
    hub = [match[1] for source in sets if (match := HUB_SOURCE.match(source))]
    if hub:
        found["datasets"] = hub
    return found


def _setting(result: RunResult, key: str) -> Any:
    """What the release is: its own record first, else what was asked for."""
    details = result.release.details if result.release is not None else {}
    return details.get(key, result.recipe.get(key))


def _tags(result: RunResult) -> list[str]:
    bits = _setting(result, "bits")
    form = str(_setting(result, "format") or "gptq")
    tags = ["qmerge", "gptq", form if form not in ("gptq", "gptq_v2") else ""]
    tags.append("" if result.command == "quantize" else "qlora")
    return [tag for tag in [*tags, f"{bits}-bit" if bits else ""] if tag]


def _origin(result: RunResult) -> str:
    base, adapter = _called(result, "base"), _called(result, "adapter")
    if not base:
        return ""
    claims = [name for name in _claims(result) if adapter and f"`{name}`" != base]
    trained = f" (which names `{claims[0]}` as its base)" if claims else ""
    merged = f"{base} with the adapter {adapter}{trained}" if adapter else base
    bits = _setting(result, "bits")
    what = f"{bits}-bit weights" if bits else "quantized weights"
    group = _setting(result, "group_size")
    detail = f", group size {group}" if group and group != -1 else ""
    done = "quantized" if result.command == "quantize" else "merged and quantized"
    return (
        f"{merged}, {done} with GPTQ to {what}{detail} by qmerge {escape(result.qmerge_version)}."
    )


def _claims(result: RunResult) -> list[str]:
    """What adapters name as their base, where the hub can have it."""
    named = [str(record.details.get("base") or "") for record in result.inputs.values()]
    return [name for name in named if HUB_NAME.match(name)]


def _called(result: RunResult, role: str) -> str:
    """A hub name, or a folder's last part: a card travels, the disk it was made on does not."""
    record = result.inputs.get(role)
    if record is None:
        return ""
    name = record.model if record.model and HUB_NAME.match(record.model) else ""
    return f"`{name or PurePath(record.path).name}`".replace("\n", " ")


def _arms_legend(result: RunResult) -> str:
    if result.reference is None:
        return ""
    told = escape(legend(result)).replace("\\`", "`")
    return (
        f"{told} Change, KL (nats per token) and agreement are against `{result.reference}`. Errors"
        " are standard errors over windows, paired for the change."
    )


def _use(result: RunResult, name: str) -> str:
    path = json.dumps(_plain(name), ensure_ascii=False)
    compressed = _setting(result, "format") == "compressed-tensors"
    packages = "compressed-tensors" if compressed else "gptqmodel optimum"
    loader = _setting(result, "auto_class") or "AutoModelForCausalLM"
    prepares, prepared = _preparing(result)
    code = {
        "transformers": (
            "```python\n"
            f"# pip install transformers accelerate {packages}\n"
            f"from transformers import {', '.join(sorted((loader, prepares)))}\n\n"
            f'model = {loader}.from_pretrained({path}, device_map="auto")\n'
            f"{prepared} = {prepares}.from_pretrained({path})\n"
            "```"
        ),
        "gptqmodel": (
            "```python\n"
            "# pip install gptqmodel; transformers does not open this one\n"
            "from gptqmodel import GPTQModel\n\n"
            f"model = GPTQModel.load({path})\n"
            "tokenizer = model.tokenizer\n"
            "```"
        ),
        "vLLM": "transformers does not open this one.",
        "neither": "Neither transformers nor gptqmodel finds packed experts of these names.",
    }[_opened_by(result)]
    refused = _refused_by_vllm(result)
    if refused:
        return f"{code}\n\nvLLM does not load it: {refused}."
    return f"{code}\n\n```sh\n# vLLM\nvllm serve {_quoted(name)}\n```"


def _preparing(result: RunResult) -> tuple[str, str]:
    """What makes a model's inputs, and what that is called: a processor where there are files of
    one beside the tokenizer's."""
    files = result.release.files if result.release is not None else {}
    if any(file in files for file in ("processor_config.json", "preprocessor_config.json")):
        return "AutoProcessor", "processor"
    return "AutoTokenizer", "tokenizer"


def _opened_by(result: RunResult) -> str:
    """As the release's record has it, else by its linears. transformers takes all linears of a GPTQ
    release for alike, and leaves experts and a packed head random; gptqmodel knows experts by three
    names."""
    linears = [linear for layer in result.layers for linear in layer.linears]
    experts = [linear.name for linear in linears if linear.tokens is not None]
    compressed = _setting(result, "format") == "compressed-tensors"
    if not (compressed or all(n.endswith(("gate_proj", "up_proj", "down_proj")) for n in experts)):
        return "neither"
    if recorded := _setting(result, "opened_by"):
        return str(recorded)
    if compressed:
        return "transformers"
    grids = {(linear.bits, linear.group_size) for linear in linears}
    head = any(layer.linears for layer in result.layers if layer.kind == "head")
    return "gptqmodel" if experts or head or len(grids) > 1 else "transformers"


def _refused_by_vllm(result: RunResult) -> str:
    """vLLM loads no linears of which it makes one and some alone are packed; of GPTQ it takes
    symmetric 4 or 8 bits in the first checkpoint format only."""
    mixed = any(warning.startswith(LEFT_BESIDE) for warning in result.warnings)
    reasons = ["some linears that it fuses with packed ones are in 16 bits"] if mixed else []
    if _setting(result, "format") == "compressed-tensors":
        return "; ".join(reasons)
    if _setting(result, "bits") in (2, 3):
        reasons.append(f"its GPTQ kernels have no {_setting(result, 'bits')} bits")
    if _setting(result, "symmetric") is False:
        reasons.append("its GPTQ kernels are symmetric only (use `--format compressed-tensors`)")
    if _setting(result, "format") == "gptq_v2":
        reasons.append("it reads zero points as `gptq` stores them, not as `gptq_v2` does")
    return "; ".join(reasons)


def _made(result: RunResult) -> str:
    body = []
    for role, record in result.inputs.items():
        shown = size(record.bytes) if record.bytes else ""
        body.append(
            [role, PurePath(record.path).name, record.format or "", shown, _hash(record.files)]
        )
    text = result.corpora.calibration
    if text is not None:
        shown = f"{text.windows} × {text.sequence_length} tokens"
        body.append(["calibration", PurePath(text.source).name, "", shown, text.sha256[:16]])
    if not body:
        return "See `qmerge_report.json`."
    return grid(["input", "name", "format", "size", "sha256"], body)


def _hash(files: Any) -> str:
    weights = [digest for file, digest in files.items() if str(file).endswith(".safetensors")]
    return str(weights[0])[:16] if weights else ""


def _again(result: RunResult, name: str) -> str:
    recipe = _quoted(f"{name}/qmerge_recipe.yaml")
    return (
        f"Made with qmerge {escape(result.qmerge_version)}. `qmerge_recipe.yaml` in this folder"
        " holds every setting, `qmerge_report.json` all figures and the hashes of what went in."
        " From the folder that the recipe's paths start from:\n\n"
        f"```sh\nqmerge run {recipe} --out again\n"
        f"qmerge compare {_quoted(name)} again\n```"
    )


def _quoted(name: str) -> str:
    """A folder's name as a shell takes it for one argument and no option."""
    plain = _plain(name)
    return shlex.quote(f"./{plain}" if plain.startswith("-") else plain)


def _plain(name: str) -> str:
    """A name without what would end a line or a block of code, or what a terminal obeys."""
    return "".join(c for c in name.replace("```", "") if c.isprintable())


def _for_others(text: str) -> str:
    """A card is read by others than those who trained."""
    return text.replace("what you trained", "the model that was trained")
