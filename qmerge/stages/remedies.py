"""Other settings for linears that lost too much of the adapter, on the Hessian at hand.

O, I: out and in features of siblings stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from qmerge.formats.writing import packed_bytes
from qmerge.gptq import GridSpec
from qmerge.job import Settings
from qmerge.measure.remedy import Alternative
from qmerge.recipe import GridChoice

GROUPS = (128, 64, 32)
WIDER = (4, 8)


def alternatives(
    settings: Settings,
    shape_OI: tuple[int, int],
    *,
    anchorable: bool,
    solve: Callable[[Settings], float | None],
) -> list[Alternative]:
    """What can be had without leaving the method, in the order of preference at equal bytes.

    Switches that cost nothing, half the group, more bits; each alone. `solve` says what
    survives of the update under such settings.
    """
    return [
        Alternative(
            option=option,
            extra_bytes=_bytes(shape_OI, other.spec) - _bytes(shape_OI, settings.spec),
            solve=partial(solve, other),
        )
        for option, other in _others(settings, shape_OI[1], anchorable)
    ]


def _others(settings: Settings, width: int, anchorable: bool) -> Iterator[tuple[str, Settings]]:
    spec = settings.spec
    if not settings.unit_survival:
        yield "--unit-survival", replace(settings, unit_survival=True)
    if not settings.refine:
        yield "--refine", replace(settings, refine=True)
    if anchorable:
        grid: GridChoice = "auto" if settings.grid == "anchored" else "anchored"
        yield f"--grid {grid}", replace(settings, grid=grid)
    smaller = _smaller(spec.group_size, width)
    if smaller is not None:
        yield f"group:{smaller}", replace(settings, spec=replace(spec, group_size=smaller))
    for bits in WIDER:
        if bits > spec.bits:
            yield f"bits:{bits}", replace(settings, spec=replace(spec, bits=bits))


def _smaller(group_size: int, width: int) -> int | None:
    """The next smaller group that tiles the input."""
    present = width if group_size == -1 else group_size
    return next((size for size in GROUPS if size < present and width % size == 0), None)


def _bytes(shape_OI: tuple[int, int], spec: GridSpec) -> int:
    return packed_bytes(shape_OI, spec.bits, spec.group_size)
