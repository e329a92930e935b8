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
LEFT_ALONE = 0.005
"""The same of a tensor that was not quantized: rounding bf16 and fp16 into one another costs up to
0.002, and full fine-tuning moves embeddings by more."""
ROWS = 4096
"""Rows compared at a time."""
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How far one linear of the base is from the same one of the original."""

    name: str
    error: float


def likeness(
    base: Weights, original: Weights, names: Iterable[str], tick: Callable[[str], None]
) -> list[Likeness]:
    """The relative error of each weight, the largest first."""
    found = []
    for name in names:
        tick(name)
        distance = norm = 0.0
        rows = original.row_count(name)
        # An embedding is large and cheap to cut; a quantized linear is decoded once.
        step = rows if base.is_quantized(name) else ROWS
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            weight = original.rows(name, start, stop)
            distance += float((base.rows(name, start, stop) - weight).double().square().sum())
            norm += float(weight.double().square().sum())
        found.append(Likeness(name=name, error=(distance / max(norm, 1e-30)) ** 0.5))
    return sorted(found, key=lambda each: each.error, reverse=True)


def check_likeness(quantized: list[Likeness], alone: list[Likeness], bits: int | None) -> None:
    """`ModelError` with the worst weights where quantizing cannot have made the base of it.

    `quantized` are the base's quantized linears, `alone` weights that quantizers do not touch.
    """
    bound = EXPLAINED.get(bits or UNKNOWN_BITS, EXPLAINED[UNKNOWN_BITS])
    for found, most, said in (
        (quantized, bound, f"quantizing explains up to {bound}"),
        (alone, LEFT_ALONE, "nothing was quantized"),
    ):
        if not found or found[0].error <= most:
            continue
        worst = ", ".join(f"{each.name} {each.error:.2g}" for each in found[:SHOWN])
        raise ModelError(
            "the original is not what the base was quantized from:"
            f" relative errors {worst}, where {said}",
            hint="give the very model and revision that the base was made of, or --force to go on",
        )
