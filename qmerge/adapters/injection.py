"""The adapter inside the model, without the model's weights: one submodule at a time, by PEFT.

`live` hands out one adapted submodule, `fill` puts base weights under it (and lets PEFT lay its
layers on them), `merge` makes it plain. In float32 the result equals
`PeftModel.from_pretrained(base, adapter).merge_and_unload()` bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qmerge.adapters import unit
from qmerge.adapters.kinds import base_init
from qmerge.adapters.landing import Landing
from qmerge.adapters.rowwise import MergeRows, merger_of
from qmerge.adapters.source import Adapter
from qmerge.errors import AdapterError, Fault
from qmerge.names import join, under

LIVE_HINT = "serve the adapter live on top of its base instead"


@dataclass(frozen=True, kw_only=True)
class Injection:
    """One adapter in one model. It may be used where `faults` is empty."""

    adapter: Adapter
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    """What a reader of the plan should know."""
    touched: frozenset[str]
    """Plain parameter names whose value the adapter may change."""
    left_out: tuple[str, ...]
    """Adapted modules that the user chose not to merge."""
    adapted: tuple[str, ...]
    """Paths of the modules that are changed as one: nothing inside them can be had by itself."""
    unties: bool
    """Whether the adapter makes a tied head and embedding differ."""
    weight: float
    """Factor on the adapter's update."""
    landing: Landing = field(repr=False)
    tuner: Any = field(repr=False)

    @property
    def renamed(self) -> Mapping[str, str]:
        """File name of a tensor to the name it was understood as, where they differ."""
        return self.landing.spelling.renamed

    def supplies(self, parameter: str, start: int) -> bool:
        """Whether it brings every row of a parameter from `start` on, whatever the base has."""
        if parameter in self.landing.overrides:
            return True
        path, _, name = parameter.rpartition(".")
        if path in self.left_out:
            return False
        module = dict(unit.adapted_modules(self.tuner.model)).get(path)
        return module is not None and unit.brings_rows(module, name, start)

    def replaces(self, parameter: str) -> bool:
        """Whether it brings a parameter as a whole, so that nothing is computed."""
        return self.supplies(parameter, 0)

    def live(self, path: str) -> nn.Module:
        """A fresh adapted copy of the submodule at a plain path; its base parameters are on meta.

        Where the submodule is itself adapted (an embedding, a head), it comes one level down in a
        module that is called the same way.
        """
        assert not any(under(path, other) for other in self.adapted), f"{path} is not by itself"
        module = unit.copy_out(self.tuner.model, path)
        module.__dict__[unit.PATH] = path
        unit.drop(module, unit.below(self.left_out, path))
        for relative, adapted in list(unit.adapted_modules(module)):
            unit.load(adapted, self._tensors(join(path, relative)))
            if self.weight != 1:
                unit.scale(adapted, self.weight)
        return module.eval().requires_grad_(False)

    def fill(
        self, module: nn.Module, tensors: Mapping[str, torch.Tensor], *, taken: bool = False
    ) -> None:
        """Put base weights into a live module, by plain names relative to it.

        May be called several times; a tuner layer is laid when its last base weight is there.
        The tensors are not changed, unless they are `taken` over, which saves copies of them.
        Raises AdapterError for a name that the module does not have.
        """
        path = module.__dict__[unit.PATH]
        unit.put(module, tensors, self.landing.overrides, taken=taken)
        for relative, adapted in list(unit.adapted_modules(module)):
            key = join(path, relative)
            if self._waits(key, adapted):
                layer = unit.lay(self.tuner, module, relative, key)
                unit.load(layer, self._tensors(key))
                if self.weight != 1:
                    unit.scale(layer, self.weight)
        module.eval().requires_grad_(False)

    def merge(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Merge a filled live module in place with PEFT's own arithmetic.

        Returns every parameter of the now plain module by plain relative name, in the dtype of the
        base weights that were filled in. Raises AdapterError where PEFT cannot merge.
        """
        try:
            return unit.merge_out(self.tuner, module)
        except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            raise AdapterError(
                f"{self.adapter.path}: PEFT cannot merge {module.__dict__[unit.PATH]}: {error}",
                hint=LIVE_HINT,
            ) from error

    def row_merger(self, parameter: str) -> MergeRows | None:
        """What merges a parameter that it touches some rows at a time; None where that takes
        more than those rows."""
        path, _, name = parameter.rpartition(".")
        if name != "weight" or path not in self.adapted or parameter in self.landing.overrides:
            return None
        if base_init(self.adapter.config) is not None:
            return None
        return merger_of(self.live(path).get_submodule(unit.HELD), unit.ADAPTER)

    def _waits(self, key: str, module: nn.Module) -> bool:
        """Whether PEFT has yet to make this layer again, and now has all of the base for it."""
        targeted = key in self.tuner.targeted_module_names and unit.is_tuner(module)
        return targeted and not unit.is_laid(module) and unit.filled(module)

    def _tensors(self, key: str) -> dict[str, torch.Tensor]:
        """The adapter's tensors below the module `key`, by their names relative to it."""
        placed = self.landing.placed
        return {name: placed[full] for name, full in unit.below(placed, key).items()}
