"""The merged model held against the live adapter, on one window of the calibration text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from qmerge.job import REFERENCE, merged_arm
from qmerge.model.frame import ROWS_AT_ONCE
from qmerge.model.streams import batches
from qmerge.model.weights import model_dtype
from qmerge.names import Unit, join
from qmerge.results import LayerResult, MergeCheck
from qmerge.stages.evaluate import advance, distance
from qmerge.stages.merge import live_outer
from qmerge.walk.ground import Ground, Tensors, dense_key, live_key

CHECKED_TOKENS = 64
"""Tokens whose logits are compared."""


class Live:
    """Two streams for each strategy, which part only by what merging moved. Without an adapter
    there are none, and nothing is done."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._job = ground.job
        self._strategies = ground.job.strategies if ground.job.change is not None else ()

    def enter(self) -> None:
        for strategy in self._strategies:
            frame = self._ground.frames[merged_arm(strategy)]
            for key in (live_key(strategy), dense_key(strategy)):
                self._ground.enter(key, frame, self._window)

    def follow(self, unit: Unit, strategy: str, live: nn.Module) -> None:
        """The live adapter one layer onward."""
        if strategy in self._strategies:
            self._advance(unit, live, live_key(strategy), None)

    def hold(self, unit: Unit, strategy: str, merged: Tensors) -> float:
        """The merged layer after it, and how far what comes out is from the live one's by now."""
        layer = self._ground.layer(unit, merged)
        far, size = self._advance(unit, layer, dense_key(strategy), live_key(strategy))
        return (far / size) ** 0.5 if size else 0.0

    def result(self, strategy: str, layers: Sequence[LayerResult]) -> MergeCheck | None:
        """What merging moved, in layers, embedding and head; None where nothing was merged."""
        if strategy not in self._strategies:
            return None
        found = {layer.name: layer.merge or 0.0 for layer in layers}
        with self._ground.timed("score"):
            found["embedding"] = self._embedding_moved(strategy)
            found["logits"] = self._logits_moved(strategy)
        where = max(found, key=lambda name: (math.isnan(found[name]), found[name]))
        rounding = model_dtype(self._job.base.checkpoint.config)
        return MergeCheck(
            tokens=self._window.shape[1],
            dtype=str(rounding).removeprefix("torch."),
            rounding=torch.finfo(rounding).eps / 2,
            worst=found[where],
            where=where,
            logits=found["logits"],
        )

    @property
    def _window(self) -> torch.Tensor:
        return self._job.calibration.tokens[:1]

    def _advance(
        self, unit: Unit, layer: nn.Module, key: str, reference: str | None
    ) -> tuple[float, float]:
        call = self._ground.calls[unit.index]
        with self._ground.timed("evaluate"):
            return advance(layer, self._ground.streams, key, call, 1, reference)

    def _embedding_moved(self, strategy: str) -> float:
        """First hidden states of the merged model against the live adapter's."""
        path = self._ground.frames[REFERENCE].embedding_path
        moved = self._moved(path, strategy, self._window, self._window)
        return 0.0 if moved is None else moved

    def _logits_moved(self, strategy: str) -> float:
        """Logits of the last tokens of the window, merged against live."""
        frame = self._ground.frames[merged_arm(strategy)]
        found, expected = (
            frame.leave(self._ground.streams.read(key, 0, 1))[0, -CHECKED_TOKENS:]
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
        change = self._job.change
        if change is None or join(path, "weight") not in change.touched:
            return None
        module = live_outer(self._job.skeleton, change, path, self._ground.source(strategy))
        with torch.inference_mode():
            expected = module(live)
            change.merge(module)
            return distance(module(merged), expected)
