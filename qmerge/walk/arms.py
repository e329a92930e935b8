"""Every arm on the evaluation text: layer by layer, and at the end what it makes of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from qmerge.corpus import Corpus
from qmerge.job import NOISE, NOISE_WINDOWS, REFERENCE, arm_names, release_arm
from qmerge.model.frame import Frame
from qmerge.model.weights import model_dtype
from qmerge.names import Unit
from qmerge.progress import Progress, Silent
from qmerge.stages.evaluate import Scored, advance, key_of, lens, score
from qmerge.walk.ground import Ground, Tensors
from qmerge.walk.notes import LayerNotes


class Arms:
    """The models that are scored, side by side."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._job = ground.job
        self._rounding = model_dtype(ground.job.base.checkpoint.config)

    def enter(self) -> None:
        """First hidden states of every arm, the noise floor among them."""
        frames = self._ground.frames
        for corpus in self._job.evaluation:
            for arm in arm_names(self._job):
                self._ground.enter(key_of(arm, corpus.name), frames[arm], corpus.tokens)
            few = corpus.tokens[:NOISE_WINDOWS]
            self._ground.enter(key_of(NOISE, corpus.name), frames[REFERENCE], few)

    def advance(self, unit: Unit, arm: str, layer: nn.Module, notes: LayerNotes) -> None:
        """One arm through its own version of a layer; behind the reference, which goes first."""
        self._ground.progress.doing(arm.replace("@", " by "))
        with self._ground.timed("evaluate"):
            for corpus in self._job.evaluation:
                distance, norm = advance(
                    layer,
                    self._ground.streams,
                    key_of(arm, corpus.name),
                    self._ground.calls[unit.index],
                    self._job.at_once,
                    key_of(REFERENCE, corpus.name) if arm != REFERENCE else None,
                )
                notes.drift[arm][0] += distance
                notes.drift[arm][1] += norm

    def advance_dense(self, unit: Unit, arm: str, weights: Tensors, notes: LayerNotes) -> None:
        """The same for an arm that is a plain layer with these weights."""
        self.advance(unit, arm, self._ground.layer(unit, weights), notes)

    def advance_noise(self, unit: Unit, merged: Tensors) -> None:
        """`trained` with weights and outputs in 16 bits: what no release could be nearer than."""
        rounded = {name: t.to(self._rounding).float() for name, t in merged.items()}
        layer = self._ground.layer(unit, rounded)
        streams, call = self._ground.streams, self._ground.calls[unit.index]
        with self._ground.timed("evaluate"):
            for corpus in self._job.evaluation:
                key = key_of(NOISE, corpus.name)
                advance(layer, streams, key, call, self._job.at_once, None, self._rounding)

    def look(self) -> dict[str, float]:
        """How far each release has gone from the reference at this depth."""
        self._ground.progress.doing("KL at this depth")
        arms = [REFERENCE, *map(release_arm, self._job.strategies)]
        frames = {arm: self._ground.frames[arm] for arm in arms}
        corpus = self._job.in_domain.name
        with self._ground.timed("evaluate"):
            return lens(frames, self._ground.streams, corpus, REFERENCE, self._job.device)

    def scores(self) -> tuple[Scored, ...]:
        """Every arm through final norm and head, on the same tokens."""
        return self._score(self._ground.frames, self._job.evaluation, self._ground.progress)

    def noise(self) -> tuple[Scored, ...]:
        """The first windows of each corpus, scored in full precision and in 16 bits."""
        few = [
            replace(corpus, tokens=corpus.tokens[:NOISE_WINDOWS]) for corpus in self._job.evaluation
        ]
        frames = dict.fromkeys((REFERENCE, NOISE), self._ground.frames[REFERENCE])
        return self._score(frames, few, Silent())

    def _score(
        self, frames: Mapping[str, Frame], corpora: Sequence[Corpus], progress: Progress
    ) -> tuple[Scored, ...]:
        with self._ground.timed("score"):
            return score(frames, self._last, corpora, REFERENCE, progress, self._job.device)

    def _last(self, arm: str, corpus: str, start: int, stop: int) -> torch.Tensor:
        return self._ground.streams.read(key_of(arm, corpus), start, stop)
