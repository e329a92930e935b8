"""Quantize one decoder layer while the calibration set passes through it.

Each linear is quantized at its first touch: when a forward reaches it, its input has been made by
the quantized linears before it, which is GPTQ's true sequence for the price of one forward. Where
the set does not fit in memory the layer is run in micro-batches up to each group of linears.

O, I: out and in features; G: groups; N: tokens; W, S, H: windows, tokens of a window, hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qmerge.formats.base import IntegerWeight
from qmerge.gptq import Factor, Hessian, Solution, factor, solve
from qmerge.job import Settings
from qmerge.measure.survival import linear_survival, relative_error
from qmerge.model.layer import Call, Hidden, before_linears, run, sibling_groups
from qmerge.results import LinearResult, Survival

ReadWindows = Callable[[int, int], Hidden]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One linear's weight before requantizing, and what it is measured against."""

    merged_OI: torch.Tensor
    origin_OI: torch.Tensor
    """What the adapter was merged onto."""
    base: IntegerWeight | None
    """The base's own codes, where it is on an integer grid."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The release's own hidden states before this layer, and how many windows go at once."""

    read: ReadWindows
    windows: int
    at_once: int


class Requantizer:
    """Quantizes the linears of one layer; `run` yields the calibration set's outputs."""

    def __init__(self, layer: nn.Module, weights: Mapping[str, Weight], settings: Settings) -> None:
        self.packed: dict[str, IntegerWeight] = {}
        self.results: dict[str, LinearResult] = {}
        self._layer = layer
        self._weights = weights
        self._settings = settings
        self._modules = {name: layer.get_submodule(name) for name in weights}

    def run(self, calibration: Calibration, call: Call) -> Iterator[Hidden]:
        """Quantize everything, and yield the layer's outputs in order of windows."""
        groups = sibling_groups(self._layer, calibration.read(0, 1), call, self._modules)
        if calibration.at_once >= calibration.windows:
            yield self._on_touch(groups, calibration.read(0, calibration.windows), call)
            return
        for group in groups:
            self._quantize(group, self._observe(group, calibration, call))
        for hidden in _windows(calibration):
            yield run(self._layer, hidden, call)

    def _on_touch(self, groups: Sequence[tuple[str, ...]], hidden: Hidden, call: Call) -> Hidden:
        group_of = {name: group for group in groups for name in group}

        def touch(name: str, inputs: torch.Tensor) -> None:
            if name not in self.packed:
                hessian = self._hessian(name)
                hessian.add(inputs)
                self._quantize(group_of[name], hessian)

        with before_linears(self._layer, self._modules, touch):
            output = run(self._layer, hidden, call)
        for group in groups:
            if group[0] not in self.packed:
                self._quantize(group, self._hessian(group[0]))
        return output

    def _observe(self, group: tuple[str, ...], calibration: Calibration, call: Call) -> Hessian:
        """The second moment of a group's input over all micro-batches, each run only that far."""
        hessian = self._hessian(group[0])

        def add(_name: str, inputs: torch.Tensor) -> None:
            hessian.add(inputs)
            raise _FarEnough

        with before_linears(self._layer, {group[0]: self._modules[group[0]]}, add):
            for hidden in _windows(calibration):
                try:
                    run(self._layer, hidden, call)
                except _FarEnough:
                    continue
        return hessian

    def _hessian(self, name: str) -> Hessian:
        weight = self._weights[name].merged_OI
        return Hessian(weight.shape[1], dtype=weight.dtype, device=weight.device)

    def _quantize(self, group: tuple[str, ...], hessian: Hessian) -> None:
        """Solve siblings stacked along O on one factor, and put what they decode to in place."""
        settings, H_II = self._settings, hessian.mean()
        shared = factor(
            H_II,
            order=settings.order,
            group_size=settings.spec.group_size,
            damping=settings.damping,
        )
        stacked_OI = torch.cat([self._weights[name].merged_OI for name in group])
        solution = solve(stacked_OI, shared, settings.spec)
        rows = tuple(self._weights[name].merged_OI.shape[0] for name in group)
        for name, own in zip(group, solution.split(rows), strict=True):
            self._place(name, own, shared, H_II)

    def _place(self, name: str, solution: Solution, shared: Factor, H_II: torch.Tensor) -> None:
        weight, spec = self._weights[name], self._settings.spec
        self._modules[name].weight = nn.Parameter(solution.weight_OI, requires_grad=False)
        self.packed[name] = IntegerWeight(
            codes_OI=solution.codes_OI,
            scales_OG=solution.scales_OG,
            zeros_OG=solution.zeros_OG,
            g_idx_I=solution.g_idx_I,
            bits=spec.bits,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
        )
        self.results[name] = LinearResult(
            name=name,
            bits=spec.bits,
            group_size=spec.group_size,
            grid="fresh",
            loss=solution.loss,
            error=relative_error(weight.merged_OI, solution.weight_OI, H_II),
            damping=shared.damping,
            fallback=solution.fallback,
            survival=_survival(weight, solution, H_II),
        )


def _survival(weight: Weight, solution: Solution, H_II: torch.Tensor) -> Survival:
    return linear_survival(
        weight.origin_OI,
        weight.merged_OI,
        solution.weight_OI,
        H_II,
        float(solution.scales_OG.float().mean()),
        codes_OI=solution.codes_OI,
        base_codes_OI=weight.base.codes_OI if weight.base is not None else None,
    )


def _windows(calibration: Calibration) -> Iterator[Hidden]:
    for start in range(0, calibration.windows, calibration.at_once):
        yield calibration.read(start, min(start + calibration.at_once, calibration.windows))


class _FarEnough(Exception):
    """Ends a forward at the linear whose input was wanted."""
