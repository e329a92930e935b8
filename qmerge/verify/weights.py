"""The weights of a release: each decoded, compared with what is claimed, siblings with each other.

O, I: out and in features; G: groups along I.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from qmerge.errors import QmergeError
from qmerge.formats.gptq import served_together
from qmerge.formats.integer import IntegerWeight
from qmerge.model.experts import blocks_of
from qmerge.model.frame import ROWS_AT_ONCE, Frame
from qmerge.model.layer import Call, fill, linears, sibling_groups
from qmerge.model.skeleton import Skeleton
from qmerge.model.weights import Weights
from qmerge.names import WEIGHT, Unit, join, module_of
from qmerge.progress import Progress
from qmerge.results import LinearResult, RunResult
from qmerge.verify.findings import Findings

TOKENS = 4
"""Tokens that are sent through a layer to see which linears read the same input."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What a server that fuses siblings needs to be equal among them."""

    bits: int
    group_size: int
    symmetric: bool
    g_idx: bytes | None


class WeightChecks:
    """One pass over the units of an opened release."""

    def __init__(self, skeleton: Skeleton, weights: Weights) -> None:
        self.skeleton = skeleton
        self.weights = weights
        self.wrong: dict[str, list[str]] = defaultdict(list)
        self.packed: dict[str, Packed] = {}
        """By module, by the model's own name."""
        self.siblings: list[tuple[str, ...]] = []

    def run(self, progress: Progress) -> None:
        units = self.skeleton.units()
        calls = Frame(self.skeleton, self.weights).calls(TOKENS)
        progress.stage("decode", len(units))
        for unit in units:
            progress.step(unit.label)
            if unit.kind != "layer":
                self._outside(unit)
                continue
            decoded = {name: self._decode(name) for name in unit.parameters}
            own = {name: tensor for name, tensor in decoded.items() if tensor is not None}
            self.siblings += self._siblings(unit, own, calls[unit.index])

    def tell(self, findings: Findings, result: RunResult) -> None:
        """What the report does not call quantized, was dense in the base already: it may lie beside
        linears that are packed."""
        claimed = {linear.name for layer in result.layers for linear in layer.linears}
        known = claimed | self.packed.keys()
        for name, text in (
            ("decoded", f"all {len(self.packed)} packed weights decode to finite values"),
            ("dense", "every other tensor is finite"),
            ("codes", "codes are within their bits"),
            ("scales", "steps are finite and above zero"),
            ("zeros", "zero points are codes, and in the middle where the grid is symmetric"),
            ("groups", "each group has its columns"),
        ):
            findings.say(name, self.wrong[name], text)
        self._tell_experts(findings, known)
        sets = [[name for name in group if name in known] for group in self.siblings]
        torn = [f"{', '.join(group)} differ" for group in sets if group and not self._agree(group)]
        findings.say("siblings", torn, f"{len(sets)} sets that servers fuse agree")

    def _tell_experts(self, findings: Findings, known: Collection[str]) -> None:
        """Servers run the experts of a block as one, with one kind of code."""
        blocks = {
            path: {
                (own.bits, own.symmetric) if (own := self.packed.get(join(path, name))) else None
                for name in linears(block)
                if join(path, name) in known
            }
            for path, block in blocks_of(self.skeleton.model)
        }
        mixed = [f"those of {path} differ" for path, kinds in blocks.items() if len(kinds) > 1]
        if blocks:
            findings.say("experts", mixed, f"those of each of {len(blocks)} blocks are alike")

    def _outside(self, unit: Unit) -> None:
        """Embeddings and heads are large: a few rows at a time."""
        for name in unit.parameters:
            if self.weights.is_quantized(name) or not self.weights.shape(name):
                self._decode(name)
                continue
            for start in range(0, self.weights.shape(name)[0], ROWS_AT_ONCE):
                stop = min(start + ROWS_AT_ONCE, self.weights.shape(name)[0])
                if not bool(torch.isfinite(self.weights.rows(name, start, stop)).all()):
                    self.wrong["dense"].append(f"{name} is not finite in rows {start} to {stop}")

    def _decode(self, parameter: str) -> torch.Tensor | None:
        """The parameter in float32, and every complaint about it."""
        quantized = self.weights.is_quantized(parameter)
        try:
            grid = self.weights.integer(parameter) if quantized else None
            tensor = grid.dense() if grid is not None else self.weights.tensor(parameter)
        except QmergeError as error:
            self.wrong["decoded" if quantized else "dense"].append(error.message)
            return None
        if not bool(torch.isfinite(tensor).all()):
            self.wrong["decoded" if quantized else "dense"].append(f"{parameter} is not finite")
        if grid is not None:
            self._check_grid(parameter, grid)
        return tensor

    def _check_grid(self, parameter: str, grid: IntegerWeight) -> None:
        module, top = module_of(parameter), (1 << grid.bits) - 1
        index = self._stored_index(parameter)
        self.packed[module] = Packed(
            bits=grid.bits,
            group_size=grid.group_size,
            symmetric=grid.symmetric,
            g_idx=None if grid.g_idx_I is None else grid.g_idx_I.numpy().tobytes(),
        )
        for name, holds in (
            ("codes", int(grid.codes_OI.max()) <= top),
            ("scales", bool((grid.scales_OG > 0).all())),
            ("zeros", _zeros_fit(grid, top)),
            ("groups", index is None or _is_even(index, grid)),
        ):
            if not holds:
                self.wrong[name].append(module)

    def _stored_index(self, parameter: str) -> torch.Tensor | None:
        """The index as it is stored: a reader passes over one that was never filled in."""
        sources = self.weights.format.weights[self.weights.names.stored[parameter]].sources
        names = [name for name in sources if name.endswith("g_idx")]
        return self.weights.checkpoint.read(names[0]) if names else None

    def _siblings(
        self, unit: Unit, decoded: Mapping[str, torch.Tensor], call: Call
    ) -> Iterator[tuple[str, ...]]:
        """Linears that servers fuse."""
        layer = self.skeleton.layer(unit.index)
        relative = {name[len(unit.path) + 1 :]: tensor for name, tensor in decoded.items()}
        if len(relative) < len(unit.parameters):
            return
        fill(layer, relative)
        width = self.skeleton.hidden_size
        hidden = torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(0))
        for group in sibling_groups(layer, hidden, call, linears(layer)):
            for names in served_together(join(unit.path, name) for name in group):
                if len(names) > 1:
                    yield tuple(names)

    def _agree(self, group: Iterable[str]) -> bool:
        return len({self.packed.get(name) for name in group}) == 1


def _zeros_fit(grid: IntegerWeight, top: int) -> bool:
    zeros = grid.zeros_OG
    if grid.symmetric:
        return bool((zeros == 1 << (grid.bits - 1)).all())
    return int(zeros.min()) >= 0 and int(zeros.max()) <= top


def _is_even(index: torch.Tensor, grid: IntegerWeight) -> bool:
    """Whether each group has as many columns as the group size says."""
    width, groups = grid.codes_OI.shape[1], grid.scales_OG.shape[1]
    if int(index.min()) < 0 or int(index.max()) >= groups:
        return False
    columns = width if grid.group_size == -1 else grid.group_size
    return bool((index.long().bincount(minlength=groups) == columns).all())


def check_claims(result: RunResult, checks: WeightChecks, findings: Findings) -> None:
    """What the report says is quantized, and how, against what is stored."""
    claimed = {linear.name: linear for layer in result.layers for linear in layer.linears}
    weights = checks.weights
    known = weights.names.stored
    quantized = {module_of(name) for name in known if weights.is_quantized(name)}
    wrong = [
        f"{name} is claimed to be {claimed[name].bits} bits and is {_stored(weights, name)}"
        for name in claimed.keys() - quantized
    ]
    wrong += [f"{name} is packed, and not claimed to be" for name in quantized - claimed.keys()]
    wrong += [
        f"{name} is {packed.bits} bits in groups of {packed.group_size}, and claimed to be"
        f" {claimed[name].bits} in {claimed[name].group_size}"
        for name, packed in checks.packed.items()
        if name in claimed and not _fits(claimed[name], packed, weights.shape(name + WEIGHT))
    ]
    well = f"the {len(claimed)} linears that the report calls quantized are, as it says"
    findings.say("claims", sorted(wrong), well)


def _stored(weights: Weights, module: str) -> str:
    stored = weights.names.stored.get(module + WEIGHT)
    if stored is None:
        return "nothing"
    return str(weights.format.weights[stored].dtype).removeprefix("torch.")


def _fits(claim: LinearResult, packed: Packed, shape: tuple[int, ...]) -> bool:
    """Bits and group size; one group over the whole input has two spellings."""
    width = shape[1]
    sizes = [width if size in (-1, None) or size >= width else size
             for size in (claim.group_size, packed.group_size)]  # fmt: skip
    return claim.bits == packed.bits and sizes[0] == sizes[1]
