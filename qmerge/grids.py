"""Which linears are quantized, and onto what grids: one for all, and overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qmerge.errors import Fault
from qmerge.formats.gptq import served_together
from qmerge.gptq import GridSpec
from qmerge.job import Faults
from qmerge.model.experts import blocks_of
from qmerge.model.skeleton import Skeleton
from qmerge.names import WEIGHT, join, matches, module_of
from qmerge.recipe import OutputFormat, Recipe
from qmerge.results import LEFT_BESIDE

SERVED_GROUPS = (-1, 32, 64, 128)
RANDOM = "transformers leaves the experts of a {} release random"
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
    targets: frozenset[str],
) -> list[Fault]:
    """Linears that servers fuse, with different grids: one fault for all layers. What is no target,
    no override made so."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    paths = [skeleton.layer_path(index) for index in range(skeleton.layer_count)]
    for path in paths:
        for group in sorted(siblings):
            for fused in served_together(group):
                names = tuple(join(path, name) for name in fused)
                if len({specs.get(name) for name in names if name in targets}) > 1:
                    like = tuple(NUMBERED.sub("*", name) for name in fused)
                    found.setdefault(like, []).append(names)
    faults = [_torn(recipe, like, groups, paths) for like, groups in found.items()]
    apart = []
    for path, block in blocks_of(skeleton.model):
        experts = {join(path, module_of(name)) for name, _ in block.named_parameters()}
        if len({specs.get(name) for name in experts & targets}) > 1:
            apart.append(path)
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


def beside(
    skeleton: Skeleton, targets: frozenset[str], siblings: frozenset[tuple[str, ...]]
) -> list[str]:
    """What is no target, and is fused by servers with linears that are; said once."""
    found: dict[tuple[str, ...], None] = {}
    for index in range(skeleton.layer_count):
        path = skeleton.layer_path(index)
        for group in sorted(siblings):
            for names in served_together(join(path, name) for name in group):
                dense = [name.rpartition(".")[2] for name in names if name not in targets]
                if 0 < len(dense) < len(names):
                    found[tuple(dense)] = None
    return [
        f"{LEFT_BESIDE}{' and '.join(names)}; a server that fuses them with those cannot load this"
        " release"
        for names in found
    ]


def _torn(
    recipe: Recipe, like: tuple[str, ...], groups: list[tuple[str, ...]], paths: list[str]
) -> Fault:
    """The fault of one kind of siblings, with a pattern that fits all of them where it fits any."""
    layers = [path for path in paths if any(name.startswith(f"{path}.") for name, *_ in groups)]
    where = layers[0] if len(layers) == 1 else f"{len(layers)} layers"
    parent, last = module_of(like[0]), "|".join(name.rpartition(".")[2] for name in like)
    numbers = "|".join(path.rpartition(".")[2] for path in layers)
    before = "" if len(layers) == len(paths) else f"{module_of(layers[0])}.({numbers})."
    inside = f"{before}{parent}." if parent else before
    pattern = ("" if before else r".*\.") + inside.replace(".", r"\.").replace("*", r"\d+")
    return Fault(
        where="--override",
        message=f"gives {' and '.join(like)} of {where}, which servers fuse, different grids",
        hint="let the pattern fit all of them or none, as in"
        f" --override 're:{pattern}({last})={_tearing(recipe, groups[0])}'",
    )


def _tearing(recipe: Recipe, names: tuple[str, ...]) -> str:
    """The settings of the last override that fits some of the siblings only."""
    for text, override in reversed([*zip(recipe.override, recipe.overrides(), strict=True)]):
        if 0 < sum(matches(override.pattern, name) for name in names) < len(names):
            return text.rpartition("=")[2]
    return "SETTINGS"


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


@dataclass(frozen=True, kw_only=True)
class Shut:
    """Why transformers does not open a release, what does, and what to write instead of it."""

    why: str
    programs: tuple[str, ...] = ("gptqmodel", "vLLM")
    instead: OutputFormat | None = "compressed-tensors"


def serving_notes(
    form: OutputFormat, skeleton: Skeleton, specs: Mapping[str, GridSpec]
) -> list[str]:
    """What transformers makes of a release whose linears differ, or are experts, the head, or of a
    kind of their own; and what opens it."""
    found = _shut(form, skeleton, specs)
    programs = " or ".join(_programs(found))
    hopeless = any(each.instead is None for each in found)
    return [
        f"{each.why}: open this one with {programs}"
        + ("" if hopeless else f", or write it with --format {each.instead}")
        for each in found
    ]


def opened_by(form: OutputFormat, skeleton: Skeleton, specs: Mapping[str, GridSpec]) -> str:
    """The first of transformers, gptqmodel and vLLM that opens a release as it is."""
    found = _shut(form, skeleton, specs)
    return _programs(found)[0] if found else "transformers"


def _programs(found: Sequence[Shut]) -> tuple[str, ...]:
    """What opens a release whatever was found; vLLM always does."""
    return tuple(p for p in Shut.programs if all(p in each.programs for each in found))


def _shut(form: OutputFormat, skeleton: Skeleton, specs: Mapping[str, GridSpec]) -> list[Shut]:
    """Everything for which transformers does not open a release."""
    parts = [(module_of(part), each.borrowed) for each in skeleton.fusions for part in each.parts]
    packed = {name: borrowed for name, borrowed in parts if name in specs}
    found: list[Shut] = []
    odd = f"transformers does not open packed linears of this model in a {form} release"
    if form == "compressed-tensors":
        if any(packed.values()):
            found.append(Shut(why=RANDOM.format(form), programs=("vLLM",), instead=None))
        if _is_odd(form, skeleton, specs):
            found.append(Shut(why=odd, programs=("vLLM",), instead="gptq"))
        return found
    if skeleton.head() in specs:
        head = f"transformers has no place for a packed {skeleton.head()} in a {form} release"
        found.append(Shut(why=head))
    elif len(set(specs.values())) > 1:
        alike = f"transformers gives all linears of a {form} release the same bits and groups"
        found.append(Shut(why=alike))
    if packed:
        known = all(name.endswith(GPTQMODEL_EXPERTS) for name in packed)
        programs = Shut.programs if known else ("vLLM",)
        instead: OutputFormat | None = None if any(packed.values()) else "compressed-tensors"
        found.append(Shut(why=RANDOM.format(form), programs=programs, instead=instead))
    if _is_odd(form, skeleton, specs):
        found.append(Shut(why=odd, instead=None))
    return found


def _is_odd(form: OutputFormat, skeleton: Skeleton, specs: Mapping[str, GridSpec]) -> bool:
    """Whether linears are of a class of their own, which transformers packs none of, or it fills
    weights of theirs by name where it opens the model, of which packed ones have none."""
    linears = skeleton.quantizable()
    if any(
        name + WEIGHT in skeleton.turned or type(linears[name]) is not nn.Linear for name in specs
    ):
        return True
    kinds: dict[tuple[type, ...], int] = {}
    for index in range(skeleton.layer_count):
        layer = skeleton.model.get_submodule(skeleton.layer_path(index))
        kinds.setdefault(tuple(type(module) for module in layer.modules()), index)
    return any(_misses(form, skeleton, specs, index) for index in kinds.values())


def _misses(
    form: OutputFormat, skeleton: Skeleton, specs: Mapping[str, GridSpec], index: int
) -> bool:
    """Whether what transformers fills in one layer is looked for in a packed linear."""
    layer, path = skeleton.layer(index), skeleton.layer_path(index)
    for name, module in [*layer.named_modules()]:
        if join(path, name) in specs and form == "compressed-tensors":
            del module.weight  # it stays a linear
        elif join(path, name) in specs:
            layer.set_submodule(name, nn.Module())
    try:
        with torch.random.fork_rng(devices=[]):
            for module in layer.modules():
                skeleton.model._init_weights(module)
    except AttributeError as error:
        return error.name == "weight"
    except Exception:  # of what cannot be done without values: that is no packed linear's
        return False
    return False
