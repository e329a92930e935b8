"""What a folder is: a base, an original, an adapter, a release; from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmerge.adapters import open_adapter
from qmerge.adapters.source import CONFIG_NAME
from qmerge.errors import InputError
from qmerge.formats import open_format
from qmerge.results import REPORT
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.files import read_json


def inspect(folder: Path) -> dict[str, Any]:
    """Facts about a folder as plain values, by name.

    Raises `InputError`, or the error of whatever in the folder cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="give a model's or an adapter's folder")
    if (folder / CONFIG_NAME).is_file():
        return {"folder": str(folder), "is": "adapter", **open_adapter(folder).summary}
    return _model(folder)


def _model(folder: Path) -> dict[str, Any]:
    with Checkpoint.open(folder) as checkpoint:
        form = open_format(checkpoint)
        summary = form.summary
        weights = form.weights.values()
        facts: dict[str, Any] = {
            "folder": str(folder),
            "is": "quantized model" if summary.quantized else "dense model",
            "format": form.name,
            "model": checkpoint.config.get("model_type"),
            "architecture": ", ".join(checkpoint.config.get("architectures") or ()) or None,
            "layers": checkpoint.config.get("num_hidden_layers"),
            "parameters": sum(math.prod(weight.shape) for weight in weights),
            "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
            "files": len({info.file for info in checkpoint.tensors.values()}),
            "quantized_linears": summary.quantized,
            "dense_tensors": summary.dense,
            "dtypes": dict(Counter(str(w.dtype).removeprefix("torch.") for w in weights)),
        }
        if summary.quantized:
            facts |= {
                "bits": summary.bits,
                "group_size": summary.group_size,
                "symmetric": summary.symmetric,
                "desc_act": summary.desc_act,
                "quantized_by": summary.quantizer,
                "lm_head_quantized": summary.lm_head,
            }
    return facts | _made_by_qmerge(folder)


def _made_by_qmerge(folder: Path) -> dict[str, Any]:
    if not (folder / REPORT).is_file():
        return {}
    report: Mapping[str, Any] = read_json(folder / REPORT)
    change = report.get("change")
    return {
        "is": "qmerge release",
        "qmerge_version": report.get("qmerge_version"),
        "strategy": (report.get("strategy") or {}).get("chosen"),
        "perplexity_ratio": {name: part.get("ratio") for name, part in (change or {}).items()},
    }
