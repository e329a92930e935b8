"""What would bring an adapter back where too little of it survived: tried, never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qmerge.measure.survival import pool_survival
from qmerge.results import Remedy, Survival

ENOUGH = 0.9


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another setting for linears that are quantized together: a flag, or what comes after the
    pattern of an override. `solve` quantizes them under it and says what survives of the update of
    the worst; `extra_bytes` is what they take beyond the setting at hand."""

    option: str
    extra_bytes: int
    solve: Callable[[], float | None]


def is_weak(survival: Survival | None) -> bool:
    """Whether a warning is due; where the adapter changed nothing there is nothing to lose."""
    return survival is not None and survival.survival is not None and survival.survival < ENOUGH


def cheapest(linears: tuple[str, ...], alternatives: Sequence[Alternative]) -> Remedy | None:
    """The first alternative by extra bytes under which enough survives; dearer ones are not
    solved. Of equal price the one listed first. None where none is enough."""
    for each in sorted(alternatives, key=lambda alternative: alternative.extra_bytes):
        kept = each.solve()
        if kept is not None and kept >= ENOUGH:
            return Remedy(
                option=each.option, where=linears, survival=kept, extra_bytes=each.extra_bytes
            )
    return None


def pooled(found: Iterable[Remedy]) -> tuple[Remedy, ...]:
    """Remedies of the same setting as one, in words that can be pasted: all their linears, the
    lowest survival and the sum of their bytes; the cheapest first."""
    by_option: dict[str, list[Remedy]] = {}
    for remedy in found:
        by_option.setdefault(remedy.option, []).append(remedy)
    joined = [
        Remedy(
            option=option,
            where=tuple(name for remedy in group for name in remedy.where),
            survival=min(remedy.survival for remedy in group),
            extra_bytes=sum(remedy.extra_bytes for remedy in group),
        )
        for option, group in by_option.items()
    ]
    spelled = (replace(remedy, option=_spelled(remedy)) for remedy in joined)
    return tuple(sorted(spelled, key=lambda remedy: remedy.extra_bytes))


def _spelled(remedy: Remedy) -> str:
    if remedy.option.startswith("--"):
        return remedy.option
    return " ".join(f"--override '{name}={remedy.option}'" for name in patterns(remedy.where))


def patterns(names: Iterable[str]) -> tuple[str, ...]:
    """PATTERNs that fit these module names and no other: one for the same modules of some layers.

    `a.0.q, a.0.k, a.1.q, a.1.k` is `re:a\\.(0|1)\\.(q|k)`.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    single = []
    for name in names:
        match = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
        if match is None:
            single.append(name)
        else:
            layers.setdefault((match[1], match[3]), []).append(match[2])
    modules: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (before, module), numbers in layers.items():
        modules.setdefault((before, tuple(numbers)), []).append(module)
    found = [_pattern(*place, names) for place, names in modules.items()]
    return (*found, *single)


def _pattern(before: str, numbers: Sequence[str], modules: Sequence[str]) -> str:
    if len(numbers) == len(modules) == 1:
        return f"{before}.{numbers[0]}.{modules[0]}"
    return rf"re:{re.escape(before)}\.{_either(numbers)}\.{_either(modules)}"


def _either(words: Sequence[str]) -> str:
    escaped = [re.escape(word) for word in words]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def survival_warning(linears: Mapping[str, Survival | None], found: Sequence[Remedy]) -> str | None:
    """A sentence where a linear or the model as a whole kept less than enough, else None."""
    weak = {name: s.survival or 0.0 for name, s in linears.items() if s and is_weak(s)}
    whole = pool_survival(linears.values())
    if not weak:
        return None
    worst = min(weak, key=lambda name: weak[name])
    model = f", {whole.survival:.3f} in the model" if whole and is_weak(whole) else ""
    helps = [f"{r.option} would bring {_counted(r, weak)} to {r.survival:.3f}" for r in found]
    left = len(weak.keys() - {name for remedy in found for name in remedy.where})
    if left:
        helps.append(f"for {left} of them nothing that was tried is enough")
    return (
        f"adapter survival is under {ENOUGH} in {len(weak)} of {len(linears)} linears, "
        f"{weak[worst]:.3f} in {worst}{model}: {'; '.join(helps)}"
    )


def _counted(remedy: Remedy, weak: Mapping[str, float]) -> str:
    count = len(weak.keys() & set(remedy.where))
    return "it" if len(weak) == 1 else "all of them" if count == len(weak) else f"{count} of them"
