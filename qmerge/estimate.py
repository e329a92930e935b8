"""What a job takes: bytes in and out, memory and disk, from shapes alone."""

from __future__ import annotations

from qmerge.errors import Fault
from qmerge.formats.writing import packed_bytes
from qmerge.job import Job, arm_names
from qmerge.model.skeleton import Skeleton, text_config
from qmerge.names import WEIGHT, Unit, module_of
from qmerge.recipe import Recipe
from qmerge.results import PlannedUnit, PlanSummary


def token_bytes(skeleton: Skeleton) -> int:
    """Bytes of activations per token at a layer's widest point: what the MLP holds at once."""
    widest = max(module.out_features for module in skeleton.linears().values())
    hidden = int(text_config(skeleton.model.config).hidden_size)
    return 4 * (8 * hidden + 5 * widest)


def waiting_bytes(skeleton: Skeleton) -> int:
    """Bytes per token of a forward that waits before a linear: what goes into the layer and into
    the module, and about half of what the layer's linears put out, which the module still names."""
    prefix = skeleton.layer_path(0) + "."
    outs = sum(m.out_features for name, m in skeleton.linears().items() if name.startswith(prefix))
    return 4 * (2 * int(text_config(skeleton.model.config).hidden_size) + outs // 2)


def layer_bytes(skeleton: Skeleton) -> int:
    """Bytes of work on one layer's weights: decoded, merged and quantized copies, and Hessians."""
    parameters = sum(
        p.numel() for p in skeleton.model.get_submodule(skeleton.layer_path(0)).parameters()
    )
    widest = max(module.in_features for module in skeleton.linears().values())
    return 4 * (4 * int(parameters) + 4 * widest * widest)


def working_bytes(skeleton: Skeleton, tokens: int) -> int:
    """Bytes of one layer at work on a micro-batch."""
    return layer_bytes(skeleton) + tokens * token_bytes(skeleton)


def summarize(recipe: Recipe, job: Job | None, faults: tuple[Fault, ...]) -> PlanSummary:
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
        memory_bytes=_memory_bytes(job),
        notes=job.notes,
        renamed=dict(job.change.renamed) if job.change is not None else {},
        left_out=job.change.left_out if job.change is not None else (),
    )


def _adapter(job: Job) -> str:
    told = [f"{each.path} ({each.kind}, rank {each.rank})" for each in job.adapters]
    if job.recipe.partial_state is not None:
        told.append(str(job.recipe.partial_state))
    return ", ".join(told)


def _planned(job: Job, unit: Unit) -> PlannedUnit:
    """One unit's bytes: read from the base and the original, written to the release."""
    modules = {f"{unit.path}.{name}" for name in job.targets_of(unit)}
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
    return sum(_planned(job, u).bytes_out for u in units) * len(job.strategies) + _stream_bytes(job)


def _stream_bytes(job: Job) -> int:
    """Two generations of hidden states: arms on evaluation text, releases on calibration text."""
    hidden = int(text_config(job.skeleton.model.config).hidden_size)
    evaluated = sum(corpus.tokens.numel() for corpus in job.evaluation) * len(arm_names(job))
    calibrated = job.settings.streams * job.calibration.tokens.numel() * len(job.strategies)
    return 2 * 4 * hidden * (evaluated + calibrated)


def _memory_bytes(job: Job) -> int:
    windows, length = job.calibration.tokens.shape
    working = working_bytes(job.skeleton, job.at_once * length)
    return working + job.waiting * job.settings.streams * windows * length * waiting_bytes(
        job.skeleton
    )
