"""Quantize one decoder layer while the calibration set passes through it.

Each linear is quantized at its first touch: forwards of all micro-batches wait before it, their
inputs made by the quantized linears before it, and go on once it is quantized. That is GPTQ's true
sequence for the price of one forward. Where what waiting forwards hold does not fit in memory, they
are run anew up to each group of linears.

Beside the release's layer runs the reference: the same layer, merged and not quantized, on its own
hidden states. What it feeds each linear, and what its residual stream has there, is what the
release's linear aims at.

O, I: out and in features; W, S, H: windows, tokens of a window, hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear

from qmerge.formats.integer import IntegerWeight
from qmerge.gptq import (
    Drift,
    Grid,
    GridSpec,
    Hessian,
    Solution,
    Update,
    expressible,
    solve_update,
)
from qmerge.heap import give_back
from qmerge.job import Settings
from qmerge.measure import error_ratio, output_power, survival_of
from qmerge.measure.remedy import cheapest, is_weak
from qmerge.model.experts import CHOICE, HESSIAN_BYTES, blocks_of, calibrating
from qmerge.model.layer import Call, Hidden, forward, sibling_groups
from qmerge.model.paused import Forward, held_bytes, lighter, watched
from qmerge.model.residual import residual_places
from qmerge.model.streams import batches
from qmerge.names import join, under
from qmerge.precision import reduced_precision
from qmerge.results import FEW_TOKENS, LinearResult, Remedy, Survival
from qmerge.stages.remedies import alternatives

ReadWindows = Callable[[int, int], tuple[Hidden, Call]]
Group = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One linear's weight before requantizing, and what it is measured against."""

    merged_OI: torch.Tensor
    origin_OI: torch.Tensor
    """What the adapter was merged onto."""
    base: IntegerWeight | None
    """The base's own codes, where it is on an integer grid."""
    spec: GridSpec
    original_OI: torch.Tensor | None = None
    """What the base was quantized from, where it is at hand."""
    quantized_OI: torch.Tensor | None = None
    """The decoded base, beside the original."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Hidden states before this layer with what it is called with, the release's own and the
    reference's.

    `at_once` windows make a micro-batch; `waiting` says that the forwards of all of them may wait
    in memory at one time. Without a reference, what is aimed at is the merged weight.
    """

    read: ReadWindows
    read_reference: ReadWindows | None
    sample: tuple[Hidden, Call]
    """The beginning of a window: enough to see what linears read, and where they write."""
    windows: int
    at_once: int
    waiting: bool


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The forwards of one micro-batch: through the release's layer, and through the reference's."""

    release: Forward
    reference: Forward | None
    reduced: bool
    """As `Settings.reduced`."""

    def reach(self, name: str) -> bool:
        """Bring both to a linear; whether the release's got there."""
        with reduced_precision(self.reduced):
            if self.reference is not None:
                self.reference.reach(name)
            return self.release.reach(name)

    def send_on(self) -> None:
        """The reference, to the next linear: its own are not quantized."""
        if self.reference is not None:
            self.reference.go_on()

    def finish(self) -> tuple[Hidden, Hidden | None]:
        with reduced_precision(self.reduced):
            reference = self.reference.finish() if self.reference is not None else None
            return self.release.finish(), reference

    def drop(self) -> None:
        for each in (self.release, self.reference):
            if each is not None:
                each.drop()


@dataclass(frozen=True, kw_only=True)
class Means:
    """What one group is solved under: means over the calibration tokens, in two halves those of
    drifts (`Drift.mean`); `dropped` tokens were not finite."""

    H_II: torch.Tensor
    drift_2II: torch.Tensor | None
    residual_2OI: torch.Tensor | None
    dropped: int


@dataclass(kw_only=True)
class Moments:
    """What is gathered for one group before it is solved.

    `drift` is of what goes in. A linear whose output is added to a residual stream has `residual`
    in its place: of the stream behind it, for which its merged weight is needed.
    """

    hessian: Hessian
    drift: Drift | None = None
    residual: tuple[Drift, torch.Tensor] | None = None

    def add(self, pair: Pair) -> None:
        """Add the tokens that both forwards bring to the linear they wait before."""
        release, twin = pair.release, pair.reference
        assert release.inputs is not None
        with reduced_precision(pair.reduced):
            self.hessian.add(release.inputs)
        if twin is None or twin.at != release.at or twin.inputs is None:
            return
        if self.drift is not None:
            self.drift.add(twin.inputs, release.inputs, release.inputs)
        if self.residual is not None and release.stream is not None and twin.stream is not None:
            residual, merged_OI = self.residual
            moved = linear(twin.inputs - release.inputs, merged_OI)
            residual.add(moved + twin.stream, release.stream, release.inputs)

    def means(self) -> Means:
        return Means(
            H_II=self.hessian.mean(),
            drift_2II=self.drift.mean() if self.drift else None,
            residual_2OI=self.residual[0].mean() if self.residual else None,
            dropped=self.hessian.dropped,
        )


class Requantizer:
    """Quantizes the linears of one layer; `run` yields the calibration set's outputs.

    Of `weights` each is taken out once it is quantized, so that what it was measured against need
    not be held any longer.
    """

    def __init__(
        self,
        layer: nn.Module,
        reference: nn.Module,
        weights: dict[str, Weight],
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
        self._blocks = dict(blocks_of(layer))
        self._routed = {
            name: (path, int(inside.partition(".")[0]))
            for path in self._blocks
            for name in weights
            if (inside := under(name, path)) is not None
        }
        """Linears of experts, and whose. Routing differs between the release and the reference:
        what the latter feeds them are other tokens."""

    def run(self, calibration: Calibration) -> Iterator[tuple[Hidden, Hidden | None]]:
        """Quantize everything; outputs of the release's layer and of the reference's, in order."""
        # Of few tokens most experts would get none.
        first, call = calibration.read(0, 1) if self._blocks else calibration.sample
        siblings = sibling_groups(self._reference, first, call, self._twins)
        groups = [own for group in siblings for own in self._alike(group)]
        if calibration.read_reference is not None:
            alike = {name: m for name, m in self._twins.items() if name not in self._routed}
            places = residual_places(self._reference, first, call, alike)
            self._places = {name: place for name, place in places.items() if (name,) in groups}
        stops = {group[0] for group in groups}
        stops |= {join(path, CHOICE) for path, _ in self._routed.values()}
        ahead = self._lighter(calibration, stops)
        with (
            calibrating(self._layer),
            watched(self._layer, _modules(self._layer, stops), self._places),
            watched(self._reference, _modules(self._reference, stops), self._places),
        ):
            waiting = [*self._pairs(calibration, stops)] if calibration.waiting else None

            def arrivals(*names: str) -> Iterator[tuple[str, Pair]]:
                """Every micro-batch when it waits before each of these, in the layer's order."""
                left: set[str] = set()
                for pair in waiting or self._pairs(calibration, left):
                    left.update(names)
                    for name in names:
                        if pair.reach(name):
                            yield name, pair
                        left.discard(name)
                    if not waiting:
                        pair.drop()

            for wave in self._waves(groups, together=not waiting):
                stops.difference_update(self._count(wave[0][0], arrivals))
                moments = {group[0]: self._moments(group) for group in wave}
                for name, pair in arrivals(*moments):
                    moments[name].add(pair)
                    if waiting and name in ahead:
                        pair.send_on()
                # Experts are many and alike: one fills the holes that the one before it left.
                alone = wave[0][0] not in self._routed
                if alone:
                    give_back()
                stops.difference_update(moments)
                for group in wave:
                    self._quantize(group, moments.pop(group[0]).means())
                if alone:
                    give_back()
            for pair in waiting or self._pairs(calibration, stops):
                yield pair.finish()
        give_back()

    def _lighter(self, calibration: Calibration, stops: Collection[str]) -> frozenset[str]:
        """Where the reference holds less one stop ahead of the release than beside it.

        Experts take turns: what the next one reads is held until then.
        """
        if self._blocks or calibration.read_reference is None:
            return frozenset()
        before = _modules(self._reference, stops)
        return lighter(held_bytes(self._reference, *calibration.sample, before))

    def _waves(self, groups: Sequence[Group], *, together: bool) -> Iterator[tuple[Group, ...]]:
        """Groups that are observed in one pass, in the order of their work.

        One by one where forwards wait for each. Where they are run anew for each pass, that many
        experts in one do the same as their Hessians take a stated memory.
        """
        waves: dict[object, list[Group]] = {}
        for group in groups:
            expert = self._routed.get(group[0]) if together else None
            alike = (expert[0], group[0].rpartition(".")[2]) if expert else group
            waves.setdefault(alike, []).append(group)
        for wave in waves.values():
            width = self._weights[wave[0][0]].merged_OI.shape[1]
            at_once = max(1, HESSIAN_BYTES // (4 * width * width))
            for start in range(0, len(wave), at_once):
                yield tuple(wave[start : start + at_once])

    def _count(self, name: str, arrivals: Callable[[str], Iterator[tuple[str, Pair]]]) -> set[str]:
        """Before the first expert of a block is run: how many tokens chose each of its experts.

        Returns the places that forwards need no longer stop at.
        """
        path, _ = self._routed.get(name, ("", 0))
        block = self._blocks.get(path)
        if block is None or block.chosen is not None:
            return set()
        place = join(path, CHOICE)
        chosen = [pair.release.inputs for _, pair in arrivals(place)]
        counted = [block.count(index_TK) for index_TK in chosen if index_TK is not None]
        block.chosen = [sum(each) for each in zip(*counted, strict=True)]
        return {place}

    def _pairs(self, calibration: Calibration, stops: Collection[str]) -> Iterator[Pair]:
        """Forwards of every micro-batch, not yet begun."""

        def through(layer: nn.Module, read: ReadWindows, start: int, stop: int) -> Forward:
            return Forward(lambda: forward(layer, *read(start, stop)), stops)

        for start, stop in batches(calibration.windows, calibration.at_once):
            beside = calibration.read_reference
            yield Pair(
                release=through(self._layer, calibration.read, start, stop),
                reference=through(self._reference, beside, start, stop) if beside else None,
                reduced=self._settings.reduced,
            )

    def _moments(self, group: Group) -> Moments:
        weight = self._weights[group[0]].merged_OI
        out, width = weight.shape
        placed = partial(Drift, dtype=weight.dtype, device=weight.device)
        moments = Moments(hessian=Hessian(width, dtype=weight.dtype, device=weight.device))
        if group[0] in self._places:
            moments.residual = placed(out, width), weight
        elif self._settings.asymmetric and group[0] not in self._routed:
            moments.drift = placed(width, width)
        return moments

    def _quantize(self, group: Group, means: Means) -> None:
        """Solve siblings stacked along O, and put what they decode to in place."""
        updates = self._solve(group, means, self._settings_of(group))
        for name, update in zip(group, updates, strict=True):
            self._place(name, update, means)
        if any(is_weak(self.results[name].survival) for name in group):
            self._seek_remedy(group, means)
        for name in group:
            del self._weights[name]

    def _alike(self, group: Group) -> list[Group]:
        """Siblings with the same grids."""
        specs = dict.fromkeys(self._weights[name].spec for name in group)
        return [tuple(n for n in group if self._weights[n].spec == spec) for spec in specs]

    def _settings_of(self, group: Group) -> Settings:
        return replace(self._settings, spec=self._weights[group[0]].spec)

    def _solve(self, group: Group, means: Means, settings: Settings) -> tuple[Update, ...]:
        return solve_stacked([self._weights[name] for name in group], means, settings)

    def _seek_remedy(self, group: Group, means: Means) -> None:
        """The cheapest setting that would have kept the adapter, tried here and now: siblings
        together, because servers fuse them."""

        def kept(settings: Settings) -> float | None:
            updates = self._solve(group, means, settings)
            found = [update.survival for update in updates if update.survival is not None]
            return min(found, default=None)

        weights, settings = [self._weights[name] for name in group], self._settings_of(group)
        rows, width = sum(weight.merged_OI.shape[0] for weight in weights), means.H_II.shape[0]
        base = _base_grid([weight.base for weight in weights], settings)
        anchorable = base is not None and expressible(base, settings.spec, settings.order, width)
        tried = alternatives(settings, (rows, width), anchorable=anchorable, solve=kept)
        found = cheapest(group, tried)
        if found is not None:
            self.remedies.append(found)

    def _place(self, name: str, update: Update, means: Means) -> None:
        weight, solution = self._weights[name], update.solution
        self._modules[name].weight = nn.Parameter(solution.weight_OI, requires_grad=False)
        self.packed[name] = on_grid(solution, weight.spec)
        tokens, few = self._tokens(name)
        found = told(name, weight, update, means)
        fallback = "; ".join(filter(None, (few, found.fallback))) or None
        self.results[name] = replace(found, tokens=tokens, fallback=fallback)

    def _tokens(self, name: str) -> tuple[int | None, str | None]:
        """How many calibration tokens chose an expert, and what was done where they are few."""
        if name not in self._routed:
            return None, None
        path, number = self._routed[name]
        block = self._blocks[path]
        assert block.chosen is not None
        tokens = block.chosen[number]
        return tokens, FEW_TOKENS if tokens < block.least else None


def solve_stacked(
    weights: Sequence[Weight], means: Means, settings: Settings
) -> tuple[Update, ...]:
    """Requantize weights that read the same input, under what was gathered of it."""
    return solve_update(
        _stacked([weight.merged_OI for weight in weights]),
        _stacked([weight.origin_OI for weight in weights]),
        means.H_II,
        settings.spec,
        rows=tuple(weight.merged_OI.shape[0] for weight in weights),
        order=settings.order,
        damping=settings.damping,
        base=_base_grid([weight.base for weight in weights], settings),
        grid=settings.grid,
        unit_survival=settings.unit_survival,
        refine=settings.refine,
        drift_II=means.drift_2II,
        residual_OI=means.residual_2OI,
    )


def _stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Along O; one alone is not copied."""
    return weights[0] if len(weights) == 1 else torch.cat([*weights])


def on_grid(solution: Solution, spec: GridSpec) -> IntegerWeight:
    """What is packed of a solution, on the host."""
    weight = IntegerWeight(
        codes_OI=solution.codes_OI,
        scales_OG=solution.scales_OG,
        zeros_OG=solution.zeros_OG,
        g_idx_I=solution.g_idx_I,
        bits=spec.bits,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
    )
    return weight.to("cpu")


def told(name: str, weight: Weight, update: Update, means: Means) -> LinearResult:
    """How a linear came out."""
    solution, spec = update.solution, weight.spec
    power = output_power(weight.merged_OI, means.H_II)
    lost = f"{means.dropped} calibration tokens were not finite" if means.dropped else None
    return LinearResult(
        name=name,
        bits=spec.bits,
        group_size=spec.group_size,
        grid=grid_name(update.anchored),
        anchored=update.anchored,
        kappa=update.kappa,
        loss=solution.loss,
        error=solution.loss / power if power > 0 else None,
        damping=solution.damping,
        fallback="; ".join(filter(None, (solution.fallback, lost))) or None,
        survival=_survival(weight, update, means.H_II),
    )


def _modules(layer: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    return {name: layer.get_submodule(name) for name in names}


def _base_grid(bases: Sequence[IntegerWeight | None], settings: Settings) -> Grid | None:
    """The base's steps and zero points of siblings stacked along O, if the release has the like."""
    grids = [base for base in bases if base is not None]
    spec = settings.spec
    if len(grids) < len(bases) or any(
        (base.bits, base.group_size) != (spec.bits, spec.group_size) for base in grids
    ):
        return None
    index = grids[0].g_idx_I
    if not all(_same(index, base.g_idx_I) for base in grids[1:]):
        return None
    return Grid(
        scales_OG=torch.cat([base.scales_OG for base in grids]),
        zeros_OG=torch.cat([base.zeros_OG for base in grids]),
        g_idx_I=index,
    )


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def grid_name(anchored: float) -> str:
    return {0.0: "fresh", 1.0: "anchored"}.get(anchored, f"{100 * anchored:.0f}% anchored")


def _survival(weight: Weight, update: Update, H_II: torch.Tensor) -> Survival:
    solution, energy = update.solution, update.energy
    found = survival_of(
        weight.origin_OI,
        weight.merged_OI,
        float(solution.scales_OG.float().mean()),
        energy=energy,
        kept=(update.survival or 0.0) * energy,
        error=solution.loss,
        codes_OI=solution.codes_OI,
        base_codes_OI=weight.base.codes_OI if weight.base is not None else None,
    )
    if weight.original_OI is None or weight.quantized_OI is None:
        return found
    ratio = error_ratio(weight.original_OI, weight.quantized_OI, H_II, found.energy)
    return replace(found, error_ratio=ratio)
