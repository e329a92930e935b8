"""What a job takes: bytes in and out, memory and disk from shapes alone, and time from counts of
the work and how fast this machine is at it.

O, I: out and in features; H: hidden width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from qmerge import machine
from qmerge.errors import Fault
from qmerge.formats.writing import packed_bytes
from qmerge.job import NOISE_WINDOWS, Job, arm_names, existing, partial_folder
from qmerge.measure.gate import limits_of, told_limits
from qmerge.model.experts import HESSIAN_BYTES, blocks_of
from qmerge.model.frame import ROWS_AT_ONCE
from qmerge.model.paused import Held
from qmerge.model.skeleton import Skeleton
from qmerge.names import WEIGHT, Unit, join, module_of
from qmerge.recipe import Recipe
from qmerge.results import PlannedUnit, PlanSummary
from qmerge.texts import LENS_TOKENS, LOGIT_BYTES

PAPERS_BYTES = 300 << 10
"""Journal, card and report of a release: a small model's with two corpora."""
PAPERS_SECONDS = 3.0
"""Digests of small files, the report's plots and the last rename, on one core of 2023."""
BESIDE = 128 << 20
"""Bytes that a run of any size takes: what the allocator keeps, digests, the report's plots."""
WALKED = ("dequantize", "evaluate", "requantize", "write")
"""Parts of the time that grow with the layers walked."""
DECODING = 20
"""Passes over a weight that decoding and merging it take."""


def token_bytes(skeleton: Skeleton) -> int:
    """Bytes of activations per token at a layer's widest point: what the MLP holds at once."""
    widest = max(module.out_features for module in skeleton.linears().values())
    return 4 * (2 * skeleton.hidden_size + 5 * widest)


def waiting_bytes(skeleton: Skeleton, length: int, siblings: Collection[tuple[str, ...]]) -> Held:
    """Bytes per token of forwards that wait before the first of linears that are `siblings`."""
    experts = {module_of(part) for fusion in skeleton.fusions for part in fusion.parts}
    if not experts:
        with suppress(RuntimeError):
            return machine.held_bytes(skeleton, length, {group[0] for group in siblings})
    # What goes into the layer and into the module, and about half of what the layer's linears put
    # out. Experts work in turn: what goes into all of them is held, and what came out so far.
    prefix = skeleton.layer_path(0) + "."
    outs = sum(
        linear.out_features
        for name, linear in skeleton.linears().items()
        if name.startswith(prefix) and name not in experts
    )
    alone = 4 * ((4 if experts else 2) * skeleton.hidden_size + outs // 2)
    return Held(alone, 2 * alone)


def layer_bytes(skeleton: Skeleton) -> int:
    """Bytes of work on the largest layer's weights: decoded, merged and quantized copies, Hessians;
    for experts also the fused copy that an adapter works on, and the Hessians of many at once."""
    widest = max(module.in_features for module in skeleton.linears().values())
    sizes = []
    for index in range(skeleton.layer_count):
        layer = skeleton.model.get_submodule(skeleton.layer_path(index))
        numbers = 4 * sum(parameter.numel() for parameter in layer.parameters())
        for _, block in blocks_of(layer):
            numbers += sum(parameter.numel() for parameter in block.parameters())
            numbers += min(len(block.experts) * widest * widest, HESSIAN_BYTES // 4)
        sizes.append(numbers)
    return 4 * (int(max(sizes)) + 4 * int(widest) ** 2)


def walking_bytes(skeleton: Skeleton, streams: int, tokens: int, held: int) -> int:
    """Bytes of one layer where the forwards of all streams wait with `held` bytes: its linears are
    solved, or a micro-batch of `tokens` goes on to the next."""
    weights, moving = layer_bytes(skeleton), tokens * token_bytes(skeleton)
    return max(weights, streams * weights // 4 + (1 + streams) * moving // 2) + held


def summarize(
    recipe: Recipe, job: Job | None, faults: tuple[Fault, ...], done: Collection[str] = ()
) -> PlanSummary:
    """`done` are the units that a stopped run has finished."""
    listing = tuple(f"{fault.where}: {fault.message}" for fault in faults)
    hints = tuple(fault.hint or "" for fault in faults)
    if job is None:
        return PlanSummary(
            base=str(recipe.base),
            adapter=", ".join(recipe.adapter),
            out=str(recipe.out),
            faults=listing,
            hints=hints,
        )
    units = tuple(_planned(job, unit) for unit in job.skeleton.units())
    out_bytes = sum(unit.bytes_out for unit in units) * len(job.strategies)
    spec = job.settings.spec
    return PlanSummary(
        base=f"{recipe.base} ({job.base.format.name})",
        adapter=_adapter(job),
        original=str(recipe.original) if recipe.original else None,
        out=str(recipe.out),
        strategies=job.strategies,
        quantizer=f"{spec.bits} bits, group {spec.group_size}, "
        f"{'symmetric' if spec.symmetric else 'asymmetric'}, act-order {job.settings.order}, "
        f"format {job.settings.format}",
        limits=tuple(told_limits(limits_of(recipe))),
        corpora=tuple(
            f"{c.name}: {c.tokens.shape[0]} x {c.tokens.shape[1]} tokens of {c.source}"
            for c in (job.calibration, *job.evaluation)
        ),
        at_once=job.at_once,
        waiting=job.waiting,
        units=units,
        bytes_in=sum(unit.bytes_in for unit in units),
        bytes_out=out_bytes,
        disk_bytes=disk_bytes(job),
        memory_bytes=memory_bytes(job),
        device_bytes=memory_bytes(job) if job.device.type != "cpu" else 0,
        device=str(job.device),
        seconds=seconds(job, done),
        goes_on=_goes_on(job, done),
        notes=job.notes,
        renamed=dict(job.change.renamed) if job.change is not None else {},
        left_out=job.change.left_out if job.change is not None else (),
        faults=listing,
        hints=hints,
    )


def _goes_on(job: Job, done: Collection[str]) -> str:
    units = len(job.skeleton.units())
    where = partial_folder(job.recipe.out)
    return f"goes on from {where}: {len(done)} of {units} units are done" if done else ""


def _adapter(job: Job) -> str:
    told = [f"{each.path} ({each.kind}, rank {each.rank})" for each in job.adapters]
    if job.recipe.partial_state is not None:
        told.append(str(job.recipe.partial_state))
    return ", ".join(told)


def _planned(job: Job, unit: Unit) -> PlannedUnit:
    """One unit's bytes: read from the base and the original, written to the release."""
    modules = {join(unit.path, name) for name in job.targets_of(unit)}
    bytes_in = bytes_out = 0
    for parameter in unit.parameters:
        bytes_in += job.base.stored_bytes(parameter)
        bytes_in += job.original.stored_bytes(parameter) if job.original else 0
        shape = job.base.shape(parameter)
        if module_of(parameter) in modules and parameter.endswith(WEIGHT):
            own = job.specs[module_of(parameter)]
            bytes_out += packed_bytes(shape, own.bits, own.group_size)
        else:
            bytes_out += job.base.dense_bytes(parameter)
    return PlannedUnit(
        label=unit.label,
        quantized=len(modules),
        dense=len(unit.parameters) - len(modules),
        adapted=sum(name in job.touched for name in unit.parameters),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
    )


def disk_bytes(job: Job) -> int:
    """What a run needs beside its inputs: the releases in the making and the hidden states."""
    units = job.skeleton.units()
    beside = sum(file.stat().st_size for file in job.base.checkpoint.side_files()) + PAPERS_BYTES
    weights = sum(_planned(job, unit).bytes_out for unit in units)
    spilled = 2 * 4 * job.skeleton.hidden_size * sum(_stream_tokens(job))
    return weights * len(job.strategies) + beside + spilled


def _stream_tokens(job: Job) -> tuple[int, int]:
    """Tokens whose hidden states are kept: of arms on evaluation text, of releases and what they
    aim at on calibration text. On disk there are two generations of them."""
    evaluated = 0
    for corpus in job.evaluation:
        windows, length = corpus.tokens.shape
        evaluated += length * (windows * len(arm_names(job)) + min(windows, NOISE_WINDOWS))
    calibrated = job.settings.streams * job.calibration.tokens.numel()
    return evaluated, calibrated * len(job.strategies)


def memory_bytes(job: Job) -> int:
    """At the widest point: a layer's weights with the calibration text in it, or the scores."""
    windows, length = job.calibration.tokens.shape
    at_once, streams = min(job.at_once, windows), job.settings.streams
    held = windows * job.held.of(streams) if job.waiting else at_once * streams * job.held.alone
    layer = walking_bytes(job.skeleton, streams, at_once * length, length * held)
    return BESIDE + _seen_bytes(job) + max(layer, _tower_bytes(job), _scoring_bytes(job))


def memory_notes(job: Job) -> Iterator[str]:
    """A note where even the smallest pieces take more memory than was to be planned for."""
    needed = memory_bytes(job)
    if needed > job.recipe.memory:
        yield (
            f"--memory is {_mib(job.recipe.memory)}, and the run needs about {_mib(needed)} beside"
            " the libraries"
        )


def _scoring_bytes(job: Job) -> int:
    """Logits of all arms on some windows, and the slices of their heads that make them."""
    arms, rows = len(arm_names(job)), min(ROWS_AT_ONCE, _vocabulary(job))
    windows, length = max((corpus.tokens.shape for corpus in job.evaluation), key=math.prod)
    at_once = min(windows, max(1, LOGIT_BYTES // (4 * rows * length * arms)))
    return 4 * rows * arms * (at_once * length + job.skeleton.hidden_size)


def _seen_bytes(job: Job) -> int:
    """Bytes that images take throughout the run: what the processor made of them, and what the
    layers of each stream are called with, window by window; for text alone all are called alike."""
    inputs = job.calibration.inputs
    if not inputs:
        return 0
    windows, length = job.calibration.tokens.shape
    called = machine.called_bytes(job.skeleton, length)
    given = sum(value.nbytes for own in inputs for value in own.values())
    return given + windows * job.settings.streams * len(job.strategies) * called


def _tower_bytes(job: Job) -> int:
    """Bytes of the vision tower, which is in memory until the first layer begins."""
    if not job.calibration.inputs:
        return 0
    parameters = job.skeleton.parameters()
    return 4 * sum(parameters[name].numel() for name in job.skeleton.tower())


def room_faults(job: Job) -> list[Fault]:
    """Disk and memory that this machine does not have. What a stopped run left is used again."""
    faults = []
    out, needed, memory = job.recipe.out, disk_bytes(job), memory_bytes(job)
    left, free = _bytes_in(partial_folder(out)), machine.disk_free(out)
    if free + left < needed:
        faults.append(
            Fault(
                where="--out",
                message=f"the run needs about {_mib(needed)} of disk, {_mib(free)} are free in"
                f" {existing(out.absolute().parent)}",
                hint="free some space, or give an --out on another disk",
            )
        )
    for device in dict.fromkeys((torch.device("cpu"), job.device)):
        size = machine.memory_size(device)
        if size < memory:
            faults.append(
                Fault(
                    where="--memory",
                    message=f"the run needs about {_mib(memory)}, {_owner(device)} {_mib(size)}",
                    hint="give a smaller --memory, or a smaller --sequence-length",
                )
            )
    return faults


def _bytes_in(folder: Path) -> int:
    """Bytes of a folder's files, some of which another run may be removing."""
    found = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            found += file.lstat().st_size
    return found


def _owner(device: torch.device) -> str:
    return "this machine has" if device.type == "cpu" else f"{device} has"


def _mib(count: int) -> str:
    return f"{count >> 20} MiB"


def seconds(job: Job, done: Collection[str] = ()) -> dict[str, float]:
    """Seconds of a run by its parts, named as the timings of a report are, without what went into
    the layers that are done."""
    units = [unit.label for unit in job.skeleton.units() if unit.kind == "layer"]
    left = sum(unit not in done for unit in units) / len(units)
    whole = _whole_seconds(job)
    return {part: took * (left if part in WALKED else 1) for part, took in whole.items()}


def _whole_seconds(job: Job) -> dict[str, float]:
    device, layers, hidden = job.device, job.skeleton.layer_count, job.skeleton.hidden_size
    reduced = _reduced(job)
    forward = machine.layer_seconds(job.skeleton, job.calibration.tokens.shape[1], device)
    written = machine.digest_seconds() + machine.disk_seconds(job.recipe.out)
    evaluated, calibrated = _stream_tokens(job)
    spilled = 4 * hidden * written
    logits = sum(c.tokens.numel() for c in job.evaluation) * _vocabulary(job)
    a_logit = machine.scoring_seconds(device) + hidden * machine.product_seconds(device)
    weights = sum(p.numel() for p in job.skeleton.parameters().values())
    opened = 1 + (job.original is not None) + (job.previous is not None) + len(job.strategies)
    a_weight = DECODING * machine.pass_seconds(device)
    out_bytes = sum(_planned(job, unit).bytes_out for unit in job.skeleton.units())
    looked_at = layers * LENS_TOKENS * _vocabulary(job)
    return {
        "dequantize": a_weight * weights * opened,
        "evaluate": layers * evaluated * (forward + spilled)
        + len(arm_names(job)) * looked_at * a_logit,
        "requantize": layers * calibrated * (_passes(job) * forward * reduced + spilled)
        + _solving(job, reduced),
        "score": len(arm_names(job)) * logits * a_logit,
        "write": out_bytes * len(job.strategies) * written,
        "report": PAPERS_SECONDS,
    }


def _reduced(job: Job) -> float:
    """What calibration takes of its time in float32."""
    if not job.settings.reduced:
        return 1.0
    return machine.reduced_seconds(job.device) / machine.product_seconds(job.device)


def _solving(job: Job, reduced: float) -> float:
    """Seconds of gathering moments and rounding, all layers and strategies."""
    product = machine.product_seconds(job.device)
    rounding = machine.rounding_seconds(job.device)
    tokens, taken = job.calibration.tokens.numel(), 0.0
    for rows_O, width_I in _groups(job):
        moments = width_I**2 / 2  # half of a Hessian's products
        if job.settings.asymmetric:
            # Of what the reference's inputs differ by, or the residual stream behind the linear.
            moments += 2 * rows_O * width_I if rows_O == job.skeleton.hidden_size else width_I**2
        solves = machine.PRODUCTS * rows_O * width_I**2 + width_I**3
        taken += product * (tokens * moments * reduced + solves)
        taken += width_I * (rounding.per_column + rounding.per_weight * rows_O)
    return taken * len(job.strategies)


def _groups(job: Job) -> list[tuple[int, int]]:
    """Stacked out features and in features of linears that are quantized together, as far as names
    tell: those of one module and one width."""
    linears = job.skeleton.quantizable()
    stacked: dict[tuple[str, int], int] = defaultdict(int)
    for name in job.specs:
        stacked[module_of(name), linears[name].in_features] += linears[name].out_features
    return [(rows_O, width_I) for (_, width_I), rows_O in stacked.items()]


def _passes(job: Job) -> float:
    """Forwards of a layer on calibration text: one where forwards may wait; else each of some four
    groups of linears takes another, half-way on average."""
    return 1.0 if job.waiting else 3.0


def _vocabulary(job: Job) -> int:
    """Rows of the output embedding."""
    return int(job.skeleton.model.get_output_embeddings().weight.shape[0])
