"""What is finished of a walk: each unit's shards, hidden states and records, journalled as one, and
taken over from a run that was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.names import Unit
from qmerge.results import LayerResult, decode, encode
from qmerge.storage.shards import ShardRecord, write_shard
from qmerge.walk.ground import Ground, Tensors
from qmerge.workspace import Workspace


class Ledger:
    """The finished units by strategy: records of their shards, and what their layers came to."""

    def __init__(self, ground: Ground, workspace: Workspace) -> None:
        self.layers: dict[str, list[LayerResult]] = {name: [] for name in ground.job.strategies}
        self.records: dict[str, list[ShardRecord]] = {name: [] for name in ground.job.strategies}
        self.seconds_before = 0.0
        """What the units took that another process finished."""
        self._ground = ground
        self._workspace = workspace
        self._told = dict(ground.meter.seconds)

    def resume(self) -> set[str]:
        """Take over what was finished before; the labels of those units."""
        finished = self._workspace.finished()
        for unit in self._ground.units:
            if unit.kind == "head" and self._ground.job.targets_of(unit):
                finished.pop(unit.label, None)  # a packed head is needed for the scores
                break
            if unit.label not in finished:
                break
            self._take_over(finished[unit.label])
        if finished:
            last = [event for event in finished.values() if event["streams"]][-1]
            self._ground.streams.generation = int(last["generation"])
            self._ground.streams.check(last["streams"])
        return set(finished)

    def commit(
        self, unit: Unit, shards: Mapping[str, Tensors], layers: Mapping[str, LayerResult]
    ) -> None:
        """Shards, then hidden states, then the journal: the order that makes a kill harmless."""
        streams = self._ground.streams
        with self._ground.timed("write"):
            records = {
                strategy: write_shard(
                    self._workspace.release(strategy) / self._shard_name(unit), tensors
                )
                for strategy, tensors in shards.items()
            }
            moved = unit.kind in ("embedding", "layer")
            sums = streams.commit() if moved else {}
            event = {
                "generation": streams.generation ^ int(moved),
                "streams": sums,
                "shards": encode(records),
                "layers": encode(layers),
                "spent": self._spent(),
            }
            self._workspace.finish(unit.label, event)
            if moved:
                streams.turn()
        self._keep(records, layers)

    def _spent(self) -> dict[str, Any]:
        """What the meter has counted since the last unit."""
        meter = self._ground.meter
        before, self._told = self._told, dict(meter.seconds)
        since = {name: s - before.get(name, 0.0) for name, s in self._told.items()}
        return {"seconds": since, "memory": dict(meter.memory)}

    def _take_over(self, event: Mapping[str, Any]) -> None:
        self._ground.meter.add(**event["spent"])
        self._told = dict(self._ground.meter.seconds)
        self.seconds_before += sum(event["spent"]["seconds"].values())
        records = {}
        for strategy, data in event["shards"].items():
            pairs = tuple((name, nbytes) for name, nbytes in data["tensors"])
            records[strategy] = ShardRecord(**{**data, "tensors": pairs})
            self._workspace.check(strategy, records[strategy])
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
        units = self._ground.units
        return f"model-{units.index(unit) + 1:05}-of-{len(units):05}.safetensors"
