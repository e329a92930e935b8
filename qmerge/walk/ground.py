"""What every part of the walk stands on: the job, its streams of hidden states, and what each arm
has outside the layers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import nn

from qmerge.corpus import Corpus
from qmerge.job import NOISE, NOISE_WINDOWS, REFERENCE, Job, arm_names, merged_arm, release_arm
from qmerge.meter import Meter
from qmerge.model.frame import Frame
from qmerge.model.layer import Call, fill, move
from qmerge.model.streams import Stream, Streams, batches
from qmerge.model.weights import Weights
from qmerge.names import Unit
from qmerge.progress import Progress
from qmerge.stages.evaluate import key_of
from qmerge.stages.merge import outer_weights
from qmerge.workspace import Workspace

Tensors = Mapping[str, torch.Tensor]


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


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A job with everything that its layers are run between."""

    job: Job
    progress: Progress
    meter: Meter
    units: tuple[Unit, ...]
    streams: Streams
    weights: Mapping[str, Weights]
    """Each arm's parameters outside the layers."""
    frames: dict[str, Frame]
    """What each arm's hidden states come from and end in; once a head is quantized, its release
    has another."""
    calls: tuple[Call, ...]
    """What each layer is called with on windows of text."""

    @classmethod
    def of(cls, job: Job, workspace: Workspace, progress: Progress, meter: Meter) -> Ground:
        units = job.skeleton.units()
        weights = _outer_weights(job, units)
        frames = _frames(job, weights)
        length = job.calibration.tokens.shape[1]
        return cls(
            job=job,
            progress=progress,
            meter=meter,
            units=units,
            streams=Streams(workspace.streams, _streams(job)),
            weights=weights,
            frames=frames,
            calls=move(frames[REFERENCE].calls(length), job.device),
        )

    def timed(self, stage: str) -> AbstractContextManager[None]:
        return self.meter.stage(stage)

    def source(self, strategy: str) -> Weights:
        """The checkpoint that the adapter is merged onto."""
        return _source(self.job, strategy)

    def layer(self, unit: Unit, weights: Tensors) -> nn.Module:
        """The plain decoder layer with these weights (names relative to it), where it is run."""
        layer = self.job.skeleton.layer(unit.index)
        fill(layer, weights)
        return layer.to(self.job.device)

    def enter(self, key: str, frame: Frame, tokens: torch.Tensor) -> None:
        """The first hidden states of a stream."""
        self.progress.doing(key.replace("@", " by "))
        for start, stop in batches(tokens.shape[0], self.job.at_once):
            self.streams.append(key, frame.enter(tokens[start:stop])[0])


def _streams(job: Job) -> dict[str, Stream]:
    def shape(text: Corpus, most: int | None = None) -> Stream:
        windows, length = text.tokens[:most].shape
        return Stream(windows=windows, length=length, width=job.skeleton.hidden_size)

    found = {
        key_of(arm, corpus.name): shape(corpus)
        for arm in arm_names(job)
        for corpus in job.evaluation
    }
    for corpus in job.evaluation:
        found[key_of(NOISE, corpus.name)] = shape(corpus, NOISE_WINDOWS)
    for strategy in job.strategies:
        found[calibration_key(strategy)] = shape(job.calibration)
        if job.settings.asymmetric:
            found[reference_key(strategy)] = shape(job.calibration)
        if job.change is not None:
            found[live_key(strategy)] = found[dense_key(strategy)] = shape(job.calibration, 1)
    return found


def _outer_weights(job: Job, units: tuple[Unit, ...]) -> dict[str, Weights]:
    """Each arm's parameters outside the layers; those the adapter changes are merged here."""
    found = {"quantized_base": job.base}
    if job.original is not None:
        found["original"] = job.original
    if job.previous is not None:
        found["previous"] = job.previous
    for strategy in dict.fromkeys(("dequantize", *job.strategies)):
        source = _source(job, strategy)
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


def _source(job: Job, strategy: str) -> Weights:
    source = job.base if strategy == "dequantize" else job.original
    assert source is not None
    return source


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
