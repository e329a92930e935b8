"""What a release holds beside its weights: configuration, side files, card, report, recipe."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from qmerge import __version__
from qmerge.formats.writing import quantization_config
from qmerge.job import Job
from qmerge.model.reshape import restate
from qmerge.provenance import CARD
from qmerge.report import render, render_card, render_json
from qmerge.results import REPORT, RunResult
from qmerge.storage.checkpoint import Checkpoint, folder_side_files
from qmerge.storage.shards import copy_file, write_json, write_text

RECIPE = "qmerge_recipe.yaml"
PAGE = "report.html"
END = "\n}\n"
"""How the report's text ends."""
OWN_FILES = frozenset(
    (
        "config.json",
        "quantize_config.json",
        "quantization_config.json",
        "quant_config.json",
        "hf_quant_config.json",
        "quant_log.csv",
        "recipe.yaml",
        CARD,
        REPORT,
        RECIPE,
        PAGE,
    )
)
"""Files of a base that speak of its own quantization (by AutoAWQ, ModelOpt, GPTQModel and
llm-compressor among others), and those that a release writes itself."""
LEFT_BEHIND = re.compile(
    r"(trainer_state|(all|train|eval|test|predict)_results)\.json|trainer_log\.jsonl"
    r"|training_args\.(json|yaml)|events\.out\.tfevents\..*|.*\.(log|tmp|bak)|.*~"
)
"""What training and editing leave in a folder, and no user of a model needs."""

TOKENIZER_NAMES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece")
TEMPLATE_NAMES = ("chat_template", "additional_chat_templates")


def side_files_of(checkpoint: Checkpoint, tokenizer: Path) -> dict[Path, Path]:
    """Tokenizer, processor, templates, licence and code: source by name relative to the folder.

    The tokenizer's own files come from the folder `tokenizer`, which may be the adapter's.
    """
    sources = {path.relative_to(checkpoint.path): path for path in checkpoint.side_files()}
    if tokenizer != checkpoint.path:
        sources = {name: path for name, path in sources.items() if not _of_tokenizer(name)}
        sources |= tokenizer_files(tokenizer)
    return {
        name: sources[name]
        for name in sorted(sources)
        if str(name) not in OWN_FILES and not LEFT_BEHIND.fullmatch(name.name)
    }


def tokenizer_files(folder: Path) -> dict[Path, Path]:
    """The tokenizer's own files in a folder, by name."""
    saved = {path.relative_to(folder): path for path in folder_side_files(folder)}
    return {name: path for name, path in saved.items() if _of_tokenizer(name)}


def write_side_files(job: Job, folder: Path) -> dict[str, str]:
    """Copy the side files byte for byte; their sha256 by name."""
    digests = {}
    for name, path in side_files_of(job.base.checkpoint, job.tokenizer_folder).items():
        (folder / name).parent.mkdir(exist_ok=True)
        digests[str(name)] = copy_file(path, folder / name)
    return digests


def _of_tokenizer(name: Path) -> bool:
    return name.parts[0].startswith((*TOKENIZER_NAMES, *TEMPLATE_NAMES))


def write_config(job: Job, folder: Path) -> dict[str, str]:
    """`config.json` with the new quantization, and `quantize_config.json`; sha256 by name."""
    config = restate(job.base.checkpoint.config, job.skeleton)
    settings = quantization_settings(job)
    config["quantization_config"] = settings
    digests = {"config.json": write_json(folder / "config.json", config)}
    if settings["quant_method"] == "gptq":
        name = "quantize_config.json"
        digests[name] = write_json(folder / name, settings)
    return digests


def quantization_settings(job: Job) -> dict[str, Any]:
    """The `quantization_config` of the release: the keys that transformers and servers read."""
    names = job.base.names
    matrices = {name: names.module_to_write(name) for name in job.skeleton.matrices()}
    head = job.skeleton.head()
    heads = {head, names.module_to_write(head)}
    if head in job.specs:
        matrices[head] = names.module_to_write(head)
    spec = job.settings.spec
    return quantization_config(
        job.settings.format,
        bits=spec.bits,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        order=job.settings.order,
        damping=job.settings.damping,
        writer=f"qmerge:{__version__}",
        quantized={
            module: (job.specs[name].bits, job.specs[name].group_size)
            for name, module in matrices.items()
            if name in job.specs
        },
        kept=[
            *(module for name, module in matrices.items() if name not in job.specs),
            *job.skeleton.stacks(),
        ],
        outside=_outside(job),
        head=heads,
    )


def _outside(job: Job) -> set[str]:
    """Linears outside the layers by the names that they have on disk and in memory: readers that
    would look for packed ones there go by the one or the other."""
    inside = job.skeleton.linears()
    elsewhere = [name for name in job.skeleton.replaceable() if name not in inside]
    return {*elsewhere, *map(job.base.names.module_to_write, elsewhere)}


def write_papers(job: Job, folder: Path, result: RunResult) -> RunResult:
    """Card, recipe, page and, last, the report, which has the digests of all the rest.

    Returns the result with those digests, as the report has it.
    """
    assert result.release is not None
    digests = {
        CARD: write_text(folder / CARD, render_card(result, name=job.recipe.out.name)),
        RECIPE: write_text(folder / RECIPE, job.recipe.to_yaml()),
        PAGE: write_text(folder / PAGE, render(result, "html")),
    }
    files = dict(sorted({**result.release.files, **digests}.items()))
    finished = replace(result, release=replace(result.release, files=files))
    write_text(folder / REPORT, seal(render_json(finished)))
    return finished


def seal(report: str) -> str:
    """The report with a last key that digests all before it, so that a change of it shows."""
    digest = hashlib.sha256(report.encode("utf-8")).hexdigest()
    return f'{report.removesuffix(END)},\n  "sha256": "{digest}"{END}'


def unseal(sealed: str) -> str | None:
    """The report as it was before it was sealed; None where it carries no seal or another's."""
    body, _, _ = sealed.rpartition(',\n  "sha256": "')
    report = body + END
    return report if seal(report) == sealed else None
