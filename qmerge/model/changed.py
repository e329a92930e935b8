"""A change of the model that transformers builds, seen from the one that is walked.

Adapters are made for fused experts. Their names are opened, base weights are fused before the
adapter gets them, and what was merged is taken apart again. So are weights that transformers keeps
transposed: an adapter gets them as it was trained on them, and what was merged is turned back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from qmerge.adapters import Change, MergeRows
from qmerge.errors import Fault
from qmerge.model.experts import closed, opened
from qmerge.model.skeleton import Skeleton
from qmerge.names import module_of

PATH = "_qmerge_opened_path"


@dataclass(frozen=True, kw_only=True)
class OpenedChange:
    """A change whose experts are single linears, and whose linears all keep [O, I]."""

    change: Change
    skeleton: Skeleton
    touched: frozenset[str]

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self.change.faults

    @property
    def notes(self) -> tuple[str, ...]:
        return self.change.notes

    @property
    def renamed(self) -> Mapping[str, str]:
        return self.change.renamed

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.change.left_out

    @property
    def adapted(self) -> tuple[str, ...]:
        fused = (module_of(fusion.parameter) for fusion in self.skeleton.fusions)
        return tuple(dict.fromkeys((*self.change.adapted, *fused)))

    @property
    def unties(self) -> bool:
        return self.change.unties

    def supplies(self, parameter: str, start: int) -> bool:
        """Whether the change itself brings the rows of a parameter from `start` on."""
        return self.change.supplies(parameter, start)

    def replaces(self, parameter: str) -> bool:
        """Whether the last change of a parameter brings it as a whole; not known of a part of a
        fused one."""
        return self.change.replaces(parameter)

    def live(self, path: str) -> nn.Module:
        """The change's own live module, as transformers builds it."""
        module = self.change.live(path)
        module.__dict__[PATH] = path
        return module

    def fill(
        self, module: nn.Module, tensors: Mapping[str, torch.Tensor], *, taken: bool = False
    ) -> None:
        """Put base weights into a live module; those of a fused parameter all at once."""
        path = module.__dict__[PATH]
        whole = closed(self.skeleton.fusions, path, self.skeleton.turn(path, tensors))
        self.change.fill(module, whole, taken=taken)

    def merge(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Every parameter of the opened module by plain relative name."""
        path = module.__dict__[PATH]
        parts = opened(self.skeleton.fusions, path, self.change.merge(module))
        return self.skeleton.turn(path, parts)

    def row_merger(self, parameter: str) -> MergeRows | None:
        """None for a part of a fused parameter, and for a weight that is kept transposed."""
        if parameter in self.skeleton.turned or parameter not in self.change.touched:
            return None
        return self.change.row_merger(parameter)


def on_opened(skeleton: Skeleton, change: Change) -> Change:
    """A change of `skeleton.fused` as one of `skeleton.model`."""
    if not skeleton.fusions and not skeleton.turned:
        return change
    fusions = {fusion.parameter: fusion for fusion in skeleton.fusions}
    touched = frozenset(
        part
        for name in change.touched
        for part in (fusions[name].parts if name in fusions else (name,))
    )
    return OpenedChange(change=change, skeleton=skeleton, touched=touched)
