"""Several changes to one model, each on the result of the one before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from qmerge.adapters import unit
from qmerge.adapters.rowwise import MergeRows
from qmerge.errors import Fault

BEFORE = "_qmerge_before"


class Change(Protocol):
    """What training changed in a model: an adapter, a partial state, or a chain of them."""

    @property
    def faults(self) -> tuple[Fault, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def renamed(self) -> Mapping[str, str]: ...
    @property
    def touched(self) -> frozenset[str]: ...
    @property
    def left_out(self) -> tuple[str, ...]: ...
    @property
    def adapted(self) -> tuple[str, ...]: ...
    @property
    def unties(self) -> bool: ...
    def supplies(self, parameter: str, start: int) -> bool: ...
    def replaces(self, parameter: str) -> bool: ...
    def live(self, path: str) -> nn.Module: ...
    def fill(
        self, module: nn.Module, tensors: Mapping[str, torch.Tensor], *, taken: bool = False
    ) -> None: ...
    def merge(self, module: nn.Module) -> dict[str, torch.Tensor]: ...
    def row_merger(self, parameter: str) -> MergeRows | None: ...


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Changes in order. A live module has the last one live on the others, merged."""

    links: tuple[Change, ...]

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(fault for link in self.links for fault in link.faults)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for link in self.links for note in link.notes))

    @property
    def renamed(self) -> Mapping[str, str]:
        return {name: target for link in self.links for name, target in link.renamed.items()}

    @property
    def touched(self) -> frozenset[str]:
        return frozenset[str]().union(*(link.touched for link in self.links))

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for link in self.links for path in link.left_out))

    @property
    def adapted(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for link in self.links for path in link.adapted))

    @property
    def unties(self) -> bool:
        return any(link.unties for link in self.links)

    def supplies(self, parameter: str, start: int) -> bool:
        return any(link.supplies(parameter, start) for link in self.links)

    def replaces(self, parameter: str) -> bool:
        """Whether the last change of a parameter brings it as a whole."""
        last = [link for link in self.links if parameter in link.touched][-1:]
        return any(link.replaces(parameter) for link in last)

    def live(self, path: str) -> nn.Module:
        """The last change's live module; the earlier ones wait beside it for base weights."""
        module = self.links[-1].live(path)
        module.__dict__[BEFORE] = [link.live(path) for link in self.links[:-1]]
        return module

    def fill(
        self, module: nn.Module, tensors: Mapping[str, torch.Tensor], *, taken: bool = False
    ) -> None:
        """Put base weights under the first change; the others follow when it has them all."""
        waiting: list[nn.Module] = module.__dict__[BEFORE]
        while waiting:
            link = self.links[len(self.links) - 1 - len(waiting)]
            link.fill(waiting[0], tensors, taken=taken)
            if not unit.filled(waiting[0]):
                return
            tensors = link.merge(waiting.pop(0))
        self.links[-1].fill(module, tensors, taken=taken)

    def merge(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Merge the last change too; the module becomes plain."""
        return self.links[-1].merge(module)

    def row_merger(self, parameter: str) -> MergeRows | None:
        """Every change that touches it in turn; None where one of them takes more than rows."""
        found = [link.row_merger(parameter) for link in self.links if parameter in link.touched]
        merges = [merge for merge in found if merge is not None]
        if len(merges) < len(found):
            return None

        def merge(start: int, rows_RI: torch.Tensor) -> torch.Tensor:
            for each in merges:
                rows_RI = each(start, rows_RI)
            return rows_RI

        return merge
