"""Single stages with a dense result: a decoded base, or a base with its adapter merged.

Streamed unit by unit; nothing appears at the given place before all of it is on disk.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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
    ShardRecord,
    copy_file,
    sync_folder,
    write_index,
    write_json,
    write_pieces,
)
from qmerge.texts import tokenizer_home
from qmerge.tuning import misfit_fault
from qmerge.workspace import partial as partial_folder

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
        work = partial(_write_unit, folder, skeleton, weights, injection, target)
        # PEFT's layers are shared, and a merge takes all cores by itself.
        workers = 1 if injection else cores()
        records = list(_in_order(work, units, workers, progress))
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


def _in_order(
    work: Callable[[int, int, Unit], ShardRecord],
    units: Sequence[Unit],
    workers: int,
    progress: Progress,
) -> Iterator[ShardRecord]:
    """Units side by side, each by one thread; what ends one ends all."""
    if workers == 1:
        for number, unit in enumerate(units, start=1):
            progress.step(unit.label)
            yield work(number, len(units), unit)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = [pool.submit(work, n, len(units), u) for n, u in enumerate(units, start=1)]
        for unit, future in zip(units, futures, strict=True):
            progress.step(unit.label)
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _write_unit(
    folder: Path,
    skeleton: Skeleton,
    weights: Weights,
    injection: Injection | None,
    dtype: torch.dtype,
    number: int,
    count: int,
    unit: Unit,
) -> ShardRecord:
    """The shard of one unit; what the adapter leaves alone is decoded some rows at a time."""
    merged = _merged(skeleton, weights, injection, unit)
    stored = {weights.names.stored[name]: name for name in unit.parameters}
    shapes = {
        own: torch.empty(weights.shape(name), dtype=dtype, device="meta")
        for own, name in stored.items()
    }

    def pieces(own: str) -> Iterator[torch.Tensor]:
        name = stored[own]
        if name in merged:
            yield merged[name].to(dtype)
        else:
            yield from weights.pieces(name, dtype)

    path = folder / f"model-{number:05}-of-{count:05}.safetensors"
    return write_pieces(path, shapes, pieces)


def _merged(
    skeleton: Skeleton, weights: Weights, injection: Injection | None, unit: Unit
) -> Mapping[str, torch.Tensor]:
    """The parameters of a unit that the adapter changes, merged in float32."""
    if injection is None or not any(name in injection.touched for name in unit.parameters):
        return {}
    dense = weights.unit(unit)
    if unit.kind != "layer":
        return merge_outer(injection, unit, dense)
    relative = merge_layer(injection, live_layer(skeleton, injection, unit, dense))
    found = {join(unit.path, name): tensor for name, tensor in relative.items()}
    return {name: tensor for name, tensor in found.items() if name in injection.touched}


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    dense = copy.deepcopy(dict(config))
    dense.pop("quantization_config", None)
    dense.pop("torch_dtype", None)
    dense["dtype"] = str(dtype).removeprefix("torch.")
    return dense


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` by one rename, or goes away with whatever ended the work."""
    folder = partial_folder(out)
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
