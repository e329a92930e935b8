"""What training changed: the adapters and partial states of a recipe as one change of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmerge.adapters import Adapter, Chain, Change, combine, inject, open_adapter, overlay
from qmerge.errors import Fault
from qmerge.job import Faults
from qmerge.model.skeleton import Skeleton
from qmerge.model.weights import Weights
from qmerge.names import matches
from qmerge.recipe import Recipe

HEAD_HINT = "merge this adapter with PEFT into a model whose head is its own, and quantize that"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The opened adapters, and what they come to on the model."""

    change: Change
    adapters: tuple[Adapter, ...]


def open_tuning(
    recipe: Recipe, skeleton: Skeleton | None, base: Weights | None, faults: Faults
) -> Tuning | None:
    """Open everything that was trained; None where nothing was given or something is wrong.

    Without a skeleton (the base has faults of its own) the folders are opened all the same, so
    that their faults are told too.
    """
    asked = recipe.adapters()
    adapters: list[Adapter] = []
    for each in asked:
        with faults.at(f"--adapter {each.folder}"):
            adapters.append(open_adapter(each.folder))
    links: list[Change] = []
    if skeleton is not None and len(adapters) == len(asked):
        with faults.at("--adapter"):
            links += _links(recipe, skeleton, adapters)
        if recipe.partial_state is not None:
            with faults.at("--partial-state"):
                links.append(overlay(skeleton.model, recipe.partial_state))
    if skeleton is None or not links:
        return None
    change = links[0] if len(links) == 1 else Chain(links=tuple(links))
    faults.found += change.faults
    faults.found += _homeless(skeleton, change)
    if base is not None:
        faults.found += _bound_to_base(recipe, adapters, base)
    return Tuning(change=change, adapters=tuple(adapters))


def _links(recipe: Recipe, skeleton: Skeleton, adapters: Sequence[Adapter]) -> list[Change]:
    """One change for each adapter in its order, or one for all of them combined."""
    weights = [each.weight for each in recipe.adapters()]
    if recipe.combine is not None and adapters:
        combined = combine(
            skeleton.model, adapters, weights, recipe.combine,
            density=recipe.density, seed=recipe.seed,
        )  # fmt: skip
        adapters, weights = [combined], [1.0]
    return [
        inject(
            skeleton.model,
            adapter,
            weight=weight,
            selected=_selection(recipe),
            allow_noop=recipe.allow_noop,
        )
        for adapter, weight in zip(adapters, weights, strict=True)
    ]


def _selection(recipe: Recipe) -> Callable[[str], bool] | None:
    """`--only` and `--except` on module names; None where everything is merged."""
    if not recipe.only and not recipe.exclude:
        return None

    def selected(module: str) -> bool:
        wanted = not recipe.only or any(matches(pattern, module) for pattern in recipe.only)
        return wanted and not any(matches(pattern, module) for pattern in recipe.exclude)

    return selected


def _homeless(skeleton: Skeleton, change: Change) -> list[Fault]:
    """Changes that no unit of the walk would merge, so that none is lost in silence."""
    known = skeleton.parameters().keys()
    lost = sorted(name for name in change.touched if name not in known)
    if change.unties:
        lost = lost or ["the output embedding"]
        message = f"makes {lost[0]} differ from the embedding that it is tied to"
        return [Fault(where="--adapter", message=message, hint=HEAD_HINT)]
    aliases = skeleton.tied()
    lost = [name for name in lost if name not in aliases]
    return [
        Fault(where="--adapter", message=f"changes {name}, which the model does not have")
        for name in lost
    ]


def _bound_to_base(recipe: Recipe, adapters: Sequence[Adapter], base: Weights) -> list[Fault]:
    """Adapters whose start makes the base, or the original in its place, the wrong one."""
    found = [
        Fault(
            where="--strategy",
            message=f"'substitute' would be wrong for {each.path}: {each.base_reason}",
            hint="use --strategy dequantize",
        )
        for each in adapters
        if recipe.strategy == "substitute" and each.bound_to_base
    ]
    if base.format.summary.quantized:
        found += [misfit_fault(each, base.format.name) for each in adapters if each.misfit]
    return found


def misfit_fault(adapter: Adapter, form: str) -> Fault:
    """The adapter was not trained on this base in few bits."""
    return Fault(
        where=str(adapter.path),
        message=f"the base is {form}, on which it cannot have started: {adapter.misfit}",
        hint="give that base in 16 bits; where this base is what the start left of it, set"
        " init_lora_weights to true in adapter_config.json",
    )


def base_notes(adapters: Sequence[Adapter], *folders: Path) -> list[str]:
    """What a reader should know of the base that the adapters were trained on."""
    notes = [note for each in adapters if (note := each.base_mismatch(*folders))]
    reasons = [f"{each.path}: {each.base_reason}" for each in adapters if each.base_reason]
    return notes + reasons
