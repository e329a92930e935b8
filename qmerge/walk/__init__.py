"""The walk: every arm and every release through the units of the model, once.

An arm is a model that is scored; a strategy makes a `merged` and a `release` arm. The units before
and after the layers are read where they are needed; each layer is opened, run, merged, quantized,
written and let go.
"""

from __future__ import annotations

import time

import torch

from qmerge.job import REFERENCE, Job, merged_arm, release_arm
from qmerge.meter import Meter
from qmerge.names import Unit
from qmerge.progress import Progress
from qmerge.results import MergeCheck
from qmerge.stages.evaluate import Scored
from qmerge.stages.merge import live_layer, merge_layer
from qmerge.stages.requantize import Weight
from qmerge.walk.arms import Arms
from qmerge.walk.ground import Ground, Tensors
from qmerge.walk.ledger import Ledger
from qmerge.walk.live import Live
from qmerge.walk.notes import LayerNotes, figures
from qmerge.walk.releases import Releases
from qmerge.workspace import Workspace


class Walk:
    """One pass over the units of a job, continued from what the workspace has."""

    def __init__(self, job: Job, workspace: Workspace, progress: Progress, meter: Meter) -> None:
        self.job = job
        self.workspace = workspace
        self.meter = meter
        self._ground = Ground.of(job, workspace, progress, meter)
        self.units = self._ground.units
        self.ledger = Ledger(self._ground, workspace)
        self._arms = Arms(self._ground)
        self._live = Live(self._ground)
        self._releases = Releases(self._ground)

    def resume(self) -> set[str]:
        """Take over what was finished before; the labels of those units."""
        finished = self.ledger.resume()
        if finished:
            self._releases.resume()
        return finished

    def embedding(self, unit: Unit) -> None:
        """First hidden states of every arm, and the first shard."""
        with self._ground.timed("embedding"):
            self._arms.enter()
            self._releases.enter()
            self._live.enter()
        shards = {s: self._releases.outer(unit, s) for s in self.job.strategies}
        self.ledger.commit(unit, shards, {})

    def layer(self, unit: Unit) -> None:
        """One decoder layer of every arm, the releases' shard of it, and what it came to."""
        began, notes = time.monotonic(), LayerNotes()
        origins = self._opened(unit)
        merged = self._merged(unit, origins, notes)
        self._dense_arms(unit, origins, merged, notes)
        weights = {
            strategy: self._releases.weights(unit, strategy, merged[strategy], origins)
            for strategy in self.job.strategies
        }
        origins.clear()  # each is let go with the last linear that is measured against it
        shards = {
            strategy: self._requantize(unit, strategy, merged[strategy], own, notes)
            for strategy, own in weights.items()
        }
        notes.kl = self._arms.look()
        seconds = time.monotonic() - began
        layers = {s: notes.layer(unit, s, shards[s], seconds) for s in self.job.strategies}
        self._ground.progress.figures(figures(layers))
        self.ledger.commit(unit, shards, layers)

    def outer(self, unit: Unit) -> None:
        """The shard of a unit that moves no hidden states: vision tower, or final norm and head."""
        shards, layers = {}, {}
        for strategy in self.job.strategies:
            shards[strategy] = self._releases.outer(unit, strategy)
            for head in self.job.targets_of(unit):
                layers[strategy], packed = self._releases.head(strategy, head)
                shards[strategy] |= packed
        self.ledger.commit(unit, shards, layers)

    def scores(self) -> tuple[Scored, ...]:
        """Every arm through final norm and head, on the same tokens."""
        return self._arms.scores()

    def noise(self) -> tuple[Scored, ...]:
        """The first windows of each corpus, scored in full precision and in 16 bits."""
        return self._arms.noise()

    def merge_check(self, strategy: str) -> MergeCheck | None:
        """What the merge itself moved; None where nothing was merged."""
        return self._live.result(strategy, self.ledger.layers[strategy])

    # One layer

    def _opened(self, unit: Unit) -> dict[str, Tensors]:
        """What the adapter may be merged onto, by strategy."""
        with self._ground.timed("dequantize"):
            origins: dict[str, Tensors] = {"dequantize": self._placed(self.job.base.unit(unit))}
        if self.job.original is not None:
            with self._ground.timed("substitute"):
                origins["substitute"] = self._placed(self.job.original.unit(unit))
        return origins

    def _merged(
        self, unit: Unit, origins: dict[str, Tensors], notes: LayerNotes
    ) -> dict[str, Tensors]:
        """The `trained` arm one layer onward, and the merged weights of each strategy.

        Those on the decoded base are always there: they are the `trained` arm's own.
        """
        merged: dict[str, Tensors] = {}
        for strategy in dict.fromkeys(("dequantize", *self.job.strategies)):
            with self._ground.timed("merge"):
                live = live_layer(self.job.skeleton, self.job.change, unit, origins[strategy])
                live = live.to(self.job.device)
            if strategy == "dequantize":
                self._arms.advance(unit, REFERENCE, live, notes)
            self._live.follow(unit, strategy, live)
            with self._ground.timed("merge"):
                merged[strategy] = merge_layer(self.job.change, live)
        return merged

    def _dense_arms(
        self,
        unit: Unit,
        origins: dict[str, Tensors],
        merged: dict[str, Tensors],
        notes: LayerNotes,
    ) -> None:
        """Every other arm that is a plain layer one layer onward."""
        self._arms.advance_noise(unit, merged["dequantize"])
        if self.job.change is not None:
            self._arms.advance_dense(unit, "quantized_base", origins["dequantize"], notes)
        if self.job.original is not None:
            self._arms.advance_dense(unit, "original", origins["substitute"], notes)
        if self.job.previous is not None:
            previous = self._placed(self.job.previous.unit(unit))
            self._arms.advance_dense(unit, "previous", previous, notes)
        if self.job.change is not None:
            for strategy in self.job.strategies:
                self._arms.advance_dense(unit, merged_arm(strategy), merged[strategy], notes)
                notes.merge[strategy] = self._live.hold(unit, strategy, merged[strategy])

    def _requantize(
        self,
        unit: Unit,
        strategy: str,
        merged: Tensors,
        weights: dict[str, Weight],
        notes: LayerNotes,
    ) -> dict[str, torch.Tensor]:
        """The release of one strategy one layer onward; what is written of it, by stored name."""
        layer, tensors = self._releases.layer(unit, strategy, merged, weights, notes)
        self._arms.advance(unit, release_arm(strategy), layer, notes)
        return tensors

    def _placed(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.job.device) for name, tensor in tensors.items()}
