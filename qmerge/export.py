"""Single stages with a dense result: a decoded base, or a base with its adapter merged.

Streamed unit by unit; nothing appears at the given place before all of it is on disk.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from qmerge.adapters import Change
from qmerge.errors import InputError, PlanError, StorageError
from qmerge.formats.stacked import Stack
from qmerge.heap import give_back
from qmerge.job import Faults, check_out, partial_folder
from qmerge.model.opening import fused_only, open_model
from qmerge.model.reshape import Shape, restate, vocabulary_of
from qmerge.model.skeleton import Skeleton
from qmerge.model.weights import Weights, model_dtype
from qmerge.names import Unit
from qmerge.plan import as_trained
from qmerge.progress import Progress, Silent
from qmerge.recipe import Dtype, Recipe
from qmerge.release import side_files_of
from qmerge.stages.merge import merge_module
from qmerge.storage.shards import (
    ShardRecord,
    copy_file,
    sync_folder,
    write_index,
    write_json,
    write_pieces,
)
from qmerge.texts import (
    check_tokens,
    has_tokenizer,
    load_tokenizer,
    stray_templates,
    tokenizer_home,
    tokenizer_notes,
)
from qmerge.tuning import open_tuning, tuning_notes

MERGED_AT_ONCE = 1 << 19
"""Elements that are merged at a time where rows are merged one by one: what stays in cache."""
CHECKED_AT_ONCE = 1 << 18
"""Elements that are looked at and then written, while they are in cache."""


def export(
    recipe: Recipe, *, dtype: Dtype | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the recipe's base, decoded and with its adapters merged in float32, as a dense
    checkpoint at its `out`. Nothing else of the recipe is looked at.

    `dtype` None is the model's own 16-bit dtype. Each weight is rounded once, when it is written;
    one that is stored in that dtype and not touched keeps its bytes. Returns what was written.
    Raises `PlanError` with every fault of what is to be merged.
    """
    progress = progress or Silent()
    check_out(recipe.out)
    source = _open(recipe)
    weights, change = source.weights, source.change
    target = getattr(torch, dtype) if dtype else model_dtype(weights.checkpoint.config)
    units = source.skeleton.units()
    with _staged(recipe.out) as folder:
        progress.stage("write", len(units))
        work = partial(_write_unit, folder, source, target)
        records = list(_in_order(work, units, cores(), progress))
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
    notes += stray_templates(home, recipe.trained())
    if home != recipe.base:
        with faults.at("tokenizer"):
            tokenizer = load_tokenizer(home, trust_remote_code=trust)
            rows = vocabulary_of(shape.skeleton)
            check_tokens(tokenizer, home, recipe.base, rows, trust=trust)
            notes += tokenizer_notes(tokenizer, home, recipe.base, trust=trust)
    elif not has_tokenizer(home, trust_remote_code=trust):
        notes.append(f"{home} holds no tokenizer, and neither will {recipe.out}")
    if faults.found:
        raise PlanError(faults.found)
    if tuning:
        notes += tuning_notes(tuning, recipe.base)
    weights = shape.fit(weights)
    stacks = {**weights.stacks, **fused_only(shape.skeleton, weights)}
    return _Source(
        skeleton=shape.skeleton,
        weights=replace(weights, stacks=stacks),
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
    """The shard of one unit, made some rows at a time where that can be."""
    weights, merged = source.weights, _Merged(source, unit, dtype)
    stored = {weights.names.to_write(name): name for name in unit.parameters}
    stacks = {own: s for own, s in weights.stacks.items() if s.experts[0][0] in stored}

    def pieces(own: str) -> Iterator[torch.Tensor]:
        if own in stacks:
            return stacks[own].pieces(lambda name: merged.whole(stored[name]))
        return merged.pieces(stored[own])

    def checked(own: str) -> Iterator[torch.Tensor]:
        return _finite(own, pieces(own))

    path = folder / f"model-{number:05}-of-{count:05}.safetensors"
    record = write_pieces(path, _shapes(weights, stored, stacks, dtype), checked)
    if merged.as_a_whole:
        give_back()  # each thread has a heap of its own
    return record


class _Merged:
    """The parameters of one unit as they are written, in `dtype`, the adapters merged in float32.

    What is plain LoRA is merged while it is decoded, some rows at a time; whatever else an adapter
    changes, one module at a time.
    """

    def __init__(self, source: _Source, unit: Unit, dtype: torch.dtype) -> None:
        self._source, self._unit, self._dtype = source, unit, dtype
        self._weights, change = source.weights, source.change
        by_rows = {}
        with source.merging:
            for name in unit.parameters:
                if change and name in change.touched:
                    turned = name in source.weights.turned
                    by_rows[name] = None if turned else change.row_merger(name)
        self._by_rows = {name: merge for name, merge in by_rows.items() if merge is not None}
        self.as_a_whole = by_rows.keys() - self._by_rows.keys()
        """Parameters that are merged with all of their module."""
        self._waiting: dict[str, torch.Tensor] = {}

    def whole(self, parameter: str) -> torch.Tensor:
        """All of one parameter."""
        if parameter in self._by_rows:
            return torch.cat([*self._rows(parameter)])
        if parameter in self.as_a_whole:
            found = self._merge(parameter)
        else:
            found = self._weights.tensor(parameter)
        return self._weights.on_disk(parameter, found).to(self._dtype)

    def pieces(self, parameter: str) -> Iterator[torch.Tensor]:
        """The same, some rows at a time."""
        if parameter in self._by_rows:
            return self._rows(parameter)
        if parameter in self.as_a_whole or parameter in self._weights.turned:
            return iter([self.whole(parameter)])
        return self._weights.pieces(parameter, self._dtype)

    def _rows(self, parameter: str) -> Iterator[torch.Tensor]:
        merge, start = self._by_rows[parameter], 0
        for rows in self._weights.pieces(parameter, torch.float32, MERGED_AT_ONCE):
            yield merge(start, rows).to(self._dtype)
            start += len(rows)

    def _merge(self, parameter: str) -> torch.Tensor:
        """A parameter that its module is merged for; the module's others wait until they are asked
        for, and each is let go as it is written."""
        source, waiting = self._source, self._waiting
        assert source.change is not None
        if parameter not in waiting:
            with source.merging:
                found = merge_module(
                    source.skeleton, source.change, self._unit, parameter, source.weights
                )
                waiting |= {n: found[n].to(self._dtype) for n in self.as_a_whole & found.keys()}
        return waiting.pop(parameter)


def _finite(name: str, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The values of a tensor, some at a time; InputError where one is not finite.

    A sum shows that, in the cache from which they are written and in a twentieth of the time that
    `isfinite` takes; one that overflows by itself is looked at again.
    """
    for piece in pieces:
        for part in torch.split(piece.reshape(-1), CHECKED_AT_ONCE):
            if not math.isfinite(part.sum().item()):
                _refuse_infinite(name, part)
            yield part


def _refuse_infinite(name: str, part: torch.Tensor) -> None:
    if part.isinf().any() and not part.isnan().any() and part.dtype == torch.float16:
        raise InputError(
            f"{name}: holds values beyond 65504, which float16 cannot",
            hint="use --dtype bfloat16 or float32",
        )
    if not part.isfinite().all():
        raise InputError(
            f"{name}: holds values that are not finite",
            hint="the training or the merge that wrote this checkpoint failed on this layer",
        )


def _shapes(
    weights: Weights, stored: Mapping[str, str], stacks: Mapping[str, Stack], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a unit is written as, on the meta device; experts of a stack are one tensor."""
    inside = {name for stack in stacks.values() for names in stack.experts for name in names}
    widths = {own: weights.shape(stored[stack.experts[0][0]])[1] for own, stack in stacks.items()}
    shapes = {own: stack.shape(widths[own]) for own, stack in stacks.items()}
    meta = {own: torch.empty(shape, dtype=dtype, device="meta") for own, shape in shapes.items()}
    for own in stored.keys() - inside:
        name = stored[own]
        single = torch.empty(weights.shape(name), dtype=dtype, device="meta")
        meta[own] = weights.on_disk(name, single)
    return meta


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
