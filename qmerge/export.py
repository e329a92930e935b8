"""Single stages with a dense result: a decoded base, or a base with its adapter merged.

Streamed unit by unit; nothing appears at the given place before all of it is on disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from qmerge.adapters import Change
from qmerge.errors import InputError, PlanError, StorageError
from qmerge.formats.stacked import Stack
from qmerge.heap import give_back
from qmerge.job import Faults
from qmerge.job import partial as partial_folder
from qmerge.model.opening import open_model
from qmerge.model.reshape import Shape, restate, vocabulary_of
from qmerge.model.skeleton import Skeleton
from qmerge.model.weights import Weights, model_dtype
from qmerge.names import Unit, join
from qmerge.plan import as_trained
from qmerge.progress import Progress, Silent
from qmerge.recipe import Recipe
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
from qmerge.texts import check_tokens, load_tokenizer, tokenizer_home
from qmerge.tuning import open_tuning, tuning_notes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    recipe: Recipe, *, dtype: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the recipe's base, decoded and with its adapters merged in float32, as a dense
    checkpoint at its `out`. Nothing else of the recipe is looked at.

    `dtype` None is the model's own 16-bit dtype. Each weight is rounded once, when it is written;
    one that is stored in that dtype and not touched keeps its bytes. Returns what was written.
    Raises `PlanError` with every fault of what is to be merged.
    """
    progress = progress or Silent()
    if recipe.out.exists():
        raise InputError(f"{recipe.out} exists", hint="name a folder that does not exist yet")
    source = _open(recipe)
    weights, change = source.weights, source.change
    target = DTYPES[dtype] if dtype else model_dtype(weights.checkpoint.config)
    units = source.skeleton.units()
    with _staged(recipe.out) as folder:
        progress.stage("write", len(units))
        work = partial(_write_unit, folder, source, target)
        # A merge holds whole units: one is decoded or written while another is merged.
        workers = min(2, cores()) if change else cores()
        records = list(_in_order(work, units, workers, progress))
        write_index(folder, records)
        write_json(folder / "config.json", _config(source, target))
        for relative, path in side_files_of(weights.checkpoint, source.tokenizer).items():
            (folder / relative).parent.mkdir(exist_ok=True)
            copy_file(path, folder / relative)
    return {
        "out": str(recipe.out),
        "source_format": weights.format.name,
        "dtype": str(target).removeprefix("torch."),
        "tensors": sum(len(record.tensors) for record in records),
        "bytes": sum(record.nbytes for record in records),
        "merged": sorted(change.touched & weights.names.stored.keys()) if change else [],
        "left_out": list(change.left_out) if change else [],
        "renamed": dict(change.renamed) if change else {},
        "notes": list(source.notes),
    }


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A base, opened, and what is to be merged into it."""

    skeleton: Skeleton
    weights: Weights
    change: Change | None
    tokenizer: Path
    notes: tuple[str, ...]
    merging: Lock = field(default_factory=Lock)
    """PEFT's layers are shared by those that are copied from them."""


def _open(recipe: Recipe) -> _Source:
    faults, trust = Faults(), recipe.trust_remote_code
    skeleton, weights = open_model(recipe.base, trust_remote_code=trust)
    weights, loaded = as_trained(recipe, skeleton, weights)
    notes = [*loaded.notes]
    tuning = open_tuning(recipe, skeleton, weights, faults)
    shape = tuning.shape if tuning else Shape(skeleton=skeleton)
    home = tokenizer_home(recipe.base, *recipe.trained())
    if home != recipe.base:
        with faults.at("tokenizer"):
            tokenizer = load_tokenizer(home, trust_remote_code=trust)
            rows = vocabulary_of(shape.skeleton)
            check_tokens(tokenizer, home, recipe.base, rows, trust=trust)
    if faults.found:
        raise PlanError(faults.found)
    if tuning:
        notes += tuning_notes(tuning, recipe.base)
    return _Source(
        skeleton=shape.skeleton,
        weights=shape.fit(weights),
        change=tuning.change if tuning else None,
        tokenizer=home,
        notes=tuple(notes),
    )


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
    share = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
    try:
        futures = [pool.submit(work, n, len(units), u) for n, u in enumerate(units, start=1)]
        for unit, future in zip(units, futures, strict=True):
            progress.step(unit.label)
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _write_unit(
    folder: Path, source: _Source, dtype: torch.dtype, number: int, count: int, unit: Unit
) -> ShardRecord:
    """The shard of one unit; what the adapter leaves alone is decoded some rows at a time."""
    weights, merged = source.weights, _merged(source, unit)
    changed = frozenset(merged)
    stored = {weights.names.to_write(name): name for name in unit.parameters}
    stacks = {own: s for own, s in weights.stacks.items() if s.experts[0][0] in stored}

    def whole(own: str) -> torch.Tensor:
        name = stored[own]
        # Let go as it is written; asking twice is an error and not the base's own weight.
        found = merged.pop(name) if name in changed else weights.tensor(name)
        return weights.on_disk(name, found).to(dtype)

    def pieces(own: str) -> Iterator[torch.Tensor]:
        if own in stacks:
            return stacks[own].pieces(whole)
        if stored[own] in changed or stored[own] in weights.turned:
            return iter([whole(own)])
        return weights.pieces(stored[own], dtype)

    def held(own: str) -> Iterator[torch.Tensor]:
        # Codes times steps of 16 bits do not come near; looking at them all would cost time.
        packed = own in stored and weights.is_quantized(stored[own])
        return pieces(own) if packed or dtype != torch.float16 else _held(own, pieces(own))

    path = folder / f"model-{number:05}-of-{count:05}.safetensors"
    record = write_pieces(path, _shapes(weights, stored, stacks, dtype), held)
    if source.change is not None:
        give_back()  # each thread has a heap of its own
    return record


def _held(name: str, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The pieces of a tensor in float16; InputError where a value was beyond it."""
    for piece in pieces:
        if piece.numel() and any(bool(end.isinf()) for end in piece.aminmax()):
            raise InputError(
                f"{name}: holds values beyond 65504, which float16 cannot",
                hint="use --dtype bfloat16 or float32",
            )
        yield piece


def _shapes(
    weights: Weights, stored: Mapping[str, str], stacks: Mapping[str, Stack], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a unit is written as, on the meta device; experts that were fused are so again."""
    inside = {name for stack in stacks.values() for names in stack.experts for name in names}
    shapes = {own: weights.checkpoint.tensors[own].shape for own in stacks}
    meta = {own: torch.empty(shape, dtype=dtype, device="meta") for own, shape in shapes.items()}
    for own in stored.keys() - inside:
        name = stored[own]
        single = torch.empty(weights.shape(name), dtype=dtype, device="meta")
        meta[own] = weights.on_disk(name, single)
    return meta


def _merged(source: _Source, unit: Unit) -> dict[str, torch.Tensor]:
    """The parameters of a unit that the adapters change, merged in float32."""
    change = source.change
    if change is None or not any(name in change.touched for name in unit.parameters):
        return {}
    dense = source.weights.unit(unit)
    with source.merging:
        if unit.kind != "layer":
            found = merge_outer(change, unit, dense)
        else:
            live = live_layer(source.skeleton, change, unit, dense, taken=True)
            dense.clear()  # some kinds merge into new tensors: the layer alone has the old ones
            relative = merge_layer(change, live)
            found = {join(unit.path, name): tensor for name, tensor in relative.items()}
    return {name: tensor for name, tensor in found.items() if name in change.touched}


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _config(source: _Source, dtype: torch.dtype) -> dict[str, Any]:
    dense = restate(source.weights.checkpoint.config, source.skeleton)
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
    except FileExistsError as error:
        raise InputError(
            f"{folder} is there: a run that was killed left it, or another one is at work",
            hint="remove it where no other is; this command begins anew",
        ) from error
    except OSError as error:
        raise StorageError(
            f"{folder}: {error.strerror}", hint="give a place that can be written to"
        ) from error
    try:
        yield folder
        sync_folder(folder)
        folder.rename(out)
        sync_folder(out.absolute().parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
