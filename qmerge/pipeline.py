"""The main job: plan, walk, score, choose, publish."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qmerge import __version__
from qmerge.errors import ModelError
from qmerge.grids import opened_by
from qmerge.job import NOISE, REFERENCE, Job, merged_arm, release_arm
from qmerge.measure import (
    check_limits,
    limits_of,
    pair,
    paired_estimate,
    pool_survival,
    score_arms,
    worst_windows,
)
from qmerge.measure.remedy import pooled, survival_warning
from qmerge.meter import Meter, peak_rss
from qmerge.model.skeleton import auto_class
from qmerge.names import WEIGHT, module_of
from qmerge.plan import make_plan
from qmerge.precision import precision_on
from qmerge.progress import Progress, Silent
from qmerge.provenance import (
    corpus_record,
    file_record,
    folder_record,
    plain_recipe,
    versions,
)
from qmerge.recipe import Recipe
from qmerge.release import (
    quantization_settings,
    tokenizer_files,
    write_config,
    write_papers,
    write_side_files,
)
from qmerge.report.plan import needs
from qmerge.results import (
    FEW_TOKENS,
    REPORT,
    ArmScore,
    Candidate,
    Change,
    Corpora,
    Estimate,
    InputRecord,
    LayerResult,
    Remedy,
    RunResult,
    StrategyResult,
)
from qmerge.stages.evaluate import Scored
from qmerge.stages.substitute import likeness, unlike
from qmerge.storage.files import read_json
from qmerge.storage.shards import write_index
from qmerge.texts import load_tokenizer
from qmerge.walk import Walk
from qmerge.workspace import Workspace, whole_fingerprint

RELEASE = "release"
DENSE = "dense"
"""What the reference is called where there is no adapter."""
MERGED = "merged"
NOT_COMPARED = "the base's quantization error is not measured against it"

Scores = dict[str, dict[str, ArmScore]]


def run(recipe: Recipe, progress: Progress | None = None) -> RunResult:
    """Make a release and its report at `recipe.out`.

    Raises `PlanError` with every fault before anything is written. Whatever ends a run early,
    nothing appears at `out`, and the same recipe goes on from the last finished unit.
    """
    with Meter() as meter:
        return _run(recipe, progress or Silent(), meter)


def _run(recipe: Recipe, progress: Progress, meter: Meter) -> RunResult:
    began = time.monotonic()
    finished = None if recipe.restart else _finished(recipe)
    if finished is not None:
        return finished
    progress.stage("plan", 2)
    progress.step("reading headers")
    with meter.stage("plan"):
        plan = make_plan(recipe)
        job = plan.ready()
    progress.step(needs(plan.summary))
    if plan.summary.goes_on:
        progress.warn(plan.summary.goes_on)
    with meter.stage("digest"):
        inputs = _hash_inputs(job, progress)
    same = whole_fingerprint(job, inputs)
    with Workspace.open(recipe.out, same, restart=recipe.restart) as workspace:
        job = _compared(job, progress, resumed=bool(workspace.finished()))
        for note in job.notes:
            progress.warn(note)
        walk = Walk(job, workspace, progress, meter)
        _walk(walk, progress)
        progress.stage("score", len(job.evaluation))
        progress.step("final norm and head")
        scored, noise = walk.scores(), walk.noise()
        seconds = time.monotonic() - began + walk.ledger.seconds_before
        result = _result(walk, scored, noise, inputs, seconds)
        assert result.strategy is not None
        progress.stage("publish", 1)
        progress.step(str(recipe.out))
        return _publish(walk, result, result.strategy.chosen, recipe.to_yaml())


def _finished(recipe: Recipe) -> RunResult | None:
    """The result of this very run where it was stopped after its release had appeared."""
    if not recipe.out.name or Workspace.tidy(recipe.out) != recipe.to_yaml():
        return None
    return RunResult.from_dict(read_json(recipe.out / REPORT), source=str(recipe.out / REPORT))


def _walk(walk: Walk, progress: Progress) -> None:
    finished = walk.resume()
    progress.stage("walk", len(walk.units))
    work = {"embedding": walk.embedding, "layer": walk.layer}
    for unit in walk.units:
        progress.step(unit.label)
        if unit.label not in finished:
            work.get(unit.kind, walk.outer)(unit)


def _hash_inputs(job: Job, progress: Progress) -> dict[str, InputRecord]:
    """Every file that goes in, with its digest: what a report names and a resumed run compares."""
    recipe, given = job.recipe, job.recipe.folders()
    progress.stage("digest", len(given))
    records = {}
    for role, folder in given.items():
        progress.step(f"{role} {folder}")
        records[role] = folder_record(folder)
    records["base"] = replace(records["base"], format=job.base.format.name)
    if job.original is not None and "original" in records:
        records["original"] = replace(records["original"], format=job.original.format.name)
    for role, adapter in zip((r for r in records if "adapter" in r), job.adapters, strict=True):
        details: dict[str, Any] = {"rank": adapter.rank}
        if adapter.base_name and not Path(adapter.base_name).exists():
            details["base"] = adapter.base_name
        records[role] = replace(records[role], format=adapter.kind, details=details)
    if recipe.partial_state is not None:
        records["partial state"] = file_record(recipe.partial_state, *_saved_beside(job))
    return records


def _saved_beside(job: Job) -> list[Path]:
    """Tokenizer files beside a partial state, where the release takes those."""
    state, home = job.recipe.partial_state, job.tokenizer_folder
    folders = (job.recipe.base, *(each.folder for each in job.recipe.adapters()))
    if state is None or home != state.parent or home in folders:
        return []
    return [*tokenizer_files(home).values()]


def _rounded(job: Job) -> dict[str, str]:
    """What matrix units rounded products to in calibration."""
    precision = precision_on(job.device) if job.settings.reduced else None
    return {"matrix units": precision} if precision else {}


def _compared(job: Job, progress: Progress, *, resumed: bool) -> Job:
    """Before anything is spent on the original: is it what the base was quantized from?

    `ModelError` where an adapter would be merged onto another model. Where it is only measured
    against, what was not quantized is compared, and the job that comes back says what was found.
    """
    base, original = job.base, job.original
    if original is None or job.recipe.original is None or job.recipe.force:
        return job
    strict = "substitute" in job.strategies
    if strict and resumed:
        return job
    targets = {name + WEIGHT for name in job.specs}
    linears = {name for name in targets if base.is_quantized(name)} or targets
    units = job.skeleton.units()
    progress.stage("compare with the original", sum(len(unit.parameters) for unit in units))
    found = likeness(base, original, units, linears, progress.step, alone=not strict)
    message = unlike(found)
    if message is None:
        return job
    if strict:
        raise ModelError(
            message,
            hint="give the very model and revision that the base was made of, or --strategy"
            " dequantize, or --force to go on",
        )
    return replace(job, notes=(*job.notes, f"{message}: {NOT_COMPARED}"), compared=False)


# From scores to a result


def _result(
    walk: Walk,
    scored: Sequence[Scored],
    noise: Sequence[Scored],
    inputs: Mapping[str, InputRecord],
    seconds: float,
) -> RunResult:
    job = walk.job
    by_corpus = {found.corpus.name: score_arms(found.stats, REFERENCE) for found in scored}
    strategy = _choose(job, by_corpus, walk.ledger.layers)
    names = _arm_names(job, strategy.chosen)
    arms = _named_arms(by_corpus, names)
    layers = tuple(_named_drift(layer, names) for layer in walk.ledger.layers[strategy.chosen])
    kept = {_on_disk(job, x.name): x.survival for layer in layers for x in layer.linears}
    remedies = pooled(_remedies(job, layers))
    weak = survival_warning(kept, remedies)
    merge = walk.merge_check(strategy.chosen)
    result = RunResult(
        qmerge_version=__version__,
        recipe=plain_recipe(job.recipe),
        command="run" if job.change is not None else "quantize",
        reference=names[REFERENCE],
        strategy=strategy,
        corpora=Corpora(
            calibration=corpus_record(job.calibration, job.recipe.seed),
            evaluation={corpus.name: corpus_record(corpus) for corpus in job.evaluation},
        ),
        arms=arms,
        change={name: score.change for name, score in arms[RELEASE].items() if score.change},
        noise_floor={
            found.corpus.name: score_arms(found.stats, REFERENCE)[NOISE] for found in noise
        },
        change_from_previous=_from_previous(arms),
        survival=pool_survival(kept.values()),
        merge=merge,
        left_out=job.change.left_out if job.change is not None else (),
        remedies=remedies,
        layers=layers,
        worst=_worst(job, scored, strategy.chosen),
        inputs=inputs,
        versions=versions() | _rounded(job),
        warnings=(
            *job.notes,
            *_fallbacks(layers),
            *([weak] if weak else []),
        ),
        timings={**walk.meter.seconds, "total": seconds},
        memory=walk.meter.memory,
        # The kernel rounds the two counters differently.
        peak_rss_bytes=max(peak_rss(), *walk.meter.memory.values()),
    )
    return replace(result, gate=check_limits(result, limits_of(job.recipe)))


def _from_previous(arms: Mapping[str, Mapping[str, ArmScore]]) -> dict[str, Change]:
    previous = arms.get("previous", {})
    return {name: pair(score, arms[RELEASE][name]) for name, score in previous.items()}


def _choose(
    job: Job,
    by_corpus: Mapping[str, Mapping[str, ArmScore]],
    layers: Mapping[str, Sequence[LayerResult]],
) -> StrategyResult:
    """The one strategy there is, or of two the release nearer to `trained` on in-domain text."""
    name = job.in_domain.name
    scores = {s: by_corpus[name][release_arm(s)] for s in job.strategies}
    candidates = tuple(_candidate(s, score, layers[s]) for s, score in scores.items())
    if len(job.strategies) == 1:
        only = job.strategies[0]
        alone = job.recipe.strategy == "auto"
        why = "there is no original to substitute" if alone else "the only one that was asked for"
        return StrategyResult(chosen=only, why=why, candidates=candidates)
    first, second = job.strategies
    difference = paired_estimate(
        torch.tensor(scores[first].window_kl), torch.tensor(scores[second].window_kl)
    )
    chosen, why = _decide(scores, difference, name)
    return StrategyResult(chosen=chosen, why=why, candidates=candidates)


def _decide(scores: Mapping[str, ArmScore], difference: Estimate, corpus: str) -> tuple[str, str]:
    first, second = scores
    error = difference.stderr or 0.0
    said = f"KL from trained on {corpus} differs by {abs(difference.mean):.2g} ± {error:.1g}"
    if abs(difference.mean) > 2 * error:
        chosen, other = (first, second) if difference.mean < 0 else (second, first)
        return chosen, f"{said} in its favour against {other}"
    chosen = min(scores, key=lambda strategy: scores[strategy].perplexity)
    return chosen, f"{said}, within two standard errors; its perplexity is lower"


def _candidate(strategy: str, score: ArmScore, layers: Sequence[LayerResult]) -> Candidate:
    kept = pool_survival([linear.survival for layer in layers for linear in layer.linears])
    return Candidate(
        strategy=strategy,
        kl=Estimate(mean=score.kl.mean, stderr=score.kl.stderr) if score.kl else None,
        perplexity=score.perplexity,
        stderr=score.stderr,
        survival=kept.survival if kept else None,
    )


def _named_arms(
    by_corpus: Mapping[str, Mapping[str, ArmScore]], names: Mapping[str, str]
) -> dict[str, dict[str, ArmScore]]:
    """Arms by the names of the report: the chosen strategy's lose theirs, the other's keep it."""
    walked = next(iter(by_corpus.values()))
    order = sorted(walked, key=lambda arm: arm not in names and "@" in arm)
    return {
        names.get(arm, arm.replace("@", "_")): {c: scores[arm] for c, scores in by_corpus.items()}
        for arm in order
    }


def _named_drift(layer: LayerResult, names: Mapping[str, str]) -> LayerResult:
    return replace(
        layer,
        drift={names.get(arm, arm.replace("@", "_")): far for arm, far in layer.drift.items()},
    )


def _arm_names(job: Job, chosen: str) -> dict[str, str]:
    """Names in the report for the reference and for the arms of the published strategy."""
    told = REFERENCE if job.change is not None else DENSE
    return {REFERENCE: told, merged_arm(chosen): MERGED, release_arm(chosen): RELEASE}


def _worst(job: Job, scored: Sequence[Scored], chosen: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(job.tokenizer_folder, trust_remote_code=job.recipe.trust_remote_code)
    return {
        found.corpus.name: worst_windows(
            found.stats[release_arm(chosen)],
            found.stats[REFERENCE],
            found.corpus.tokens,
            tokenizer.decode,
        )
        for found in scored
    }


def _remedies(job: Job, layers: Sequence[LayerResult]) -> Iterator[Remedy]:
    """What was tried layer by layer, under the names that an override is given."""
    for layer in layers:
        for found in layer.remedies:
            yield replace(found, where=tuple(_on_disk(job, name) for name in found.where))


def _on_disk(job: Job, name: str) -> str:
    return job.base.names.module_to_write(name)


def _fallbacks(layers: Sequence[LayerResult]) -> Iterator[str]:
    for layer in layers:
        for linear in layer.linears:
            if linear.fallback and linear.fallback != FEW_TOKENS:
                yield f"{linear.name}: {linear.fallback}"
        few = {module_of(each.name): each.tokens for each in layer.linears
               if each.fallback and FEW_TOKENS in each.fallback}  # fmt: skip
        if few:
            named = ", ".join(f"{expert} ({tokens})" for expert, tokens in few.items())
            yield f"experts that too few tokens chose, calibrated with all tokens: {named}"


def _publish(walk: Walk, result: RunResult, chosen: str, asked: str) -> RunResult:
    """Everything beside the shards, and then the rename that makes it a release."""
    job, folder = walk.job, walk.workspace.release(chosen)
    records = walk.ledger.records[chosen]
    files = {record.file: record.sha256 for record in records}
    files["model.safetensors.index.json"] = write_index(folder, records)
    files |= write_config(job, folder)
    files |= write_side_files(job, folder)
    settings = quantization_settings(job)
    release = InputRecord(
        path=str(job.recipe.out),
        format=job.settings.format,
        bytes=sum(record.nbytes for record in records),
        files=dict(sorted(files.items())),
        license=result.inputs["base"].license,
        details={
            "bits": job.settings.spec.bits,
            "group_size": job.settings.spec.group_size,
            "symmetric": job.settings.spec.symmetric,
            "act_order": job.settings.order,
            "format": job.settings.format,
            "quant_method": settings["quant_method"],
            "tokenizer": str(job.tokenizer_folder),
            "auto_class": auto_class(job.skeleton.model.config).__name__,
            "opened_by": opened_by(job.settings.format, job.skeleton, job.specs),
        },
    )
    finished = write_papers(job, folder, replace(result, release=release))
    walk.workspace.publish(chosen, asked)
    return finished
