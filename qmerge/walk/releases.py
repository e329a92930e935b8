"""The releases in the making, one for each strategy: what is quantized of a unit, and what of it is
written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from qmerge.formats import IntegerWeight
from qmerge.formats.writing import pack
from qmerge.job import REFERENCE, merged_arm, release_arm
from qmerge.measure.survival import pool_survival
from qmerge.model.frame import Frame
from qmerge.model.layer import Call, move
from qmerge.model.streams import batches
from qmerge.names import WEIGHT, Unit, join
from qmerge.results import LayerResult
from qmerge.stages.head import gather, requantize_head
from qmerge.stages.requantize import Calibration, ReadWindows, Requantizer, Weight
from qmerge.walk.ground import Ground, Tensors, calibration_key, reference_key
from qmerge.walk.notes import LayerNotes

FEW = 16
"""Tokens that show how a layer's linears hang together."""


class Releases:
    """What calibration text makes of each release, and of the reference that it aims at, advances
    with it."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._job = ground.job
        few = min(FEW, int(ground.job.calibration.tokens.shape[1]))
        self._few = move(ground.frames[REFERENCE].calls(few), ground.job.device)
        self._seen: dict[str, tuple[Call, ...]] = {}
        """What layers are called with on calibration text with images, by stream."""

    def enter(self) -> None:
        """First hidden states of the calibration text."""
        for key, frame in self._frames().items():
            self._see(key, frame, partial(self._ground.streams.append, key))

    def resume(self) -> None:
        """Where the hidden states are on disk: what layers are called with beside them."""
        if self._job.calibration.inputs:
            for key, frame in self._frames().items():
                self._see(key, frame, lambda _hidden: None)

    def weights(
        self, unit: Unit, strategy: str, merged: Tensors, origins: Mapping[str, Tensors]
    ) -> dict[str, Weight]:
        """What of a layer is to be quantized, and what that is measured against."""
        original = origins.get("substitute", {}) if self._job.compared else {}
        return {
            name: Weight(
                merged_OI=merged[name + WEIGHT],
                origin_OI=origins[strategy][name + WEIGHT],
                base=self._integer(join(unit.path, name) + WEIGHT),
                spec=self._job.specs[join(unit.path, name)],
                quantized_OI=origins["dequantize"][name + WEIGHT],
                original_OI=original.get(name + WEIGHT),
            )
            for name in self._job.targets_of(unit)
        }

    def layer(
        self,
        unit: Unit,
        strategy: str,
        merged: Tensors,
        weights: dict[str, Weight],
        notes: LayerNotes,
    ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """Quantize one layer under the calibration set: as it is run, and what is written of it, by
        stored name."""
        self._ground.progress.doing(f"quantizing ({strategy})")
        written = self._as_written(unit, strategy, merged)
        dense = {name: tensor.float() for name, tensor in written.items()}
        layer = self._ground.layer(unit, {**merged, **dense})
        reference = self._ground.layer(unit, merged)
        work = Requantizer(layer, reference, weights, self._job.settings)
        key, twin = calibration_key(strategy), reference_key(strategy)
        with self._ground.timed("requantize"):
            for hidden, expected in work.run(self._calibration(key, twin, unit)):
                self._ground.streams.append(key, hidden)
                if expected is not None:
                    self._ground.streams.append(twin, expected)
        notes.linears[strategy] = [
            replace(work.results[name], name=join(unit.path, name))
            for name in self._job.targets_of(unit)
        ]
        notes.remedies[strategy] = [
            replace(found, where=tuple(join(unit.path, name) for name in found.where))
            for found in work.remedies
        ]
        return layer, self._stored(unit, written, work.packed)

    def outer(self, unit: Unit, strategy: str) -> dict[str, torch.Tensor]:
        """Tensors of a unit outside the layers as they are written, by stored name."""
        weights = self._ground.weights[release_arm(strategy)]
        tensors = {}
        packed = {name + WEIGHT for name in self._job.targets_of(unit)}
        for parameter in unit.parameters:
            if parameter in packed:
                continue
            changed = weights.changed.get(parameter)
            stored = weights.as_stored(parameter) if changed is None else None
            if stored is None:
                value = changed if changed is not None else weights.tensor(parameter)
                stored = value.to(self._job.base.dense_dtype(parameter))
            tensors[self._job.base.names.to_write(parameter)] = stored
        return tensors

    def head(self, strategy: str, name: str) -> tuple[LayerResult, dict[str, torch.Tensor]]:
        """Quantize the head under what it reads of the calibration set; from here on the release is
        scored with it. What came of it, and what is written."""
        began, parameter, arm = time.monotonic(), name + WEIGHT, release_arm(strategy)
        self._ground.progress.doing(f"quantizing {name} ({strategy})")
        settings, device = self._job.settings, self._job.device
        merged = self._ground.weights[merged_arm(strategy)]
        source = self._ground.source(strategy)
        base = None if parameter in self._job.base.resized else self._job.base.integer(parameter)

        def rows(start: int, stop: int) -> Weight:
            return Weight(
                merged_OI=merged.rows(parameter, start, stop).to(device),
                origin_OI=source.rows(parameter, start, stop).to(device),
                base=base.rows(start, stop).to(device) if base is not None else None,
                spec=self._job.specs[name],
            )

        with self._ground.timed("requantize"):
            inputs, width = self._head_inputs(strategy), merged.shape(parameter)[1]
            means = gather(inputs, width, device, paired=settings.asymmetric)
            count = merged.row_count(parameter)
            grid, result = requantize_head(name, rows, count, means, settings)
        own = replace(self._ground.weights[arm], packed={parameter: grid})
        self._ground.frames[arm] = Frame(self._job.skeleton, own)
        packed = self._packed(name, grid)
        layer = LayerResult(
            name=name,
            kind="head",
            seconds=time.monotonic() - began,
            bytes=sum(tensor.nbytes for tensor in packed.values()),
            linears=(result,),
            survival=pool_survival([result.survival]),
        )
        return layer, packed

    # Calibration text

    def _frames(self) -> dict[str, Frame]:
        """The frame that each stream of calibration text enters through."""
        found = {}
        for strategy in self._job.strategies:
            found[calibration_key(strategy)] = self._ground.frames[release_arm(strategy)]
            if self._job.settings.asymmetric:
                arm = merged_arm(strategy) if self._job.change is not None else REFERENCE
                found[reference_key(strategy)] = self._ground.frames[arm]
        return found

    def _see(self, key: str, frame: Frame, keep: Callable[[torch.Tensor], None]) -> None:
        self._ground.progress.doing(key.replace("@", " by "))
        text, at_once = self._job.calibration, self._job.at_once
        calls = frame.enter_all(text.tokens, text.inputs, at_once, keep)
        self._seen[key] = move(calls, self._job.device)

    def _calibration(self, key: str, twin: str, unit: Unit) -> Calibration:
        return Calibration(
            read=self._reader(key, unit),
            read_reference=self._reader(twin, unit) if self._job.settings.asymmetric else None,
            sample=self._sample(key, unit),
            windows=self._job.calibration.tokens.shape[0],
            at_once=self._job.at_once,
            waiting=self._job.waiting,
        )

    def _reader(self, key: str, unit: Unit) -> ReadWindows:
        call = self._seen.get(key, self._ground.calls)[unit.index]

        def read(start: int, stop: int) -> tuple[torch.Tensor, Call]:
            hidden = self._ground.streams.read(key, start, stop).to(self._job.device)
            return hidden, call.part(start, stop)

        return read

    def _sample(self, key: str, unit: Unit) -> tuple[torch.Tensor, Call]:
        """The first tokens of the first window; all of one that may hold images."""
        hidden, call = self._reader(key, unit)(0, 1)
        if self._job.calibration.inputs:
            return hidden, call
        return hidden[:, :FEW], self._few[unit.index]

    def _head_inputs(self, strategy: str) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """What the head reads of the calibration set: the release's own and the reference's."""
        frames, windows = self._frames(), self._job.calibration.tokens.shape[0]
        for start, stop in batches(windows, self._job.at_once):
            release, reference = (
                frames[key].leave(self._ground.streams.read(key, start, stop)).to(self._job.device)
                if key in frames
                else None
                for key in (calibration_key(strategy), reference_key(strategy))
            )
            assert release is not None
            yield release, reference

    # What is written

    def _integer(self, parameter: str) -> IntegerWeight | None:
        weight = self._job.base.integer(parameter)
        return weight.to(self._job.device) if weight is not None else None

    def _as_written(self, unit: Unit, strategy: str, merged: Tensors) -> dict[str, torch.Tensor]:
        """The layer's tensors that stay dense, in the dtype and, untouched, the bytes on disk."""
        packed = {name + WEIGHT for name in self._job.targets_of(unit)}
        return {
            name: self._dense(join(unit.path, name), strategy, merged[name])
            for name in merged
            if name not in packed
        }

    def _dense(self, parameter: str, strategy: str, value: torch.Tensor) -> torch.Tensor:
        if parameter not in self._job.touched:
            stored = self._ground.source(strategy).as_stored(parameter)
            if stored is not None:
                return stored
        return value.to("cpu", self._job.base.dense_dtype(parameter))

    def _stored(
        self, unit: Unit, written: Tensors, packed: Mapping[str, IntegerWeight]
    ) -> dict[str, torch.Tensor]:
        base = self._job.base
        tensors = {
            base.names.to_write(full): base.on_disk(full, tensor)
            for name, tensor in written.items()
            if (full := join(unit.path, name))
        }
        for name, weight in packed.items():
            tensors |= self._packed(join(unit.path, name), weight)
        return tensors

    def _packed(self, name: str, weight: IntegerWeight) -> dict[str, torch.Tensor]:
        module = self._job.base.names.module_to_write(name)
        packed = pack(weight, self._job.settings.format)
        return {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
