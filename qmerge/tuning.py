"""What training changed: the adapters and partial states of a recipe as one change of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters import (
    Adapter,
    Chain,
    Change,
    combine,
    inject,
    open_adapter,
    overlay,
)
from qmerge.adapters.probe import Rows, no_rows
from qmerge.adapters.source import read_headers, rows_of_vocabulary
from qmerge.errors import AdapterError, Fault
from qmerge.job import Faults
from qmerge.model.changed import OpenedChange, on_opened
from qmerge.model.reshape import Shape, reshape, vocabulary_of
from qmerge.model.skeleton import Skeleton
from qmerge.model.weights import Weights
from qmerge.names import matches, under
from qmerge.recipe import Recipe
from qmerge.storage.headers import TensorInfo
from qmerge.texts import ROWS_HINT

UNTIED = (
    "training made the head differ from the embedding that it is tied to: the release has a head of"
    " its own, and says tie_word_embeddings false"
)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The opened adapters, what they come to on the model, and the model's shape with them."""

    change: Change
    adapters: tuple[Adapter, ...]
    shape: Shape
    notes: tuple[str, ...]


def open_tuning(
    recipe: Recipe, skeleton: Skeleton | None, base: Weights | None, faults: Faults
) -> Tuning | None:
    """Open everything that was trained; None where nothing was given or something is wrong.

    Without a skeleton (the base has faults of its own) the folders are opened all the same, so
    that their faults are told too.
    """
    adapters = _open_adapters(recipe, faults)
    state: Mapping[str, TensorInfo] | None = None
    with faults.at("--partial-state"):
        state = read_headers(recipe.partial_state) if recipe.partial_state is not None else {}
    shape = None
    if skeleton is not None and state is not None and len(adapters) == len(recipe.adapter):
        with faults.at("--adapter"):
            shape = _grown(skeleton, adapters, state)
    links = _links(recipe, shape, adapters, base, faults) if shape is not None else []
    faults.found += _left_beside(recipe, adapters)
    if skeleton is None or shape is None or not links:
        return None
    change = on_opened(shape.skeleton, links[0] if len(links) == 1 else Chain(links=tuple(links)))
    if change.faults:
        faults.found += change.faults
        return None
    if change.unties:
        shape = reshape(skeleton, untied=True, vocabulary=vocabulary_of(shape.skeleton))
    faults.found += [*_homeless(shape, change), *_around_layers(shape, change)]
    faults.found += _unknown_rows(skeleton, shape, change)
    if base is not None:
        faults.found += _bound_to_base(recipe, adapters, base)
    return Tuning(
        change=change, adapters=tuple(adapters), shape=shape, notes=_notes(skeleton, shape)
    )


def _open_adapters(recipe: Recipe, faults: Faults) -> list[Adapter]:
    """Those that can be opened."""
    adapters = []
    for each in recipe.adapters():
        if not math.isfinite(each.weight):
            message = f"a weight of {each.weight} for {each.folder} is no number to weigh by"
            hint = "give DIR@WEIGHT, as in adapter@0.5"
            faults.found.append(Fault(where="--adapter", message=message, hint=hint))
        with faults.at(f"--adapter {each.folder}"):
            adapters.append(open_adapter(each.folder))
    return adapters


def _links(
    recipe: Recipe, shape: Shape, adapters: Sequence[Adapter], base: Weights | None, faults: Faults
) -> list[Change]:
    """The changes in their order, as far as they can be made: a partial state, then adapters."""
    links: list[Change] = []
    if recipe.partial_state is not None:
        with faults.at("--partial-state"):
            made = overlay(
                shape.skeleton.fused,
                recipe.partial_state,
                adapters=adapters,
                allow_noop=recipe.allow_noop,
                base=_rows(shape, base, links),
            )
            links.append(made)
    with faults.at("--adapter"):
        selection = _Selection(recipe)
        _link(links, recipe, shape, adapters, selection, base)
        faults.found += selection.faults()
    return links


def _grown(
    skeleton: Skeleton, adapters: Sequence[Adapter], state: Mapping[str, TensorInfo]
) -> Shape:
    """The model with as many tokens as what was trained has embeddings for."""
    whole = {str(each.path): each.vocabulary for each in adapters}
    whole |= {"--partial-state": rows_of_vocabulary(state)}
    said = {where: rows for where, rows in whole.items() if rows is not None}
    if len(set(said.values())) > 1:
        told = ", ".join(f"{rows} in {where}" for where, rows in said.items())
        raise AdapterError(
            f"they bring embeddings of different vocabularies: {told}",
            hint="merge one of them first, and train the other on the result",
        )
    tokens = max((each.last_token + 1 for each in adapters), default=0)
    return reshape(
        skeleton, vocabulary=next(iter(said.values()), max(tokens, vocabulary_of(skeleton)))
    )


def _link(
    links: list[Change],
    recipe: Recipe,
    shape: Shape,
    adapters: Sequence[Adapter],
    selection: _Selection,
    base: Weights | None,
) -> None:
    """Add one change for each adapter in its order, or one for all of them combined.

    They go on what a partial state has replaced: training ran the adapter on top of that.
    """
    skeleton = shape.skeleton
    weights = [each.weight for each in recipe.adapters()]
    if recipe.combine is not None and adapters:
        combined = combine(
            _after(links, skeleton).fused, adapters, weights, recipe.combine,
            density=recipe.density, seed=recipe.seed, allow_noop=recipe.allow_noop,
        )  # fmt: skip
        adapters, weights = [combined], [1.0]
    for adapter, weight in zip(adapters, weights, strict=True):
        put = partial(
            inject,
            adapter=adapter,
            weight=weight,
            selected=selection,
            allow_noop=recipe.allow_noop,
            base=_rows(shape, base, links),
        )
        links.append(_on_linears(_after(links, skeleton), adapter, put))


def _on_linears(skeleton: Skeleton, adapter: Adapter, put: Callable[[Any], Change]) -> Change:
    """An adapter on the model that transformers builds, which `put` injects it into.

    One of a kind that PEFT puts on no Conv1D was trained on packed linears in their place. Modules
    beside those that training saved whole could lie either way, and are left refused.
    """
    try:
        return put(skeleton.fused)
    except AdapterError:
        saved = {name.rpartition(".")[2] for name in adapter.config.get("modules_to_save") or ()}
        parts = {part for name in skeleton.turned for part in name.split(".")}
        if skeleton.fusions or not skeleton.turned or saved & parts:
            raise
        change = put(skeleton.model)
        return OpenedChange(change=change, skeleton=skeleton, touched=change.touched)


def _rows(shape: Shape, base: Weights | None, links: Sequence[Change]) -> Rows:
    """The base as the next change finds it; not known where those before it changed it."""
    if base is None:
        return no_rows
    fitted, aliases = shape.fit(base), shape.skeleton.tied()
    changed = frozenset[str]().union(*(link.touched for link in links))

    def rows(name: str, start: int, stop: int) -> torch.Tensor | None:
        own = aliases.get(name, name)
        if name in changed or not fitted.holds(own):
            return None
        if own in shape.skeleton.turned:
            return fitted.tensor(own).T[start:stop]
        return fitted.rows(own, start, stop)

    return rows


def _after(links: Sequence[Change], skeleton: Skeleton) -> Skeleton:
    """The model that the next change is made to: one that was untied stays so."""
    untied = any(link.unties for link in links)
    return reshape(skeleton, untied=True).skeleton if untied else skeleton


class _Selection:
    """`--only` and `--except` on module names, and which of their patterns meant something."""

    def __init__(self, recipe: Recipe) -> None:
        self.only, self.exclude = recipe.only, recipe.exclude
        self.used: set[str] = set()

    def __call__(self, module: str) -> bool:
        chosen = [pattern for pattern in self.only if matches(pattern, module)]
        dropped = [pattern for pattern in self.exclude if matches(pattern, module)]
        self.used.update(chosen, dropped)
        return bool(chosen or not self.only) and not dropped

    def faults(self) -> list[Fault]:
        """Patterns that fit no module that is adapted: a misspelt one would change the merge."""
        given = [("--only", each) for each in self.only]
        given += [("--except", each) for each in self.exclude]
        return [
            Fault(
                where=option,
                message=f"{pattern!r} fits no module that the adapters change",
                hint="`qmerge inspect ADAPTER` lists what it targets; patterns fit whole names, so"
                " that a layer is as '*.layers.1.*'",
            )
            for option, pattern in given
            if pattern not in self.used
        ]


def _homeless(shape: Shape, change: Change) -> list[Fault]:
    """Changes that no unit of the walk would merge, so that none is lost in silence."""
    known = shape.skeleton.parameters().keys() | shape.skeleton.tied().keys()
    return [
        Fault(where="--adapter", message=f"changes {name}, which the model does not have")
        for name in sorted(change.touched - known)
    ]


def _around_layers(shape: Shape, change: Change) -> list[Fault]:
    """Modules that hold decoder layers and were trained as one."""
    layer = shape.skeleton.layer_path(0)
    return [
        Fault(
            where="--adapter",
            message=f"replaces {path} as a whole, with the decoder layers in it",
            hint="that is a model and no adapter: merge it with PEFT, and quantize the result",
        )
        for path in change.adapted
        if under(layer, path) is not None and path != layer
    ]


def _unknown_rows(skeleton: Skeleton, shape: Shape, change: Change) -> list[Fault]:
    """New tokens of which training saved no embedding."""
    before = skeleton.parameters()
    found = []
    for name, rows in shape.rows.items():
        known = before[shape.owners.get(name, name)].shape[0]
        if rows > known and not change.supplies(name, known):
            message = f"the rows {known} to {rows - 1} of {name} were trained, and are not there"
            found.append(Fault(where="--adapter", message=message, hint=ROWS_HINT))
    return found


def _notes(skeleton: Skeleton, shape: Shape) -> tuple[str, ...]:
    notes = [UNTIED] if shape.owners else []
    rows, known = vocabulary_of(shape.skeleton), vocabulary_of(skeleton)
    if rows != known:
        notes.append(f"training changed the vocabulary from {known} to {rows} tokens")
    return tuple(notes)


def _left_beside(recipe: Recipe, adapters: Sequence[Adapter]) -> list[Fault]:
    """Weights in an adapter's folder that nobody was told to merge."""
    given = recipe.partial_state.resolve() if recipe.partial_state is not None else None
    return [
        Fault(
            where=str(each.path),
            message=f"holds {name} beside the adapter, which would not be merged",
            hint=f"give --partial-state {each.path / name} if training saved it, or move it away",
        )
        for each in adapters
        for name in each.beside
        if (each.path / name).resolve() != given
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


def tuning_notes(tuning: Tuning, *folders: Path) -> list[str]:
    """What a reader should know of the change and of the base, which is in one of the folders."""
    return [*tuning.notes, *_base_notes(tuning.adapters, *folders), *tuning.change.notes]


def _base_notes(adapters: Sequence[Adapter], *folders: Path) -> list[str]:
    """What a reader should know of the base that the adapters were trained on."""
    notes = [note for each in adapters if (note := each.base_mismatch(*folders))]
    reasons = [f"{each.path}: {each.base_reason}" for each in adapters if each.base_reason]
    return notes + reasons
