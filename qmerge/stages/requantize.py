"""Quantize one decoder layer while the calibration set passes through it.

Each linear is quantized at its first touch: when a forward reaches it, its input has been made by
the quantized linears before it, which is GPTQ's true sequence for the price of one forward. Where
the set does not fit in memory both layers are run in micro-batches up to each group of linears.

Beside the release's layer runs the reference: the same layer, merged and not quantized, on its own
hidden states. What it feeds each linear, and what its residual stream has there, is what the
release's linear aims at.

O, I: out and in features; W, S, H: windows, tokens of a window, hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from qmerge.formats.base import IntegerWeight
from qmerge.gptq import Drift, Grid, Hessian, Update, expressible, solve_update
from qmerge.job import Settings
from qmerge.measure.remedy import cheapest, is_weak
from qmerge.measure.survival import linear_survival, relative_error
from qmerge.model.layer import Call, Hidden, before_linears, run, sibling_groups
from qmerge.model.residual import reading, residual_places
from qmerge.results import LinearResult, Remedy, Survival
from qmerge.stages.remedies import alternatives

ReadWindows = Callable[[int, int], Hidden]
Group = tuple[str, ...]


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
    """Hidden states before this layer, the release's own and the reference's, and how many windows
    go at once."""

    read: ReadWindows
    read_reference: ReadWindows
    windows: int
    at_once: int

    @property
    def whole(self) -> bool:
        return self.at_once >= self.windows

    def batches(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.windows, self.at_once):
            yield start, min(start + self.at_once, self.windows)


@dataclass(kw_only=True)
class Seen:
    """What a layer fed its groups of linears in one forward: inputs by a group's first linear, and
    residual streams by the linear whose output is added to them."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    streams: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Moments:
    """What is gathered for one group before it is solved."""

    hessian: Hessian
    drift: Drift | None
    residual: Drift | None

    def add(
        self,
        inputs: torch.Tensor,
        reference: torch.Tensor | None,
        stream: torch.Tensor | None,
        reference_stream: torch.Tensor | None,
    ) -> None:
        """Add the same tokens of the release and of the reference."""
        self.hessian.add(inputs)
        if self.drift is not None and reference is not None:
            self.drift.add(reference, inputs, inputs)
        if self.residual is not None and stream is not None and reference_stream is not None:
            self.residual.add(reference_stream, stream, inputs)


class Requantizer:
    """Quantizes the linears of one layer; `run` yields the calibration set's outputs."""

    def __init__(
        self,
        layer: nn.Module,
        reference: nn.Module,
        weights: Mapping[str, Weight],
        settings: Settings,
    ) -> None:
        self.packed: dict[str, IntegerWeight] = {}
        self.results: dict[str, LinearResult] = {}
        self.remedies: list[Remedy] = []
        self._layer = layer
        self._reference = reference
        self._weights = weights
        self._settings = settings
        self._modules = {name: layer.get_submodule(name) for name in weights}
        self._twins = {name: reference.get_submodule(name) for name in weights}
        self._places: dict[str, str] = {}

    def run(self, calibration: Calibration, call: Call) -> Iterator[tuple[Hidden, Hidden]]:
        """Quantize everything; outputs of the release's layer and of the reference's, in order."""
        first = calibration.read_reference(0, 1)
        groups = sibling_groups(self._reference, first, call, self._twins)
        if self._settings.asymmetric:
            places = residual_places(self._reference, first, call, self._twins)
            self._places = {name: place for name, place in places.items() if (name,) in groups}
        if calibration.whole:
            yield self._on_touch(groups, calibration, call)
            return
        for group in groups:
            self._quantize(group, self._observe(group, calibration, call))
        for start, stop in calibration.batches():
            yield (
                run(self._layer, calibration.read(start, stop), call),
                run(self._reference, calibration.read_reference(start, stop), call),
            )

    def _on_touch(
        self, groups: Sequence[Group], calibration: Calibration, call: Call
    ) -> tuple[Hidden, Hidden]:
        windows = calibration.windows
        seen = Seen()
        firsts = {group[0]: self._twins[group[0]] for group in groups}
        with ExitStack() as stack:
            if self._settings.asymmetric:
                stack.enter_context(
                    before_linears(self._reference, firsts, seen.inputs.__setitem__)
                )
                seen.streams = stack.enter_context(reading(self._reference, self._places))
            reference = run(self._reference, calibration.read_reference(0, windows), call)
        group_of = {name: group for group in groups for name in group}

        def touch(name: str, inputs: torch.Tensor) -> None:
            if name in self.packed:
                return
            group = group_of[name]
            moments = self._moments(group)
            twin = seen.inputs.pop(group[0], None)
            stream = own.get(name)
            moments.add(inputs, twin, stream, seen.streams.pop(name, None))
            self._quantize(group, moments)

        with (
            reading(self._layer, self._places) as own,
            before_linears(self._layer, self._modules, touch),
        ):
            output = run(self._layer, calibration.read(0, windows), call)
        for group in groups:
            if group[0] not in self.packed:
                self._quantize(group, self._moments(group))
        return output, reference

    def _observe(self, group: Group, calibration: Calibration, call: Call) -> Moments:
        """A group's moments over all micro-batches, each run only as far as the group."""
        moments = self._moments(group)
        for start, stop in calibration.batches():
            own = self._peek(self._layer, group, calibration.read(start, stop), call)
            twin = Seen()
            if self._settings.asymmetric:
                hidden = calibration.read_reference(start, stop)
                twin = self._peek(self._reference, group, hidden, call)
            if group[0] in own.inputs:
                moments.add(
                    own.inputs[group[0]],
                    twin.inputs.get(group[0]),
                    own.streams.get(group[0]),
                    twin.streams.get(group[0]),
                )
        return moments

    def _peek(self, layer: nn.Module, group: Group, hidden: Hidden, call: Call) -> Seen:
        """What one micro-batch brings to a group's first linear."""
        seen = Seen()

        def stop(name: str, inputs: torch.Tensor) -> None:
            seen.inputs[name] = inputs
            raise _FarEnough

        place = {name: where for name, where in self._places.items() if name == group[0]}
        first = {group[0]: layer.get_submodule(group[0])}
        with reading(layer, place) as streams, before_linears(layer, first, stop):
            try:
                run(layer, hidden, call)
            except _FarEnough:
                seen.streams = streams
        return seen

    def _moments(self, group: Group) -> Moments:
        weight = self._weights[group[0]].merged_OI
        out, width = weight.shape

        def drift(rows: int) -> Drift:
            return Drift(rows, width, dtype=weight.dtype, device=weight.device)

        return Moments(
            hessian=Hessian(width, dtype=weight.dtype, device=weight.device),
            drift=drift(width) if self._settings.asymmetric else None,
            residual=drift(out) if group[0] in self._places else None,
        )

    def _quantize(self, group: Group, moments: Moments) -> None:
        """Solve siblings stacked along O, and put what they decode to in place."""
        H_II = moments.hessian.mean()
        updates = self._solve(group, moments, H_II, self._settings)
        for name, update in zip(group, updates, strict=True):
            self._place(name, update, H_II, moments.hessian.dropped)
        if any(is_weak(self.results[name].survival) for name in group):
            self._seek_remedy(group, moments, H_II)

    def _solve(
        self, group: Group, moments: Moments, H_II: torch.Tensor, settings: Settings
    ) -> tuple[Update, ...]:
        weights = [self._weights[name] for name in group]
        return solve_update(
            torch.cat([weight.merged_OI for weight in weights]),
            torch.cat([weight.origin_OI for weight in weights]),
            H_II,
            settings.spec,
            rows=tuple(weight.merged_OI.shape[0] for weight in weights),
            order=settings.order,
            damping=settings.damping,
            base=_base_grid([weight.base for weight in weights], settings),
            grid=settings.grid,
            unit_survival=settings.unit_survival,
            drift_II=moments.drift.mean() if moments.drift else None,
            residual_OI=moments.residual.mean() if moments.residual else None,
        )

    def _seek_remedy(self, group: Group, moments: Moments, H_II: torch.Tensor) -> None:
        """The cheapest setting that would have kept the adapter, tried here and now: siblings
        together, because servers fuse them."""

        def kept(settings: Settings) -> float | None:
            updates = self._solve(group, moments, H_II, settings)
            found = [update.survival for update in updates if update.survival is not None]
            return min(found, default=None)

        weights, settings = [self._weights[name] for name in group], self._settings
        rows, width = sum(weight.merged_OI.shape[0] for weight in weights), H_II.shape[0]
        base = _base_grid([weight.base for weight in weights], settings)
        anchorable = base is not None and expressible(base, settings.spec, settings.order, width)
        tried = alternatives(settings, (rows, width), anchorable=anchorable, solve=kept)
        found = cheapest(group, tried)
        if found is not None:
            self.remedies.append(found)

    def _place(self, name: str, update: Update, H_II: torch.Tensor, dropped: int) -> None:
        weight, spec, solution = self._weights[name], self._settings.spec, update.solution
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
        lost = f"{dropped} calibration tokens were not finite" if dropped else None
        self.results[name] = LinearResult(
            name=name,
            bits=spec.bits,
            group_size=spec.group_size,
            grid=_grid_name(update.anchored),
            anchored=update.anchored,
            kappa=update.kappa,
            loss=solution.loss,
            error=relative_error(weight.merged_OI, solution.weight_OI, H_II),
            damping=solution.damping,
            fallback="; ".join(filter(None, (solution.fallback, lost))) or None,
            survival=_survival(weight, update, H_II),
        )


def _base_grid(bases: Sequence[IntegerWeight | None], settings: Settings) -> Grid | None:
    """The base's steps and zero points of siblings stacked along O, if the release has the like."""
    grids = [base for base in bases if base is not None]
    spec = settings.spec
    if len(grids) < len(bases) or any(
        (base.bits, base.group_size) != (spec.bits, spec.group_size) for base in grids
    ):
        return None
    index = grids[0].g_idx_I
    for base in grids[1:]:
        same = (base.g_idx_I is None) == (index is None)
        if not same or (index is not None and not torch.equal(index, base.g_idx_I)):  # type: ignore[arg-type]
            return None
    return Grid(
        scales_OG=torch.cat([base.scales_OG for base in grids]),
        zeros_OG=torch.cat([base.zeros_OG for base in grids]),
        g_idx_I=index,
    )


def _grid_name(anchored: float) -> str:
    return {0.0: "fresh", 1.0: "anchored"}.get(anchored, f"{100 * anchored:.0f}% anchored")


def _survival(weight: Weight, update: Update, H_II: torch.Tensor) -> Survival:
    solution = update.solution
    return linear_survival(
        weight.origin_OI,
        weight.merged_OI,
        solution.weight_OI,
        H_II,
        float(solution.scales_OG.float().mean()),
        codes_OI=solution.codes_OI,
        base_codes_OI=weight.base.codes_OI if weight.base is not None else None,
    )


class _FarEnough(Exception):
    """Ends a forward at the linear whose input was wanted."""
