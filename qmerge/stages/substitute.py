"""Whether a model is the original that a base was quantized from.

O, I: out and in features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from qmerge.model.weights import Weights
from qmerge.names import Unit

EXPLAINED = {2: 1.0, 3: 0.6, 4: 0.35, 8: 0.08}
"""Relative error ||W - Wq|| / ||W|| that quantizing to so many bits may cause in one linear.

Rounding a normal sample to nearest in groups of 128 costs 0.5, 0.22, 0.1 and 0.006, and FP8 of two
bits of mantissa 0.05; GPTQ and clipped steps cost more. Two models that have nothing in common
differ by about 1.4.
"""
UNKNOWN_BITS = 4
LEFT_ALONE = 0.005
"""The same for a tensor that was not quantized: rounding bf16 and fp16 into one another costs up to
0.002, and full fine-tuning moves embeddings by more."""
ROWS = 4096
"""Rows compared at a time."""
SHOWN = 3
SCALED = (
    ". Its norms are others while its embedding is the same, as after AWQ and SmoothQuant, which"
    " move scales between norms and linears: what an adapter learned on such a base does not fit"
    " the original's weights"
)


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How far one weight of the base is from the same one of the original."""

    name: str
    error: float
    bits: int | None
    """Bits of its codes; None where it was not quantized."""
    norm: bool
    """Whether it is a vector inside a layer."""
    outer: bool
    """Whether it lies outside of the layers."""

    @property
    def explained(self) -> float:
        """The error that quantizing, or rounding, may have caused."""
        if self.bits is None:
            return LEFT_ALONE
        return EXPLAINED.get(self.bits, EXPLAINED[UNKNOWN_BITS])

    @property
    def words(self) -> str:
        if self.bits is None:
            return f"{self.name} {self.error:.2g}, where nothing was quantized"
        return (
            f"{self.name} {self.error:.2g}, where {self.bits} bits explain up to {self.explained}"
        )


def likeness(
    base: Weights,
    original: Weights,
    units: Iterable[Unit],
    linears: Collection[str],
    tick: Callable[[str], None],
    *,
    alone: bool = False,
) -> Iterator[Likeness]:
    """The relative error of each of these `linears`, and of what is not quantized in `units`; or,
    which costs less, of the latter `alone`."""
    for unit in units:
        for name in unit.parameters:
            dims = len(base.shape(name))
            quantized = name in linears
            left_out = alone if quantized else base.is_quantized(name) or dims not in (1, 2)
            if left_out:
                continue
            tick(name)
            inside = unit.kind == "layer"
            yield Likeness(
                name=name,
                error=_error(base, original, name),
                # A linear of a base without codes was decoded from some, or is the original's.
                bits=(base.bits(name) or UNKNOWN_BITS) if quantized else None,
                norm=inside and dims == 1,
                outer=not inside,
            )


def _error(base: Weights, original: Weights, name: str) -> float:
    distance = norm = 0.0
    rows = original.row_count(name)
    # An embedding is large and cheap to cut; a quantized linear is decoded once.
    step = rows if base.is_quantized(name) else ROWS
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = original.rows(name, start, stop)
        distance += float((base.rows(name, start, stop) - weight).double().square().sum())
        norm += float(weight.double().square().sum())
    return math.sqrt(distance / max(norm, 1e-30))


def unlike(found: Iterable[Likeness]) -> str | None:
    """Why quantizing cannot have made the base of the original, the worst weights named; None where
    it can."""
    beyond = [each for each in found if each.error > each.explained]
    if not beyond:
        return None
    worst = sorted(beyond, key=lambda each: each.error / each.explained, reverse=True)[:SHOWN]
    said = "; ".join(each.words for each in worst)
    scaled = any(each.norm for each in beyond) and not any(each.outer for each in beyond)
    return f"the original is not what the base was quantized from: relative errors {said}" + (
        SCALED if scaled else ""
    )
