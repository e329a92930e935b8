"""From the inputs again: untouched weights are the base's, the others the merged ones requantized,
and of the update there is left what the report says.

O, I: out and in features; W, S, H: windows, tokens of a window, hidden width.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qmerge.errors import PlanError, RecipeError
from qmerge.formats.integer import IntegerWeight
from qmerge.gptq import Hessian
from qmerge.job import Job
from qmerge.measure import linear_survival, output_power, pool_survival, relative_error
from qmerge.model.experts import calibrating, count_choices
from qmerge.model.frame import ROWS_AT_ONCE, Frame
from qmerge.model.layer import Call, before_linears, fill, move, run, sibling_groups
from qmerge.model.streams import Stream, Streams, batches
from qmerge.model.weights import Weights
from qmerge.names import WEIGHT, Unit, join
from qmerge.options import build
from qmerge.plan import plan_proof
from qmerge.precision import reduced_precision
from qmerge.progress import Progress
from qmerge.provenance import folder_record
from qmerge.recipe import Recipe
from qmerge.release import RECIPE
from qmerge.results import InputRecord, LinearResult, RunResult, Survival
from qmerge.stages.merge import live_layer, merge_layer, outer_weights
from qmerge.verify.findings import Findings

FAR = 0.01
"""Relative difference of a figure that arithmetic on another machine may bring; on the same one it
is below 0.0001."""
ALIKE = 0.25
"""Least cosine of a packed weight with the merged one, none where they have nothing in common.
With 2 bits and corrections of what earlier layers lost, a tiny model's worst linear has 0.5."""
CANCELLED = 2.0**-20
"""Share of a merged weight's largest value: what is left where float32 cancels depends on the order
of sums. In another order they differ by up to 2^-22 of it (2048 x 2048, rank 16), and some 10
values in 4 million by more than an ulp of bf16."""
TEXT = "calibration"
CALIBRATION = "--calibration"
"""Where a plan tells faults of the calibration text."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Against:
    """The folders that a release is proved from."""

    base: Path
    adapters: tuple[Path, ...]
    original: Path | None


def check_against(
    folder: Path,
    release: Weights,
    result: RunResult,
    against: Against,
    findings: Findings,
    progress: Progress,
) -> None:
    """Make the merge again, layer by layer, and hold the release against it."""
    with findings.at("inputs"):
        recipe = _recipe(folder, result, against)
        _check_inputs(recipe, result, findings)
        job, lost = _job(recipe)
        proof = Proof(job, release, result, lost)
        proof.run(progress)
        proof.tell(findings)


class Proof:
    """One pass over the units, from the inputs."""

    def __init__(self, job: Job, release: Weights, result: RunResult, lost: str | None) -> None:
        """`lost` says why the calibration text is not at hand, where it is not."""
        assert result.strategy is not None
        self.job = job
        self.release = release
        self.result = result
        origin = job.base if result.strategy.chosen == "dequantize" else job.original
        assert origin is not None
        self.origin = origin
        self.reported = {each.name: each for layer in result.layers for each in layer.linears}
        self.untouched = self.changed = 0
        self.cosines: list[float] = []
        self.wrong: dict[str, list[str]] = {"untouched": [], "merged": [], "requantized": []}
        self.wrong |= {"update": [], "survival": [], "error": []}
        self.survivals: dict[str, Survival] = {}
        self.lost = lost

    def run(self, progress: Progress) -> None:
        units = self.job.skeleton.units()
        merged_outer = outer_weights(self.job.skeleton, self.job.change, units, self.origin)
        progress.stage("prove", len(units))
        with tempfile.TemporaryDirectory(prefix="qmerge-") as scratch:
            text = _Text(self.job, self.release, Path(scratch)) if self.lost is None else None
            for unit in units:
                progress.step(unit.label)
                if unit.kind != "layer":
                    self._compare(unit.parameters, merged_outer.tensor)
                    for head in self.job.targets_of(unit):
                        self._head(head, merged_outer, text.head() if text is not None else None)
                    continue
                origin = self.origin.unit(unit)
                live = live_layer(self.job.skeleton, self.job.change, unit, origin)
                relative = merge_layer(self.job.change, live)
                merged = {join(unit.path, name): tensor for name, tensor in relative.items()}
                self._compare(unit.parameters, merged.__getitem__)
                seconds = text.layer(unit) if text is not None else {}
                self._survival(unit, origin, relative, seconds)

    def tell(self, findings: Findings) -> None:
        source = "original" if self.origin is self.job.original else "base"
        quantized, cosine = len(self.reported), min(self.cosines, default=1.0)
        for name, well in (
            ("untouched", f"{self.untouched} untouched tensors are the {source}'s, byte for byte"),
            ("merged", f"{self.changed} tensors are the merged ones, rounded once"),
            (
                "requantized",
                f"{len(self.cosines)} packed weights are merged ones, requantized: least cosine"
                f" {cosine:.2f}",
            ),
            ("update", f"steps, codes and update are as reported in all {quantized} linears"),
        ):
            findings.say(name, self.wrong[name], well)
        if self.lost is not None:
            for name in ("error", "survival"):
                text = f"needs the calibration text, which is not at hand: {self.lost}"
                findings.add(name, "skip", text)
            return
        well = f"the error on the calibration text is as reported in all {quantized} linears"
        findings.say("error", self.wrong["error"], well)
        found, said = pool_survival(self.survivals.values()), self.result.survival
        shown = _shown(found)
        if _shown(said) != shown and not _like(found, said, ("survival", "noise")):
            self.wrong["survival"].append(f"of the whole {shown}, reported {_shown(said)}")
        findings.say("survival", self.wrong["survival"], f"{shown}, measured again, as reported")

    def _compare(self, names: Iterable[str], merged: Callable[[str], torch.Tensor]) -> None:
        """One unit's tensors as they are stored against what they should be."""
        touched = self.job.touched
        for name in names:
            if self.release.is_quantized(name):
                self._near(name, merged(name))
                continue
            stored, source = self.release.as_stored(name), self.origin.as_stored(name)
            assert stored is not None
            if name not in touched and source is not None:
                self.untouched += 1
                if not _same_bytes(stored, source):
                    self.wrong["untouched"].append(name)
            else:
                self.changed += 1
                rounded = merged(name).to(self.job.base.dense_dtype(name))
                if not _same_bytes(stored, rounded) and not (
                    self._is_computed(name) and _same_but_for_sums(stored, rounded)
                ):
                    self.wrong["merged"].append(name)

    def _is_computed(self, name: str) -> bool:
        """Whether the adapter was merged into a parameter, and does not bring it as a whole."""
        change = self.job.change
        return change is not None and name in change.touched and not change.replaces(name)

    def _near(self, name: str, merged_OI: torch.Tensor) -> None:
        stored_OI = self.release.tensor(name)
        cosine = torch.nn.functional.cosine_similarity(stored_OI.flatten(), merged_OI.flatten(), 0)
        self.cosines.append(float(cosine))
        if bool(merged_OI.any()) and not float(cosine) >= ALIKE:
            self.wrong["requantized"].append(f"{name} has nothing of the merged one")

    def _survival(
        self, unit: Unit, origin: Tensors, merged: Tensors, seconds: Mapping[str, Hessian]
    ) -> None:
        """The figures of each packed linear; without second moments those that need none."""
        for name in self.job.targets_of(unit):
            full = join(unit.path, name)
            said = self.reported.get(full)
            packed = self.release.is_quantized(full + WEIGHT)
            grid = self.release.integer(full + WEIGHT) if packed else None
            if said is None or grid is None:
                continue  # told by the check of the claims
            base = self.job.base.integer(full + WEIGHT)
            merged_OI, release_OI = merged[name + WEIGHT], grid.dense()
            H_II = seconds[name].mean().cpu() if seconds else torch.eye(merged_OI.shape[1])
            found = _measured(origin[name + WEIGHT], merged_OI, release_OI, H_II, grid, base)
            self.survivals[full] = found
            self._hold(full, found, said)
            if seconds and not _close(relative_error(merged_OI, release_OI, H_II), said.error):
                self.wrong["error"].append(full)

    def _head(self, name: str, merged: Weights, second: Hessian | None) -> None:
        """As `_survival`, of a packed head, which has too many rows to be looked at as a whole."""
        parameter, said = name + WEIGHT, self.reported.get(name)
        packed = self.release.is_quantized(parameter)
        grid = self.release.integer(parameter) if packed else None
        if said is None or grid is None:
            return
        base = None if parameter in self.origin.resized else self.job.base.integer(parameter)
        H_II = second.mean().cpu() if second is not None else torch.eye(grid.codes_OI.shape[1])
        found, lost, power = [], 0.0, 0.0
        for start, stop in batches(merged.row_count(parameter), ROWS_AT_ONCE):
            merged_OI = merged.rows(parameter, start, stop)
            part = grid.rows(start, stop)
            found.append(
                _measured(
                    self.origin.rows(parameter, start, stop),
                    merged_OI,
                    part.dense(),
                    H_II,
                    part,
                    base.rows(start, stop) if base is not None else None,
                )
            )
            lost += output_power(part.dense() - merged_OI, H_II)
            power += output_power(merged_OI, H_II)
        pooled = pool_survival(found)
        assert pooled is not None
        self.survivals[name] = pooled
        self._hold(name, pooled, said)
        if second is not None and not _close(lost / power if power > 0 else None, said.error):
            self.wrong["error"].append(name)

    def _hold(self, name: str, found: Survival, said: LinearResult) -> None:
        """The figures that need no text, and with it those that do."""
        weighed = ("update_rms", "step", "elements", "codes_changed")
        if not _like(found, said.survival, weighed):
            self.wrong["update"].append(name)
        if self.lost is None and not _like(found, said.survival, ("survival", "noise")):
            text = f"{name}: {_shown(found)}, reported {_shown(said.survival)}"
            self.wrong["survival"].append(text)


def _measured(
    origin_OI: torch.Tensor,
    merged_OI: torch.Tensor,
    release_OI: torch.Tensor,
    H_II: torch.Tensor,
    grid: IntegerWeight,
    base: IntegerWeight | None,
) -> Survival:
    return linear_survival(
        origin_OI,
        merged_OI,
        release_OI,
        H_II,
        float(grid.scales_OG.float().mean()),
        codes_OI=grid.codes_OI,
        base_codes_OI=base.codes_OI if base is not None else None,
    )


class _Text:
    """The calibration text through the release, as it was when each linear was quantized."""

    def __init__(self, job: Job, release: Weights, scratch: Path) -> None:
        self.job, self.release = job, release
        windows, length = job.calibration.tokens.shape
        width = job.skeleton.hidden_size
        self.streams = Streams(scratch, {TEXT: Stream(windows=windows, length=length, width=width)})
        self.frame = frame = Frame(job.skeleton, release)
        calls = frame.enter_all(
            job.calibration.tokens,
            job.calibration.inputs,
            job.at_once,
            lambda hidden: self.streams.append(TEXT, hidden),
        )
        self.calls = move(calls, job.device)
        self.streams.turn()

    def layer(self, unit: Unit) -> dict[str, Hessian]:
        """Second moments of what the linears of one layer read; siblings share theirs."""
        layer = self.job.skeleton.layer(unit.index)
        fill(layer, self.release.unit(unit))
        layer.to(self.job.device)
        call = self.calls[unit.index]
        modules = {name: layer.get_submodule(name) for name in self.job.targets_of(unit)}
        first = self.streams.read(TEXT, 0, 1).to(self.job.device)
        groups = sibling_groups(layer, first, call.part(0, 1), modules)
        moments = {
            group[0]: Hessian(self._width(unit, group[0]), device=self.job.device)
            for group in groups
        }
        with (
            reduced_precision(self.job.settings.reduced),
            calibrating(layer, count_choices(layer, self._forwards(layer, call))),
            before_linears(
                layer, {name: modules[name] for name in moments}, lambda n, x: moments[n].add(x)
            ),
        ):
            for forward in self._forwards(layer, call):
                self.streams.append(TEXT, forward())
        self.streams.turn()
        return {name: moments[group[0]] for group in groups for name in group}

    def head(self) -> Hessian:
        """The second moment of what the head reads."""
        found: Hessian | None = None
        for start, stop in self._batches():
            inputs = self.frame.leave(self.streams.read(TEXT, start, stop))
            found = found or Hessian(inputs.shape[-1])
            found.add(inputs)
        assert found is not None
        return found

    def _forwards(self, layer: nn.Module, call: Call) -> Iterator[Callable[[], torch.Tensor]]:
        for start, stop in self._batches():
            hidden = self.streams.read(TEXT, start, stop).to(self.job.device)
            yield partial(run, layer, hidden, call.part(start, stop))

    def _width(self, unit: Unit, name: str) -> int:
        return self.release.shape(join(unit.path, name) + WEIGHT)[1]

    def _batches(self) -> Iterator[tuple[int, int]]:
        return batches(self.streams.stream(TEXT).windows, self.job.at_once)


def _recipe(folder: Path, result: RunResult, against: Against) -> Recipe:
    """The release's own recipe on the folders given."""
    recipe = build(Recipe, {}, file=folder / RECIPE)
    asked = recipe.adapters()
    if len(asked) != len(against.adapters):
        raise RecipeError(
            f"the release has {len(asked)} adapters, {len(against.adapters)} are given"
        )
    assert result.strategy is not None
    original = against.original
    if result.strategy.chosen == "substitute" and original is None:
        raise RecipeError(
            "the adapter was merged onto the original, which is not given",
            hint="give it with --original",
        )
    return replace(
        recipe,
        base=against.base,
        adapter=tuple(
            f"{given}@{each.weight}" for given, each in zip(against.adapters, asked, strict=True)
        ),
        original=original,
        strategy="dequantize" if result.strategy.chosen == "dequantize" else "substitute",
        previous=None,
        device="auto",
        out=folder / "not written",
    )


def _check_inputs(recipe: Recipe, result: RunResult, findings: Findings) -> None:
    """The folders given are those that the report names, file by file."""
    wrong = []
    for role, folder in recipe.folders().items():
        said = result.inputs.get(role, InputRecord(path="")).files
        found = folder_record(folder).files
        names = sorted(n for n in found.keys() | said.keys() if found.get(n) != said.get(n))
        wrong += [f"{role}: {name} is not what the report says" for name in names]
    findings.say("inputs", wrong, "base and adapter are those that the report names")


def _job(recipe: Recipe) -> tuple[Job, str | None]:
    """The plan of the run again, and why its calibration text cannot be had, where it cannot."""
    try:
        return plan_proof(recipe), None
    except PlanError as error:
        if any(fault.where != CALIBRATION for fault in error.faults):
            raise
        lost = error.faults[0].message
    return plan_proof(replace(recipe, calibration=None, calibration_samples=1)), lost


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(
        first.contiguous().view(torch.uint8), second.contiguous().cpu().view(torch.uint8)
    )


def _same_but_for_sums(stored: torch.Tensor, merged: torch.Tensor) -> bool:
    """Whether a merged weight may be the stored one: each value is the same, one ulp of its dtype
    off, as where another device's sums are rounded, or as near as `CANCELLED` allows."""
    if stored.dtype != merged.dtype or stored.shape != merged.shape:
        return False
    merged = merged.cpu()
    off = stored != merged
    own, made = stored[off], merged[off]
    low, high = (torch.nextafter(made, made.new_tensor(end)) for end in (-math.inf, math.inf))
    slack = CANCELLED * float(merged.abs().max())
    near = (own.double() - made.double()).abs() <= slack
    return bool((near | ((own >= low) & (own <= high))).all())


def _like(found: Survival | None, said: Survival | None, keys: tuple[str, ...]) -> bool:
    return all(_close(getattr(found, key, None), getattr(said, key, None)) for key in keys)


def _close(found: float | None, said: float | None) -> bool:
    if found is None or said is None:
        return found is None and said is None
    return math.isclose(found, said, rel_tol=FAR, abs_tol=1e-9)


def _shown(survival: Survival | None) -> str:
    if survival is None or survival.survival is None or survival.noise is None:
        return "no update"
    return f"survival {survival.survival:.3f}, noise {survival.noise:.3g}"
