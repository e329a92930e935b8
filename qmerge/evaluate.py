"""Checkpoints side by side: each streamed through its own layers, all scored on the same tokens."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qmerge import __version__
from qmerge.adapters import Change
from qmerge.corpus import Corpus
from qmerge.errors import Fault, InputError, PlanError
from qmerge.heap import keep_freed
from qmerge.job import Faults, pick_device
from qmerge.measure import check_limits, limits_of, score_arms, too_few_windows
from qmerge.meter import Meter, peak_rss
from qmerge.model.frame import Frame
from qmerge.model.layer import move
from qmerge.model.opening import open_model, told
from qmerge.model.probe import probe
from qmerge.model.reshape import Shape, vocabulary_of
from qmerge.model.skeleton import Skeleton
from qmerge.model.streams import Stream, Streams, batches
from qmerge.model.weights import Weights
from qmerge.names import Unit
from qmerge.plan import as_trained
from qmerge.progress import Progress, Silent
from qmerge.provenance import corpus_record, folder_record, plain_recipe, versions
from qmerge.recipe import EvaluateRecipe, Recipe
from qmerge.reread import read_report
from qmerge.results import REPORT, Corpora, InputRecord, RunResult, Survival
from qmerge.specs import Contestant
from qmerge.stages.evaluate import advance, score
from qmerge.stages.merge import live_layer, outer_weights
from qmerge.texts import (
    TOKENS_AT_ONCE,
    check_texts,
    check_tokens,
    evaluation_texts,
    load_tokenizer,
    tokenizer_home,
    window_length,
    window_notes,
)
from qmerge.tuning import Tuning, open_tuning, tuning_notes

SHARDS = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One checkpoint, opened, with an adapter live on top where one was named."""

    asked: Contestant
    skeleton: Skeleton
    weights: Weights
    tuning: Tuning | None
    notes: tuple[str, ...]
    """What a reader should know of the base under the adapter."""

    @property
    def change(self) -> Change | None:
        return self.tuning.change if self.tuning else None

    @property
    def name(self) -> str:
        return self.asked.name

    def layer(self, unit: Unit) -> nn.Module:
        """One decoder layer with its weights."""
        return live_layer(self.skeleton, self.change, unit, self.weights.unit(unit))

    def outer(self) -> Weights:
        """What stands outside the layers, with what the adapter does there."""
        return outer_weights(self.skeleton, self.change, self.skeleton.units(), self.weights)


def evaluate(
    recipe: EvaluateRecipe, progress: Progress | None = None, *, fewest: int = 1
) -> RunResult:
    """Perplexity of each model, and what sets it apart from the reference where one is named.

    Raises `PlanError` with everything that cannot be opened, and texts of less than the `fewest`
    windows. Memory is one layer of one model and a few windows; hidden states are spilled to a
    temporary folder.
    """
    keep_freed()
    with Meter() as meter:
        return _evaluate(recipe, progress or Silent(), meter, fewest)


def _evaluate(recipe: EvaluateRecipe, progress: Progress, meter: Meter, fewest: int) -> RunResult:
    began = time.monotonic()
    progress.stage("open", 1)
    progress.step("reading headers")
    with meter.stage("open"):
        models, corpora, device = _open(recipe, fewest)
        inputs = _inputs(models)
        kept = _recorded_survival(recipe, models, inputs)
    own = (f"{model.name}: {note}" for model in models for note in model.notes)
    notes = (*own, *window_notes(recipe, corpora))
    for note in notes:
        progress.warn(note)
    with tempfile.TemporaryDirectory(prefix="qmerge-") as folder:
        frames, streams = {}, {}
        for number, model in enumerate(models):
            frame = frames[model.name] = Frame(model.skeleton, model.outer())
            with meter.stage(f"layers of {model.name}"):
                streams[model.name] = _through_layers(
                    model, frame, corpora, Path(folder, str(number)), device, progress
                )
        progress.stage("score", 1)
        progress.step("final norm and head")

        def read(arm: str, corpus: str, start: int, stop: int) -> torch.Tensor:
            return streams[arm].read(corpus, start, stop)

        with meter.stage("score"):
            scored = score(frames, read, corpora, recipe.reference, progress, device)
    by_corpus = {s.corpus.name: score_arms(s.stats, recipe.reference) for s in scored}
    result = RunResult(
        qmerge_version=__version__,
        command="evaluate",
        recipe={"models": list(recipe.models), **plain_recipe(recipe)},
        reference=recipe.reference,
        subject=None,
        corpora=Corpora(evaluation={c.name: corpus_record(c) for c in corpora}),
        arms={m.name: {c: found[m.name] for c, found in by_corpus.items()} for m in models},
        inputs=inputs,
        versions=versions(),
        warnings=notes,
        timings={**meter.seconds, "total": time.monotonic() - began},
        memory=meter.memory,
        peak_rss_bytes=peak_rss(),
    )
    return replace(result, gate=check_limits(result, limits_of(recipe), kept))


def _open(
    recipe: EvaluateRecipe, fewest: int
) -> tuple[list[Model], tuple[Corpus, ...], torch.device]:
    faults, device = Faults(), torch.device("cpu")
    faults.found += recipe.faults()
    with faults.at("--device"):
        device = pick_device(recipe.device)
    models: list[Model] = []
    for asked in recipe.contestants():
        with faults.at(asked.name):
            models.append(_open_model(asked, recipe, faults))
    corpora: tuple[Corpus, ...] = ()
    if not faults.found:
        with faults.at("tokenizer"):
            corpora = _texts(models, recipe, faults)
        for corpus in corpora:
            if len(corpus.tokens) < fewest:
                with faults.at("--eval"):
                    raise too_few_windows(corpus.name)
    else:
        check_texts(recipe, faults)
    if faults.found:
        raise PlanError(faults.found)
    return models, corpora, device


def _open_model(asked: Contestant, recipe: EvaluateRecipe, faults: Faults) -> Model:
    skeleton, weights = open_model(asked.folder, trust_remote_code=recipe.trust_remote_code)
    probe(skeleton)
    tuning, notes = None, told(skeleton, weights)
    if asked.adapter is not None:
        alone = Recipe(
            base=asked.folder,
            adapter=(f"{asked.adapter}@1",),
            out=asked.folder,
            base_quant=None if weights.format.summary.quantized else recipe.base_quant,
            allow_noop=True,
        )
        weights, loaded = as_trained(alone, skeleton, weights)
        tuning = _tuned(asked, alone, skeleton, weights, faults)
        notes = (*loaded.notes, *(tuning_notes(tuning, asked.folder) if tuning else ()))
    shape = tuning.shape if tuning else Shape(skeleton=skeleton)
    return Model(
        asked=asked,
        skeleton=shape.skeleton,
        weights=shape.fit(weights),
        tuning=tuning,
        notes=notes,
    )


def _tuned(
    asked: Contestant, recipe: Recipe, skeleton: Skeleton, weights: Weights, faults: Faults
) -> Tuning | None:
    found = Faults()
    tuning = open_tuning(recipe, skeleton, weights, found)
    options = ("--adapter",)  # it was given without one
    faults.found += [
        replace(fault, where=asked.name) if fault.where.startswith(options) else fault
        for fault in found.found
    ]
    return tuning


def _texts(models: Sequence[Model], recipe: EvaluateRecipe, faults: Faults) -> tuple[Corpus, ...]:
    """The corpora in tokens of the first model; one that numbers tokens otherwise is a fault."""
    first: Any = None
    for model in models:
        home = tokenizer_home(model.asked.folder, model.asked.adapter)
        trust = recipe.trust_remote_code
        tokenizer = load_tokenizer(home, trust_remote_code=trust)
        rows = vocabulary_of(model.skeleton)
        check_tokens(tokenizer, home, model.asked.folder, rows, trust=trust)
        first = first or tokenizer
        known, other = first.get_vocab(), tokenizer.get_vocab()
        if any(other.get(token, number) != number for token, number in known.items()):
            faults.found.append(
                Fault(
                    where=model.name,
                    message=f"its tokenizer numbers tokens otherwise than {models[0].name}'s",
                    hint="models are compared on the same tokens: evaluate them one by one",
                )
            )
    length = min(window_length(recipe.sequence_length, model.skeleton) for model in models)
    return evaluation_texts(recipe, first, length, faults)


def _through_layers(
    model: Model,
    frame: Frame,
    corpora: Sequence[Corpus],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> Streams:
    """All windows through all layers of one model; its last hidden states by corpus."""
    length = corpora[0].tokens.shape[1]
    at_once = max(1, TOKENS_AT_ONCE // length)
    width = model.skeleton.hidden_size
    streams = Streams(
        folder,
        {c.name: Stream(windows=len(c.tokens), length=length, width=width) for c in corpora},
        resumable=False,
    )
    layers = [unit for unit in model.skeleton.units() if unit.kind == "layer"]
    progress.stage(model.name, len(layers))
    for corpus in corpora:
        for start, stop in batches(len(corpus.tokens), at_once):
            streams.append(corpus.name, frame.enter(corpus.tokens[start:stop])[0])
    streams.turn()
    calls = move(frame.calls(length), device)
    for unit in layers:
        progress.step(unit.label)
        layer = model.layer(unit).to(device)
        for corpus in corpora:
            advance(layer, streams, corpus.name, calls[unit.index], at_once, None)
        streams.turn()
    return streams


def _inputs(models: Sequence[Model]) -> dict[str, InputRecord]:
    found = {}
    for model in models:
        record = folder_record(model.asked.folder)
        found[model.name] = replace(record, format=model.weights.format.name)
        for adapter in model.tuning.adapters if model.tuning else ():
            found[f"{model.name} adapter"] = folder_record(adapter.path, format=adapter.kind)
    return found


def _recorded_survival(
    recipe: EvaluateRecipe, models: Sequence[Model], inputs: Mapping[str, InputRecord]
) -> dict[str, Survival | None]:
    """What the limit of survival is kept on: each release's own record of how it was made."""
    if recipe.min_survival is None:
        return {}
    faults = Faults()
    found: dict[str, Survival | None] = {}
    for model in models:
        if model.name != recipe.reference:
            with faults.at(model.name):
                found[model.name] = _survival_of(model, inputs[model.name])
    if faults.found:
        raise PlanError(faults.found)
    return found


def _survival_of(model: Model, record: InputRecord) -> Survival:
    """`InputError` where the folder's report is missing, has none, or is of other weights."""
    hint = "give releases that `qmerge run` made, or leave out --min-survival"
    report = read_report(model.asked.folder)
    made = report.release.files if report.release is not None else {}
    weights = {name: digest for name, digest in record.files.items() if name.endswith(SHARDS)}
    if any(made.get(name) != digest for name, digest in weights.items()):
        raise InputError(f"{model.asked.folder}: {REPORT} is of other weights", hint=hint)
    if report.survival is None or report.survival.survival is None or model.tuning is not None:
        raise InputError(f"{model.asked.folder}: {REPORT} has no survival for it", hint=hint)
    return report.survival
