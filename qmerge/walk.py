"""The walk: every arm and every release through the units of the model, once.

An arm is a model that is scored; a strategy makes a `merged` and a `release` arm. The units before
and after the layers are read where they are needed; each layer is opened, run, merged, quantized,
written and let go.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from qmerge.corpus import Corpus
from qmerge.formats import IntegerWeight
from qmerge.formats.writing import pack
from qmerge.job import NOISE_WINDOWS, Job, arm_names
from qmerge.measure.survival import pool_survival
from qmerge.meter import Meter
from qmerge.model.frame import ROWS_AT_ONCE, Frame
from qmerge.model.layer import Call, fill, move
from qmerge.model.streams import Stream, Streams, batches
from qmerge.model.weights import Weights, model_dtype
from qmerge.names import WEIGHT, Unit, join
from qmerge.progress import Progress, Silent
from qmerge.results import LayerResult, LinearResult, MergeCheck, Remedy, decode, encode
from qmerge.stages.evaluate import Scored, advance, distance, key_of, lens, score
from qmerge.stages.head import gather, requantize_head
from qmerge.stages.merge import live_layer, live_outer, merge_layer, outer_weights
from qmerge.stages.requantize import Calibration, ReadWindows, Requantizer, Weight
from qmerge.storage.shards import ShardRecord, write_shard
from qmerge.workspace import Workspace

REFERENCE = "trained"
NOISE = "noise_floor"
CHECKED_TOKENS = 64
"""Tokens whose logits are compared between the merged model and the live adapter."""
FEW = 16
"""Tokens that show how a layer's linears hang together."""
Tensors = Mapping[str, torch.Tensor]


def merged_arm(strategy: str) -> str:
    return f"merged@{strategy}"


def release_arm(strategy: str) -> str:
    return f"release@{strategy}"


def calibration_key(strategy: str) -> str:
    """The stream of calibration text through the release in the making."""
    return f"calibration@{strategy}"


def reference_key(strategy: str) -> str:
    """The stream of calibration text through the merged model that the release aims at."""
    return f"reference@{strategy}"


def live_key(strategy: str) -> str:
    """The stream of the first calibration window through the adapter, live on its base."""
    return f"live@{strategy}"


def dense_key(strategy: str) -> str:
    """The stream of the same window through the merged layers."""
    return f"dense@{strategy}"


class Walk:
    """One pass over the units of a job, continued from what the workspace has."""

    def __init__(self, job: Job, workspace: Workspace, progress: Progress, meter: Meter) -> None:
        self.job = job
        self.workspace = workspace
        self.progress = progress
        self.layers: dict[str, list[LayerResult]] = {name: [] for name in job.strategies}
        self.records: dict[str, list[ShardRecord]] = {name: [] for name in job.strategies}
        self.meter = meter
        self.seconds_before = 0.0
        """What the units took that another process finished."""
        self._told = dict(meter.seconds)
        self.units = job.skeleton.units()
        self.rounding = model_dtype(job.base.checkpoint.config)
        self.weights = _outer_weights(job, self.units)
        self.frames = _frames(job, self.weights)
        self.streams = Streams(workspace.streams, _streams(job))
        frame = self._base_frame()
        self.calls = move(frame.calls(self._length()), job.device)
        self.few = move(frame.calls(min(FEW, self._length())), job.device)
        self.seen: dict[str, tuple[Call, ...]] = {}
        """What layers are called with on calibration text with images, by stream."""

    def resume(self) -> set[str]:
        """Take over what was finished before; the labels of those units."""
        finished = self.workspace.finished()
        for unit in self.units:
            if unit.kind == "head" and self.job.targets_of(unit):
                finished.pop(unit.label, None)  # a packed head is needed for the scores
                break
            if unit.label not in finished:
                break
            self._take_over(finished[unit.label])
        if finished:
            if self.job.calibration.inputs:
                for key, frame in self._calibrated().items():
                    self._calibrate(key, frame, lambda _hidden: None)
            last = [event for event in finished.values() if event["streams"]][-1]
            self.streams.generation = int(last["generation"])
            self.streams.check(last["streams"])
        return set(finished)

    def embedding(self, unit: Unit) -> None:
        """First hidden states of every arm, and the first shard."""
        with self._timed("embedding"):
            for arm in arm_names(self.job):
                for corpus in self.job.evaluation:
                    self._enter(self.frames[arm], key_of(arm, corpus.name), corpus.tokens)
            for corpus in self.job.evaluation:
                few = corpus.tokens[:NOISE_WINDOWS]
                self._enter(self.frames[REFERENCE], key_of(NOISE, corpus.name), few)
            for key, frame in self._calibrated().items():
                self._calibrate(key, frame, partial(self.streams.append, key))
            for strategy in self.job.strategies if self.job.change is not None else ():
                for key in (live_key(strategy), dense_key(strategy)):
                    frame = self.frames[merged_arm(strategy)]
                    self._enter(frame, key, self.job.calibration.tokens[:1])
        self._commit(unit, {s: self._outer_tensors(unit, s) for s in self.job.strategies}, {})

    def layer(self, unit: Unit) -> None:
        """One decoder layer of every arm, the releases' shard of it, and what it came to."""
        began = time.monotonic()
        result = _LayerNotes()
        with self._timed("dequantize"):
            origins = {"dequantize": self._placed(self.job.base.unit(unit))}
        if self.job.original is not None:
            with self._timed("substitute"):
                origins["substitute"] = self._placed(self.job.original.unit(unit))
        merged = self._merged(unit, origins, result)
        self._advance_noise(unit, merged["dequantize"])
        if self.job.change is not None:
            self._advance_dense(unit, "quantized_base", origins["dequantize"], result)
        if self.job.original is not None:
            self._advance_dense(unit, "original", origins["substitute"], result)
        if self.job.previous is not None:
            previous = self._placed(self.job.previous.unit(unit))
            self._advance_dense(unit, "previous", previous, result)
        if self.job.change is not None:
            for strategy in self.job.strategies:
                self._advance_dense(unit, merged_arm(strategy), merged[strategy], result)
                self._hold(unit, strategy, merged[strategy], result)
        weights = {s: self._weights(unit, s, merged[s], origins) for s in self.job.strategies}
        origins.clear()  # each is let go with the last linear that is measured against it
        shards = {
            strategy: self._requantize(unit, strategy, merged[strategy], own, result)
            for strategy, own in weights.items()
        }
        self._look(result)
        seconds = time.monotonic() - began
        layers = {s: result.layer(unit, s, shards[s], seconds) for s in self.job.strategies}
        self.progress.figures(_figures(layers))
        self._commit(unit, shards, layers)

    def outer(self, unit: Unit) -> None:
        """The shard of a unit that moves no hidden states: vision tower, or final norm and head."""
        shards, layers = {}, {}
        for strategy in self.job.strategies:
            shards[strategy] = self._outer_tensors(unit, strategy)
            for head in self.job.targets_of(unit):
                layers[strategy], packed = self._head(strategy, head)
                shards[strategy] |= packed
        self._commit(unit, shards, layers)

    def scores(self) -> tuple[Scored, ...]:
        """Every arm through final norm and head, on the same tokens."""
        with self._timed("score"):
            return self._score(self.frames, self.job.evaluation, self.progress)

    def merge_check(self, strategy: str) -> MergeCheck | None:
        """What the merge itself moved; None where nothing was merged."""
        if self.job.change is None:
            return None
        found = {layer.name: layer.merge or 0.0 for layer in self.layers[strategy]}
        with self._timed("score"):
            found |= {"embedding": self._embedding_moved(strategy)}
            found |= {"logits": self._logits_moved(strategy)}
        where = max(found, key=lambda name: (math.isnan(found[name]), found[name]))
        return MergeCheck(
            tokens=self._length(),
            dtype=str(self.rounding).removeprefix("torch."),
            rounding=torch.finfo(self.rounding).eps / 2,
            worst=found[where],
            where=where,
            logits=found["logits"],
        )

    def noise(self) -> tuple[Scored, ...]:
        """The first windows of each corpus, scored in full precision and in 16 bits."""
        few = [
            replace(corpus, tokens=corpus.tokens[:NOISE_WINDOWS]) for corpus in self.job.evaluation
        ]
        frames = dict.fromkeys((REFERENCE, NOISE), self.frames[REFERENCE])
        with self._timed("score"):
            return self._score(frames, few, Silent())

    def _score(
        self, frames: Mapping[str, Frame], corpora: Sequence[Corpus], progress: Progress
    ) -> tuple[Scored, ...]:
        return score(frames, self._last, corpora, REFERENCE, progress, self.job.device)

    # One layer

    def _merged(
        self, unit: Unit, origins: Mapping[str, Tensors], result: _LayerNotes
    ) -> dict[str, Tensors]:
        """The `trained` arm one layer onward, and the merged weights of each strategy.

        Those on the decoded base are always there: they are the `trained` arm's own.
        """
        merged: dict[str, Tensors] = {}
        with self._timed("merge"):
            live = self._live(unit, origins["dequantize"])
        self._advance(unit, REFERENCE, live, result)
        self._follow(unit, "dequantize", live)
        with self._timed("merge"):
            merged["dequantize"] = merge_layer(self.job.change, live)
        if "substitute" in self.job.strategies:
            with self._timed("merge"):
                live = self._live(unit, origins["substitute"])
            self._follow(unit, "substitute", live)
            with self._timed("merge"):
                merged["substitute"] = merge_layer(self.job.change, live)
        return merged

    def _live(self, unit: Unit, weights: Tensors) -> nn.Module:
        live = live_layer(self.job.skeleton, self.job.change, unit, weights)
        return live.to(self.job.device)

    def _follow(self, unit: Unit, strategy: str, live: nn.Module) -> None:
        """The live adapter one layer onward, for the merged layers to be held against."""
        if self.job.change is not None and strategy in self.job.strategies:
            with self._timed("evaluate"):
                call = self.calls[unit.index]
                advance(live, self.streams, live_key(strategy), call, 1, None)

    def _hold(self, unit: Unit, strategy: str, merged: Tensors, result: _LayerNotes) -> None:
        """The merged layers after the live adapter, and how far they are from it by now."""
        layer = self.job.skeleton.layer(unit.index)
        fill(layer, merged)
        keys, call = (dense_key(strategy), live_key(strategy)), self.calls[unit.index]
        with self._timed("evaluate"):
            layer.to(self.job.device)
            far, size = advance(layer, self.streams, keys[0], call, 1, keys[1])
        result.merge[strategy] = (far / size) ** 0.5 if size else 0.0

    def _advance_noise(self, unit: Unit, merged: Tensors) -> None:
        """`trained` with weights and outputs in 16 bits: what no release could be nearer than."""
        layer = self.job.skeleton.layer(unit.index)
        fill(layer, {name: t.to(self.rounding).float() for name, t in merged.items()})
        with self._timed("evaluate"):
            layer.to(self.job.device)
            for corpus in self.job.evaluation:
                key = key_of(NOISE, corpus.name)
                at_once = self.job.at_once
                call = self.calls[unit.index]
                advance(layer, self.streams, key, call, at_once, None, self.rounding)

    def _advance_dense(self, unit: Unit, arm: str, weights: Tensors, result: _LayerNotes) -> None:
        layer = self.job.skeleton.layer(unit.index)
        fill(layer, weights)
        self._advance(unit, arm, layer.to(self.job.device), result)

    def _advance(self, unit: Unit, arm: str, layer: nn.Module, result: _LayerNotes) -> None:
        self.progress.doing(arm.replace("@", " by "))
        with self._timed("evaluate"):
            for corpus in self.job.evaluation:
                distance, norm = advance(
                    layer,
                    self.streams,
                    key_of(arm, corpus.name),
                    self.calls[unit.index],
                    self.job.at_once,
                    key_of(REFERENCE, corpus.name) if arm != REFERENCE else None,
                )
                result.drift[arm][0] += distance
                result.drift[arm][1] += norm

    def _look(self, result: _LayerNotes) -> None:
        """How far each release has gone from the reference at this depth."""
        self.progress.doing("KL at this depth")
        arms = [REFERENCE, *map(release_arm, self.job.strategies)]
        frames = {arm: self.frames[arm] for arm in arms}
        corpus = self.job.in_domain.name
        with self._timed("evaluate"):
            result.kl = lens(frames, self.streams, corpus, REFERENCE, self.job.device)

    def _requantize(
        self,
        unit: Unit,
        strategy: str,
        merged: Tensors,
        weights: dict[str, Weight],
        result: _LayerNotes,
    ) -> dict[str, torch.Tensor]:
        """Quantize one layer under the calibration set; what is written of it, by stored name."""
        self.progress.doing(f"quantizing ({strategy})")
        written = self._as_written(unit, strategy, merged)
        layer = self.job.skeleton.layer(unit.index)
        fill(
            layer,
            {**merged, **{name: t.float().to(self.job.device) for name, t in written.items()}},
        )
        reference = self.job.skeleton.layer(unit.index)
        fill(reference, merged)
        work = Requantizer(
            layer.to(self.job.device),
            reference.to(self.job.device),
            weights,
            self.job.settings,
        )
        key, twin = calibration_key(strategy), reference_key(strategy)
        calibration = Calibration(
            read=self._reader(key, unit),
            read_reference=self._reader(twin, unit) if self.job.settings.asymmetric else None,
            sample=self._sample(key, unit),
            windows=self.job.calibration.tokens.shape[0],
            at_once=self.job.at_once,
            waiting=self.job.waiting,
        )
        with self._timed("requantize"):
            for hidden, expected in work.run(calibration):
                self.streams.append(key, hidden)
                if expected is not None:
                    self.streams.append(twin, expected)
        self._advance(unit, release_arm(strategy), layer, result)
        result.linears[strategy] = [
            replace(work.results[name], name=join(unit.path, name))
            for name in self.job.targets_of(unit)
        ]
        names = self.job.base.names
        result.remedies[strategy] = [
            replace(found, where=tuple(join(unit.path, name) for name in found.where))
            for found in work.remedies
        ]
        tensors = {
            names.to_write(full): self.job.base.on_disk(full, tensor)
            for name, tensor in written.items()
            if (full := join(unit.path, name))
        }
        for name, weight in work.packed.items():
            module = names.module_to_write(join(unit.path, name))
            packed = pack(weight, self.job.settings.format)
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
        return tensors

    def _reader(self, key: str, unit: Unit) -> ReadWindows:
        call = self.seen.get(key, self.calls)[unit.index]

        def read(start: int, stop: int) -> tuple[torch.Tensor, Call]:
            hidden = self.streams.read(key, start, stop).to(self.job.device)
            return hidden, call.part(start, stop)

        return read

    def _sample(self, key: str, unit: Unit) -> tuple[torch.Tensor, Call]:
        """The first tokens of the first window; all of one that may hold images."""
        hidden, call = self._reader(key, unit)(0, 1)
        if self.job.calibration.inputs:
            return hidden, call
        return hidden[:, :FEW], self.few[unit.index]

    def _weights(
        self, unit: Unit, strategy: str, merged: Tensors, origins: Mapping[str, Tensors]
    ) -> dict[str, Weight]:
        original = origins.get("substitute", {}) if self.job.compared else {}
        return {
            name: Weight(
                merged_OI=merged[name + WEIGHT],
                origin_OI=origins[strategy][name + WEIGHT],
                base=self._integer(join(unit.path, name) + WEIGHT),
                spec=self.job.specs[join(unit.path, name)],
                quantized_OI=origins["dequantize"][name + WEIGHT],
                original_OI=original.get(name + WEIGHT),
            )
            for name in self.job.targets_of(unit)
        }

    def _integer(self, parameter: str) -> IntegerWeight | None:
        weight = self.job.base.integer(parameter)
        return weight.to(self.job.device) if weight is not None else None

    def _as_written(self, unit: Unit, strategy: str, merged: Tensors) -> dict[str, torch.Tensor]:
        """The layer's tensors that stay dense, in the dtype and, untouched, the bytes on disk."""
        packed = {name + WEIGHT for name in self.job.targets_of(unit)}
        return {
            name: self._dense(join(unit.path, name), strategy, merged[name])
            for name in merged
            if name not in packed
        }

    def _dense(self, parameter: str, strategy: str, value: torch.Tensor) -> torch.Tensor:
        source = self._source(strategy)
        if parameter not in self.job.touched:
            stored = source.as_stored(parameter)
            if stored is not None:
                return stored
        return value.to("cpu", self.job.base.dense_dtype(parameter))

    def _head(self, strategy: str, name: str) -> tuple[LayerResult, dict[str, torch.Tensor]]:
        """Quantize the head under what it reads of the calibration set; from here on the release is
        scored with it. What came of it, and what is written."""
        began, parameter, arm = time.monotonic(), name + WEIGHT, release_arm(strategy)
        self.progress.doing(f"quantizing {name} ({strategy})")
        asymmetric, device = self.job.settings.asymmetric, self.job.device
        merged, source = self.weights[merged_arm(strategy)], self._source(strategy)
        base = None if parameter in self.job.base.resized else self.job.base.integer(parameter)

        def rows(start: int, stop: int) -> Weight:
            return Weight(
                merged_OI=merged.rows(parameter, start, stop).to(device),
                origin_OI=source.rows(parameter, start, stop).to(device),
                base=base.rows(start, stop).to(device) if base is not None else None,
                spec=self.job.specs[name],
            )

        with self._timed("requantize"):
            inputs = self._head_inputs(strategy)
            means = gather(inputs, merged.shape(parameter)[1], device, paired=asymmetric)
            count, settings = merged.row_count(parameter), self.job.settings
            grid, result = requantize_head(name, rows, count, means, settings)
        self.frames[arm] = Frame(
            self.job.skeleton, replace(self.weights[arm], packed={parameter: grid})
        )
        module = self.job.base.names.module_to_write(name)
        packed = {f"{module}.{s}": t for s, t in pack(grid, self.job.settings.format).items()}
        layer = LayerResult(
            name=name,
            kind="head",
            seconds=time.monotonic() - began,
            bytes=sum(tensor.nbytes for tensor in packed.values()),
            linears=(result,),
            survival=pool_survival([result.survival]),
        )
        return layer, packed

    def _head_inputs(self, strategy: str) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """What the head reads of the calibration set: the release's own and the reference's."""
        frames, windows = self._calibrated(), self.job.calibration.tokens.shape[0]
        for start, stop in batches(windows, self.job.at_once):
            release, reference = (
                frames[key].leave(self.streams.read(key, start, stop)).to(self.job.device)
                if key in frames
                else None
                for key in (calibration_key(strategy), reference_key(strategy))
            )
            assert release is not None
            yield release, reference

    # What stands outside the layers

    def _calibrated(self) -> dict[str, Frame]:
        """The frame that each stream of calibration text enters through."""
        found = {}
        for strategy in self.job.strategies:
            found[calibration_key(strategy)] = self.frames[release_arm(strategy)]
            if self.job.settings.asymmetric:
                arm = merged_arm(strategy) if self.job.change is not None else REFERENCE
                found[reference_key(strategy)] = self.frames[arm]
        return found

    def _calibrate(self, key: str, frame: Frame, keep: Callable[[torch.Tensor], None]) -> None:
        self.progress.doing(key.replace("@", " by "))
        text, at_once = self.job.calibration, self.job.at_once
        self.seen[key] = move(
            frame.enter_all(text.tokens, text.inputs, at_once, keep), self.job.device
        )

    def _enter(self, frame: Frame, key: str, tokens: torch.Tensor) -> None:
        self.progress.doing(key.replace("@", " by "))
        for start, stop in batches(tokens.shape[0], self.job.at_once):
            self.streams.append(key, frame.enter(tokens[start:stop])[0])

    def _outer_tensors(self, unit: Unit, strategy: str) -> dict[str, torch.Tensor]:
        """Tensors of a unit outside the layers as they are written, by stored name."""
        weights = self.weights[release_arm(strategy)]
        tensors = {}
        packed = {name + WEIGHT for name in self.job.targets_of(unit)}
        for parameter in unit.parameters:
            if parameter in packed:
                continue
            changed = weights.changed.get(parameter)
            stored = weights.as_stored(parameter) if changed is None else None
            if stored is None:
                value = changed if changed is not None else weights.tensor(parameter)
                stored = value.to(self.job.base.dense_dtype(parameter))
            tensors[self.job.base.names.to_write(parameter)] = stored
        return tensors

    def _embedding_moved(self, strategy: str) -> float:
        """First hidden states of the merged model against the live adapter's."""
        path, tokens = self._base_frame().embedding_path, self.job.calibration.tokens[:1]
        moved = self._moved(path, strategy, tokens, tokens)
        return 0.0 if moved is None else moved

    def _logits_moved(self, strategy: str) -> float:
        """Logits of the last tokens of the window, merged against live."""
        frame = self.frames[merged_arm(strategy)]
        found, expected = (
            frame.leave(self.streams.read(key, 0, 1))[0, -CHECKED_TOKENS:]
            for key in (dense_key(strategy), live_key(strategy))
        )
        moved = self._moved(frame.head_path, strategy, found, expected)
        if moved is not None:
            return moved
        slices = [
            frame.logits(torch.cat([found, expected]), start, frame.head_rows(start, stop))
            for start, stop in batches(frame.vocabulary, ROWS_AT_ONCE)
        ]
        return distance(*torch.cat(slices, dim=-1).chunk(2))

    def _moved(
        self, path: str, strategy: str, merged: torch.Tensor, live: torch.Tensor
    ) -> float | None:
        """What a module outside the layers makes of both inputs; None where it was not adapted."""
        change = self.job.change
        if change is None or join(path, "weight") not in change.touched:
            return None
        source = self._source(strategy)
        module = live_outer(self.job.skeleton, change, path, source)
        with torch.inference_mode():
            expected = module(live)
            change.merge(module)
            return distance(module(merged), expected)

    def _source(self, strategy: str) -> Weights:
        """The checkpoint that the adapter is merged onto."""
        source = self.job.base if strategy == "dequantize" else self.job.original
        assert source is not None
        return source

    def _last(self, arm: str, corpus: str, start: int, stop: int) -> torch.Tensor:
        return self.streams.read(key_of(arm, corpus), start, stop)

    def _base_frame(self) -> Frame:
        return self.frames[REFERENCE]

    def _length(self) -> int:
        return int(self.job.calibration.tokens.shape[1])

    def _placed(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.job.device) for name, tensor in tensors.items()}

    # Commit and resume

    def _commit(
        self, unit: Unit, shards: Mapping[str, Tensors], layers: Mapping[str, LayerResult]
    ) -> None:
        """Shards, then hidden states, then the journal: the order that makes a kill harmless."""
        with self._timed("write"):
            records = {
                strategy: write_shard(
                    self.workspace.release(strategy) / self._shard_name(unit), tensors
                )
                for strategy, tensors in shards.items()
            }
            moved = unit.kind in ("embedding", "layer")
            sums = self.streams.commit() if moved else {}
            event = {
                "generation": self.streams.generation ^ int(moved),
                "streams": sums,
                "shards": encode(records),
                "layers": encode(layers),
                "spent": self._spent(),
            }
            self.workspace.finish(unit.label, event)
            if moved:
                self.streams.turn()
        self._keep(records, layers)

    def _spent(self) -> dict[str, Any]:
        """What the meter has counted since the last unit."""
        before, self._told = self._told, dict(self.meter.seconds)
        since = {name: s - before.get(name, 0.0) for name, s in self._told.items()}
        return {"seconds": since, "memory": dict(self.meter.memory)}

    def _take_over(self, event: Mapping[str, Any]) -> None:
        self.meter.add(**event["spent"])
        self._told = dict(self.meter.seconds)
        self.seconds_before += sum(event["spent"]["seconds"].values())
        records = {}
        for strategy, data in event["shards"].items():
            pairs = tuple((name, nbytes) for name, nbytes in data["tensors"])
            records[strategy] = ShardRecord(**{**data, "tensors": pairs})
            self.workspace.check(strategy, records[strategy])
        layers = {
            strategy: decode(LayerResult, data, where="journal")
            for strategy, data in event["layers"].items()
        }
        self._keep(records, layers)

    def _keep(self, records: Mapping[str, ShardRecord], layers: Mapping[str, LayerResult]) -> None:
        for strategy, record in records.items():
            self.records[strategy].append(record)
        for strategy, layer in layers.items():
            self.layers[strategy].append(layer)

    def _shard_name(self, unit: Unit) -> str:
        return f"model-{self.units.index(unit) + 1:05}-of-{len(self.units):05}.safetensors"

    def _timed(self, what: str) -> AbstractContextManager[None]:
        return self.meter.stage(what)


def _figures(layers: Mapping[str, LayerResult]) -> dict[str, float]:
    """What a layer came to, for those who watch; of two releases what sets them apart."""
    if len(layers) > 1:
        return {f"KL by {s}": layer.kl for s, layer in layers.items() if layer.kl is not None}
    (layer,) = layers.values()
    errors = [linear.error for linear in layer.linears if linear.error is not None]
    found = {
        "error": sum(errors) / len(errors) if errors else None,
        "survival": layer.survival.survival if layer.survival else None,
        "KL": layer.kl,
    }
    return {name: value for name, value in found.items() if value is not None}


class _LayerNotes:
    """What is gathered while a layer is worked on."""

    def __init__(self) -> None:
        self.drift: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.linears: dict[str, list[LinearResult]] = {}
        self.remedies: dict[str, list[Remedy]] = {}
        self.kl: dict[str, float] = {}
        self.merge: dict[str, float] = {}

    def layer(self, unit: Unit, strategy: str, tensors: Tensors, seconds: float) -> LayerResult:
        """The record of one strategy; `drift` has the arms of all of them."""
        linears = tuple(self.linears[strategy])
        return LayerResult(
            name=unit.path,
            seconds=seconds,
            bytes=sum(tensor.nbytes for tensor in tensors.values()),
            linears=linears,
            survival=pool_survival([linear.survival for linear in linears]),
            remedies=tuple(self.remedies[strategy]),
            drift={
                arm: (distance / norm) ** 0.5
                for arm, (distance, norm) in self.drift.items()
                if norm > 0 and arm != REFERENCE
            },
            kl=self.kl.get(release_arm(strategy)),
            merge=self.merge.get(strategy),
        )


def _streams(job: Job) -> dict[str, Stream]:
    width = job.skeleton.hidden_size
    found = {}
    for arm in arm_names(job):
        for corpus in job.evaluation:
            windows, length = corpus.tokens.shape
            found[key_of(arm, corpus.name)] = Stream(windows=windows, length=length, width=width)
    for corpus in job.evaluation:
        windows, length = corpus.tokens.shape
        few = min(windows, NOISE_WINDOWS)
        found[key_of(NOISE, corpus.name)] = Stream(windows=few, length=length, width=width)
    for strategy in job.strategies:
        windows, length = job.calibration.tokens.shape
        calibrated = Stream(windows=windows, length=length, width=width)
        found[calibration_key(strategy)] = calibrated
        if job.settings.asymmetric:
            found[reference_key(strategy)] = calibrated
        if job.change is not None:
            first = replace(calibrated, windows=1)
            found[live_key(strategy)] = found[dense_key(strategy)] = first
    return found


def _outer_weights(job: Job, units: tuple[Unit, ...]) -> dict[str, Weights]:
    """Each arm's parameters outside the layers; those the adapter changes are merged here."""
    found = {"quantized_base": job.base}
    if job.original is not None:
        found["original"] = job.original
    if job.previous is not None:
        found["previous"] = job.previous
    for strategy in dict.fromkeys(("dequantize", *job.strategies)):
        source = job.base if strategy == "dequantize" else job.original
        assert source is not None
        merged = outer_weights(job.skeleton, job.change, units, source)
        if strategy == "dequantize":
            found[REFERENCE] = merged
        found[merged_arm(strategy)] = merged
        rounded = {
            name: tensor.to(job.base.dense_dtype(name)).float()
            for name, tensor in merged.changed.items()
        }
        found[release_arm(strategy)] = replace(source, changed=rounded) if rounded else source
    return found


def _frames(job: Job, outer: Mapping[str, Weights]) -> dict[str, Frame]:
    """One frame for all arms with the same weights outside the layers."""
    made: dict[int, Frame] = {}
    frames = {}
    for arm in arm_names(job):
        weights = outer[arm]
        if id(weights) not in made:
            made[id(weights)] = Frame(job.skeleton, weights)
        frames[arm] = made[id(weights)]
    return frames
