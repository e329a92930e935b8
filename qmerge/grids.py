"""Which linears are quantized, and onto what grids: one for all, and overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from qmerge.errors import Fault
from qmerge.formats.writing import OutputFormat
from qmerge.gptq import GridSpec
from qmerge.job import Faults
from qmerge.model.experts import blocks_of
from qmerge.model.skeleton import Skeleton
from qmerge.names import join, matches, module_of
from qmerge.recipe import Recipe

SERVED_GROUPS = (-1, 32, 64, 128)
GPTQMODEL_EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""Names that gptqmodel 7.6 finds packed experts by; Mixtral's on disk are others."""
NUMBERED = re.compile(r"(?<![^.])\d+(?=\.)")
"""In a name, which one of several modules it is: an expert."""


def grids(
    recipe: Recipe,
    targets: frozenset[str],
    spec: GridSpec,
    faults: Faults,
    *,
    head: str,
    tied: bool,
) -> dict[str, GridSpec]:
    """The grids of the linears that are quantized, overrides applied. The head is among them where
    an override names it outright, and cannot be where it is `tied` to the embedding."""
    specs = dict.fromkeys(sorted(targets), spec)
    for text, override in zip(recipe.override, recipe.overrides(), strict=True):
        fitting = [name for name in sorted(targets) if matches(override.pattern, name)]
        if override.pattern == head:
            fitting = [head]
            if tied and not override.skip:
                message = f"{head} is the embedding under a second name, which stays in 16 bits"
                hint = "only a head of its own can be quantized"
                faults.found.append(Fault(where="--override", message=message, hint=hint))
        if not fitting:
            message = f"{text!r} fits no linear that would be quantized"
            hint = f"their names are as {min(targets, default='')}"
            faults.found.append(Fault(where="--override", message=message, hint=hint))
        for name in fitting:
            if override.skip:
                specs.pop(name, None)
                continue
            own = specs.get(name, spec)
            specs[name] = replace(
                own,
                bits=override.bits or own.bits,
                group_size=override.group_size or own.group_size,
            )
    if targets and not specs:
        message = "nothing is left to quantize"
        faults.found.append(Fault(where="--override", message=message))
    return specs


def torn(
    recipe: Recipe,
    skeleton: Skeleton,
    specs: Mapping[str, GridSpec],
    siblings: frozenset[tuple[str, ...]],
) -> list[Fault]:
    """Linears that servers fuse, with different grids: one fault for all layers."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    paths = [skeleton.layer_path(index) for index in range(skeleton.layer_count)]
    for path in paths:
        for group in sorted(siblings):
            for fused in _fused(group):
                names = tuple(join(path, name) for name in fused)
                if len({specs.get(name) for name in names}) > 1:
                    like = tuple(NUMBERED.sub("*", name) for name in fused)
                    found.setdefault(like, []).append(names)
    faults = [_torn(recipe, like, groups, paths) for like, groups in found.items()]
    apart = [
        path
        for path, block in blocks_of(skeleton.model)
        if len({specs.get(join(path, module_of(name))) for name, _ in block.named_parameters()}) > 1
    ]
    if apart:
        more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
        faults.append(
            Fault(
                where="--override",
                message=f"gives experts of {apart[0]}{more}, which servers run together, different"
                " grids",
                hint="let the pattern fit all experts of a block or none: '*.experts.*'",
            )
        )
    return faults


def _torn(
    recipe: Recipe, like: tuple[str, ...], groups: list[tuple[str, ...]], paths: list[str]
) -> Fault:
    """The fault of one kind of siblings, with a pattern that fits all of them where it fits any."""
    layers = [path for path in paths if any(name.startswith(f"{path}.") for name, *_ in groups)]
    where = layers[0] if len(layers) == 1 else f"{len(layers)} layers"
    parent, last = module_of(like[0]), "|".join(name.rpartition(".")[2] for name in like)
    before = "" if len(layers) == len(paths) else f"{module_of(layers[0])}.({_numbers(layers)})."
    inside = f"{before}{parent}." if parent else before
    pattern = ("" if before else r".*\.") + inside.replace(".", r"\.").replace("*", r"\d+")
    return Fault(
        where="--override",
        message=f"gives {' and '.join(like)} of {where}, which servers fuse, different grids",
        hint="let the pattern fit all of them or none, as in"
        f" --override 're:{pattern}({last})={_tearing(recipe, groups[0])}'",
    )


def _numbers(layers: list[str]) -> str:
    return "|".join(path.rpartition(".")[2] for path in layers)


def _tearing(recipe: Recipe, names: tuple[str, ...]) -> str:
    """The settings of the last override that fits some of the siblings only."""
    for text, override in reversed([*zip(recipe.override, recipe.overrides(), strict=True)]):
        if 0 < sum(matches(override.pattern, name) for name in names) < len(names):
            return text.rpartition("=")[2]
    return "SETTINGS"


def _fused(group: tuple[str, ...]) -> list[list[str]]:
    """Siblings of one module."""
    parents: dict[str, list[str]] = {}
    for name in group:
        parents.setdefault(module_of(name), []).append(name)
    return list(parents.values())


def misfits(skeleton: Skeleton, specs: Mapping[str, GridSpec]) -> list[Fault]:
    """Linears whose widths the settings cannot cut into groups or pack into words."""
    linears = skeleton.quantizable()
    uncut: dict[tuple[int, int], str] = {}
    unpacked: dict[tuple[int, int, int], str] = {}
    for name, spec in specs.items():
        width, outs = linears[name].in_features, linears[name].out_features
        if spec.group_size != -1 and width % spec.group_size:
            uncut.setdefault((width, spec.group_size), name)
        if width * spec.bits % 32 or outs * spec.bits % 32 or (spec.bits == 3 and width % 32):
            unpacked.setdefault((width, outs, spec.bits), name)
    faults = [
        Fault(
            where=name,
            message=f"group size {group_size} does not divide the input width {width}",
            hint=f"use --group-size {_fitting_group(linears, specs)}",
        )
        for (width, group_size), name in uncut.items()
    ]
    return faults + [
        Fault(
            where=name,
            message=f"{outs} x {width} weights of {bits} bits do not fill 32-bit words",
            hint=f"no format can hold this layer; use other --bits, or --override '{name}=skip'",
        )
        for (width, outs, bits), name in unpacked.items()
    ]


def _fitting_group(linears: dict[str, Any], targets: Iterable[str]) -> int:
    groups = (group for group in reversed(SERVED_GROUPS) if group > 0)
    return next((g for g in groups if all(linears[n].in_features % g == 0 for n in targets)), -1)


def serving_notes(
    form: OutputFormat, skeleton: Skeleton, specs: Mapping[str, GridSpec]
) -> list[str]:
    """What loaders make of a release whose linears differ, or are experts, or the head."""
    if form == "compressed-tensors":
        return []
    notes = []
    if skeleton.head() in specs:
        notes.append(
            f"transformers has no place for a packed {skeleton.head()} in a {form} release: open"
            " this one with gptqmodel or vLLM, or write it with --format compressed-tensors"
        )
    elif len(set(specs.values())) > 1:
        notes.append(
            f"transformers gives all linears of a {form} release the same bits and groups: open"
            " this one with gptqmodel or vLLM, or write it with --format compressed-tensors"
        )
    parts = [module_of(part) for fusion in skeleton.fusions for part in fusion.parts]
    packed = [part for part in parts if part in specs]
    if packed:
        known = all(part.endswith(GPTQMODEL_EXPERTS) for part in packed)
        notes.append(
            f"transformers leaves the experts of a {form} release random: open this one with"
            f" {'gptqmodel or ' if known else ''}vLLM, or write it with --format compressed-tensors"
        )
    return notes
