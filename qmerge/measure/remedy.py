"""What would bring an adapter back where too little of it survived: tried, never guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qmerge.measure.survival import pool_survival
from qmerge.results import Remedy, Survival

ENOUGH = 0.9


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another setting for one linear. `solve` quantizes under it and measures what survives;
    `extra_bytes` is what it takes beyond the setting at hand, from `stored_bytes` of both."""

    option: str
    extra_bytes: int
    solve: Callable[[], Survival]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The cheapest alternative that was enough for one linear."""

    linear: str
    option: str
    extra_bytes: int
    survival: Survival


def is_weak(survival: Survival | None) -> bool:
    """Whether a warning is due; where the adapter changed nothing there is nothing to lose."""
    return survival is not None and survival.survival is not None and survival.survival < ENOUGH


def cheapest(linear: str, alternatives: Sequence[Alternative]) -> Trial | None:
    """The first alternative by extra bytes under which enough survives; dearer ones are not
    solved. Of equal price the one listed first. None where none is enough."""
    for each in sorted(alternatives, key=lambda alternative: alternative.extra_bytes):
        found = each.solve()
        if found.survival is not None and not is_weak(found):
            return Trial(
                linear=linear, option=each.option, extra_bytes=each.extra_bytes, survival=found
            )
    return None


def remedies(trials: Iterable[Trial]) -> tuple[Remedy, ...]:
    """Trials with the same option as one remedy: its linears, their pooled survival and the sum
    of their bytes; the cheapest first."""
    by_option: dict[str, list[Trial]] = {}
    for trial in trials:
        by_option.setdefault(trial.option, []).append(trial)
    found = [_remedy(option, group) for option, group in by_option.items()]
    return tuple(sorted(found, key=lambda remedy: remedy.extra_bytes))


def _remedy(option: str, trials: Sequence[Trial]) -> Remedy:
    pooled = pool_survival(trial.survival for trial in trials)
    kept = pooled.survival if pooled else None
    return Remedy(
        option=option,
        where=tuple(trial.linear for trial in trials),
        survival=math.nan if kept is None else kept,
        extra_bytes=sum(trial.extra_bytes for trial in trials),
    )


def survival_warning(linears: Mapping[str, Survival | None], found: Sequence[Remedy]) -> str | None:
    """A sentence where a linear or the model as a whole kept less than enough, else None."""
    weak = {name: s.survival or 0.0 for name, s in linears.items() if s and is_weak(s)}
    whole = pool_survival(linears.values())
    if not weak:
        return None
    worst = min(weak, key=lambda name: weak[name])
    model = f", {whole.survival:.2f} in the model" if whole and is_weak(whole) else ""
    helped = {name for remedy in found for name in remedy.where}
    left = len(weak.keys() - helped)
    rest = f"; for {left} of them nothing that was tried is enough" if left else ""
    return (
        f"adapter survival is under {ENOUGH} in {len(weak)} of {len(linears)} linears, "
        f"{weak[worst]:.2f} in {worst}{model}{rest}"
    )


def stored_bytes(outputs: int, inputs: int, *, bits: int, group_size: int) -> int:
    """Bytes of a packed linear: codes and zeros of `bits`, 16-bit scales, 32-bit group indices.

    The layout of GPTQ checkpoints; codes are packed into whole 32-bit words.
    """
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    codes = 4 * -(-inputs * bits // 32) * outputs
    zeros = 4 * -(-outputs * bits // 32) * groups
    return codes + zeros + 2 * outputs * groups + 4 * inputs
