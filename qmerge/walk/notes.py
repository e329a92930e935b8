"""What is gathered while a layer is worked on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from qmerge.job import REFERENCE, release_arm
from qmerge.measure.survival import pool_survival
from qmerge.names import Unit
from qmerge.results import LayerResult, LinearResult, Remedy
from qmerge.walk.ground import Tensors


class LayerNotes:
    """Filled by the arms, the check of the merge and the releases; by strategy but for `drift`, the
    squared distances and norms of all arms, and `kl`, of all releases."""

    def __init__(self) -> None:
        self.drift: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.linears: dict[str, list[LinearResult]] = {}
        self.remedies: dict[str, list[Remedy]] = {}
        self.kl: dict[str, float] = {}
        self.merge: dict[str, float] = {}

    def layer(self, unit: Unit, strategy: str, tensors: Tensors, seconds: float) -> LayerResult:
        """The record of one strategy."""
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


def figures(layers: Mapping[str, LayerResult]) -> dict[str, float]:
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
