"""Whether a model is the original that a base was quantized from.

O, I: out and in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qmerge.errors import ModelError
from qmerge.model.weights import Weights

EXPLAINED = {2: 1.0, 3: 0.6, 4: 0.35, 8: 0.05}
"""Relative error ||W - Wq|| / ||W|| that quantizing to so many bits may cause in one linear.

Rounding a normal sample to nearest in groups of 128 costs 0.5, 0.22, 0.1 and 0.006; GPTQ and
clipped steps cost more. Two models that have nothing in common differ by about 1.4.
"""
UNKNOWN_BITS = 4
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How far one linear of the base is from the same one of the original."""

    name: str
    error: float


def likeness(
    base: Weights, original: Weights, names: Iterable[str], tick: Callable[[str], None]
) -> list[Likeness]:
    """The relative error of each quantized linear, the largest first."""
    found = []
    for name in names:
        tick(name)
        weight_OI = original.tensor(name)
        distance = (base.tensor(name) - weight_OI).norm() / weight_OI.norm().clamp(min=1e-30)
        found.append(Likeness(name=name, error=float(distance)))
    return sorted(found, key=lambda each: each.error, reverse=True)


def check_likeness(found: list[Likeness], bits: int | None) -> None:
    """`ModelError` with the worst linears where quantizing cannot have made the base of it."""
    bound = EXPLAINED.get(bits or UNKNOWN_BITS, EXPLAINED[UNKNOWN_BITS])
    if not found or found[0].error <= bound:
        return
    worst = ", ".join(f"{each.name} {each.error:.2f}" for each in found[:SHOWN])
    raise ModelError(
        f"the original is not what the base was quantized from: relative errors {worst}, where "
        f"quantizing explains up to {bound}",
        hint="give the very model and revision that the base was made of, or --force to go on",
    )
