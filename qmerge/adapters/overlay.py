"""A partial state: trained parameters that replace the base's as a whole.

Trainers that unfreeze parts of a model (Qwen-VL's scripts and their kin) save those with
`torch.save` and load them with `strict=False`, so that a name nobody knows is dropped in silence.
Here every name has to land.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qmerge.adapters import unit
from qmerge.adapters.landing import (
    DOUBLED,
    LEFT_OVER,
    contradictions,
    not_finite,
    of_kind,
    wrong_values,
)
from qmerge.adapters.probe import NOOP, NOOP_HINT, Rows, no_rows, same_values
from qmerge.adapters.rowwise import MergeRows
from qmerge.adapters.source import Adapter, read_tensors
from qmerge.adapters.spelling import bare, understand
from qmerge.errors import Fault

BASE_LAYER = ".base_layer"
HOMELESS = (
    LEFT_OVER[0],
    "give the adapter that they belong to with --adapter, or the model they were trained on",
)


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """Whole parameters over a model's own. It may be used where `faults` is empty."""

    path: Path
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    renamed: Mapping[str, str]
    touched: frozenset[str]
    left_out: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    unties: bool
    model: Any = field(repr=False)
    values: Mapping[str, torch.Tensor] = field(repr=False)
    """By plain parameter name."""

    def supplies(self, parameter: str, start: int) -> bool:
        """Whether it brings every row of a parameter from `start` on."""
        return parameter in self.values

    def replaces(self, parameter: str) -> bool:
        """Whether it brings a parameter as a whole."""
        return parameter in self.values

    def live(self, path: str) -> nn.Module:
        """A copy of the submodule at a plain path, on meta."""
        module: nn.Module = copy.deepcopy(self.model.get_submodule(path))
        module.__dict__[unit.PATH] = path
        return module.eval().requires_grad_(False)

    def fill(
        self, module: nn.Module, tensors: Mapping[str, torch.Tensor], *, taken: bool = False
    ) -> None:
        """Put base weights into a live module, or the trained ones in their place."""
        unit.put(module, tensors, self.values, taken=taken)

    def merge(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Every parameter by plain relative name."""
        return unit.plain_tensors(module)

    def row_merger(self, parameter: str) -> MergeRows | None:
        """None: the whole parameter is at hand."""
        return None


def overlay(
    model: Any,
    file: Path,
    *,
    adapters: Sequence[Adapter] = (),
    allow_noop: bool = False,
    base: Rows = no_rows,
) -> Overlay:
    """Match a partial state to a model on the meta device.

    Tensors of `adapters`, which are merged beside it, may be in the file too where they are the
    same. `base` shows whether its values differ from the base's.

    Raises AdapterError for a file that is damaged, or a pickle with more in it than tensors.
    """
    tensors = read_tensors(file)
    places = {slot.name: slot.parameter for slot in unit.base_slots(model)}
    found = {name.replace(BASE_LAYER, ""): name for name in tensors}
    spelling = understand(found, places)
    named = {target: tensors[found[name]] for name, target in spelling.names.items()}
    landed = {name: tensor for name, tensor in named.items() if name in places}
    known = _by_name(adapters)
    doubled = [n for n in named if n not in places and _is_among(known.get(bare(n), ()), named[n])]
    lost = sorted(named.keys() - places.keys() - set(doubled))
    where = str(file)
    faults = (
        *of_kind(
            where, contradictions(spelling, {n: tensors[own] for n, own in found.items()}), DOUBLED
        ),
        *of_kind(where, lost, HOMELESS),
        *wrong_values(landed, places, where),
        *not_finite(landed, where),
    )
    if not faults and not allow_noop and same_values(((n, 0, t) for n, t in landed.items()), base):
        faults = (Fault(where=where, message=NOOP, hint=NOOP_HINT),)
    values, unties = _over_ties(landed, places)
    return Overlay(
        path=file,
        faults=faults,
        notes=(f"{file} replaces {len(landed)} parameters as a whole", *_told(doubled)),
        renamed={
            found[name]: target for name, target in spelling.names.items() if found[name] != target
        },
        touched=frozenset(values),
        unties=unties,
        model=copy.deepcopy(model),
        values=values,
    )


def _by_name(adapters: Sequence[Adapter]) -> dict[str, list[torch.Tensor]]:
    """The tensors of all adapters, by names that no wrapper changes."""
    found: dict[str, list[torch.Tensor]] = {}
    for adapter in adapters:
        for name, tensor in adapter.read().items():
            found.setdefault(bare(name), []).append(tensor)
    return found


def _is_among(known: Sequence[torch.Tensor], tensor: torch.Tensor) -> bool:
    return any(torch.equal(tensor.to(own.dtype), own) for own in known)


def _told(doubled: Sequence[str]) -> tuple[str, ...]:
    return (f"{len(doubled)} tensors in it are the adapter's own",) if doubled else ()


def _over_ties(
    landed: Mapping[str, torch.Tensor], places: Mapping[str, nn.Parameter]
) -> tuple[dict[str, torch.Tensor], bool]:
    """`landed` under every name of a tied parameter, and whether two names got different values."""
    values = dict(landed)
    first: dict[int, torch.Tensor] = {}
    for name, tensor in landed.items():
        first.setdefault(id(places[name]), tensor)
    for name, place in places.items():
        if id(place) in first:
            values.setdefault(name, first[id(place)])
    differs = (not torch.equal(first[id(places[name])], tensor) for name, tensor in values.items())
    return values, any(differs)
