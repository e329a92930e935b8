"""Single stages with a dense result: a decoded base, or a base with its adapter merged.

Streamed unit by unit; nothing appears at the given place before all of it is on disk.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters import Injection, inject, open_adapter
from qmerge.errors import InputError, PlanError, StorageError
from qmerge.model.opening import open_model
from qmerge.model.skeleton import Skeleton
from qmerge.model.weights import Weights, model_dtype
from qmerge.names import Unit, join
from qmerge.progress import Progress, Silent
from qmerge.release import side_files_of
from qmerge.stages.merge import live_layer, merge_layer, merge_outer
from qmerge.storage.shards import (
    copy_file,
    sync_folder,
    write_index,
    write_json,
    write_shard,
)
from qmerge.texts import tokenizer_home
from qmerge.tuning import misfit_fault
from qmerge.workspace import partial

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    base: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `base`, decoded and with the adapter merged in float32, as a dense checkpoint.

    `dtype` None is the model's own 16-bit dtype. Each weight is rounded once, when it is written;
    one that is stored in that dtype and not touched keeps its bytes. Returns what was written.
    """
    progress = progress or Silent()
    if out.exists():
        raise InputError(f"{out} exists", hint="name a folder that does not exist yet")
    skeleton, weights = open_model(base, trust_remote_code=trust_remote_code)
    injection = _inject(skeleton, weights, adapter)
    target = DTYPES[dtype] if dtype else model_dtype(weights.checkpoint.config)
    units = skeleton.units()
    with _staged(out) as folder:
        progress.stage("write", len(units))
        records = []
        for number, unit in enumerate(units, start=1):
            progress.step(unit.label)
            name = f"model-{number:05}-of-{len(units):05}.safetensors"
            records.append(
                write_shard(folder / name, _tensors(skeleton, weights, injection, unit, target))
            )
        write_index(folder, records)
        write_json(folder / "config.json", _config(weights.checkpoint.config, target))
        home = tokenizer_home(base, adapter)
        for relative, path in side_files_of(weights.checkpoint, home).items():
            (folder / relative).parent.mkdir(exist_ok=True)
            copy_file(path, folder / relative)
    return {
        "out": str(out),
        "format": weights.format.name,
        "dtype": str(target).removeprefix("torch."),
        "tensors": sum(len(record.tensors) for record in records),
        "bytes": sum(record.nbytes for record in records),
        "merged": sorted(injection.touched) if injection else [],
    }


def _inject(skeleton: Skeleton, weights: Weights, adapter: Path | None) -> Injection | None:
    if adapter is None:
        return None
    opened = open_adapter(adapter)
    if opened.misfit and weights.format.summary.quantized:
        raise PlanError([misfit_fault(opened, weights.format.name)])
    injection = inject(skeleton.model, opened)
    if injection.faults:
        raise PlanError(injection.faults)
    return injection


def _tensors(
    skeleton: Skeleton,
    weights: Weights,
    injection: Injection | None,
    unit: Unit,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """One unit's tensors as they are written, by stored name."""
    merged: Mapping[str, torch.Tensor] = {}
    if injection is not None and any(name in injection.touched for name in unit.parameters):
        dense = weights.unit(unit)
        if unit.kind == "layer":
            relative = merge_layer(injection, live_layer(skeleton, injection, unit, dense))
            merged = {join(unit.path, name): tensor for name, tensor in relative.items()}
        else:
            merged = merge_outer(injection, unit, dense)
    return {
        weights.names.stored[name]: _rounded(weights, merged, injection, name, dtype)
        for name in unit.parameters
    }


def _rounded(
    weights: Weights,
    merged: Mapping[str, torch.Tensor],
    injection: Injection | None,
    name: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    if injection is not None and name in injection.touched:
        return merged[name].to(dtype)
    stored = weights.as_stored(name)
    return (weights.tensor(name) if stored is None else stored).to(dtype)


def _config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    dense = copy.deepcopy(dict(config))
    dense.pop("quantization_config", None)
    dense.pop("torch_dtype", None)
    dense["dtype"] = str(dtype).removeprefix("torch.")
    return dense


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` by one rename, or goes away with whatever ended the work."""
    folder = partial(out)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: {error.strerror}", hint="remove it if no other process is at work there"
        ) from error
    try:
        yield folder
        sync_folder(folder)
        folder.rename(out)
        sync_folder(out.absolute().parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
