"""From a recipe to a job: everything that can be known from headers, and every fault in it at once.

Nothing is written and no weight is decoded here. A plan without faults carries a `Job`, and a job
does not fail for a reason that could have been seen before it began.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters import Injection, inject, open_adapter
from qmerge.corpus import Corpus, load_corpus
from qmerge.errors import CorpusError, Fault, ModelError, PlanError, QmergeError, RecipeError
from qmerge.formats.writing import OutputFormat, packed_bytes
from qmerge.gptq import GridSpec
from qmerge.model.frame import probe
from qmerge.model.opening import open_model, open_weights
from qmerge.model.skeleton import Skeleton, text_config
from qmerge.model.weights import Weights
from qmerge.names import Unit, module_of, under
from qmerge.recipe import ActOrder, EvalText, Recipe, Scoring
from qmerge.results import PlannedUnit, PlanSummary
from qmerge.storage.checkpoint import Checkpoint

DEFAULT_BITS = 4
DEFAULT_GROUP = 128
SERVED_GROUPS = (-1, 32, 64, 128)
LONGEST_WINDOW = 2048
OFFLINE_CALIBRATION = "pydoc"
OFFLINE_EVALUATION = EvalText(name="pydoc", spec="pydoc-eval", role="in_domain")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
EVALUATION_TOKENS = 4096
"""Tokens of an evaluation text that go through a layer at once."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How linears are quantized: the same for all siblings that share an input."""

    spec: GridSpec
    order: ActOrder
    damping: float
    format: OutputFormat


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe that can be carried out, with everything opened that it needs."""

    recipe: Recipe
    skeleton: Skeleton
    base: Weights
    original: Weights | None
    injection: Injection
    tokenizer_folder: Path
    calibration: Corpus
    evaluation: tuple[Corpus, ...]
    settings: Settings
    strategies: tuple[str, ...]
    targets: frozenset[str]
    """Modules that are quantized, by parameter name without `.weight`."""
    calibration_at_once: int
    evaluation_at_once: int
    device: torch.device
    notes: tuple[str, ...]

    def targets_of(self, unit: Unit) -> tuple[str, ...]:
        """Modules of one unit that are quantized, relative to its path."""
        return tuple(
            module_of(name)
            for parameter in unit.parameters
            if module_of(parameter) in self.targets
            and parameter.endswith(".weight")
            and (name := under(parameter, unit.path)) is not None
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would be done. `job` is None where there are faults."""

    faults: tuple[Fault, ...]
    job: Job | None
    summary: PlanSummary

    def ready(self) -> Job:
        """The job; `PlanError` with all faults where there is none."""
        if self.job is None:
            raise PlanError(self.faults)
        return self.job


class Faults:
    """Collects what is wrong, so that one look shows all of it."""

    def __init__(self) -> None:
        self.found: list[Fault] = []

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        try:
            yield
        except PlanError as error:
            self.found += error.faults
        except QmergeError as error:
            self.found.append(Fault(where=where, message=error.message, hint=error.hint))


def make_plan(recipe: Recipe) -> Plan:
    """Open everything, check everything, spend nothing."""
    faults = Faults()
    job = _make_job(recipe, faults)
    found = tuple(dict.fromkeys(faults.found))
    job = None if found else job
    return Plan(faults=found, job=job, summary=_summary(recipe, job, found))


def _make_job(recipe: Recipe, faults: Faults) -> Job | None:
    """Every check runs that can, whatever the others found."""
    faults.found += recipe.faults()
    _check_out(recipe, faults)
    skeleton = base = original = injection = settings = None
    texts: tuple[Corpus, tuple[Corpus, ...]] | None = None
    targets: frozenset[str] = frozenset()
    notes: list[str] = []
    tokenizer_folder = tokenizer_home(recipe.base, recipe.adapter)
    with faults.at("--base"):
        skeleton, base = open_model(recipe.base, trust_remote_code=recipe.trust_remote_code)
        probe(skeleton)
    with faults.at("--adapter"):
        adapter = open_adapter(recipe.adapter)
        if skeleton is not None:
            injection = inject(skeleton.model, adapter)
            faults.found += injection.faults
    if skeleton is not None and base is not None:
        with faults.at("--original"):
            original = _open_original(recipe, skeleton)
        with faults.at("--bits, --group-size"):
            settings = _settings(recipe, base)
            targets = _targets(base, skeleton)
            faults.found += _misfits(skeleton, targets, settings.spec)
        texts = _texts(recipe, skeleton, tokenizer_folder, faults, notes)
    if faults.found or not (skeleton and base and injection and settings and texts):
        return None
    if tokenizer_folder != recipe.base:
        notes.append(f"tokenizer files are those that training saved in {tokenizer_folder}")
    calibration, evaluation = texts
    return Job(
        recipe=_effective(recipe, settings, calibration),
        skeleton=skeleton,
        base=base,
        original=original,
        injection=injection,
        tokenizer_folder=tokenizer_folder,
        calibration=calibration,
        evaluation=evaluation,
        settings=settings,
        strategies=_strategies(recipe, notes),
        targets=targets,
        calibration_at_once=_calibration_at_once(recipe, skeleton, calibration),
        evaluation_at_once=max(1, EVALUATION_TOKENS // calibration.tokens.shape[1]),
        device=pick_device(recipe.device),
        notes=(*notes, *injection.notes),
    )


def _check_out(recipe: Recipe, faults: Faults) -> None:
    if recipe.out.exists() or recipe.out.is_symlink():
        faults.found.append(
            Fault(
                where="--out",
                message=f"{recipe.out} exists",
                hint="name a folder that does not exist yet, or remove this one",
            )
        )
    elif not _nearest_folder(recipe.out).is_dir():
        faults.found.append(
            Fault(where="--out", message=f"{_nearest_folder(recipe.out)} is not a folder")
        )


def _nearest_folder(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _open_original(recipe: Recipe, skeleton: Skeleton) -> Weights | None:
    if recipe.original is None:
        return None
    original = open_weights(Checkpoint.open(recipe.original), skeleton)
    quantized = [name for name, w in original.format.weights.items() if w.quantized]
    if quantized:
        raise ModelError(
            f"{recipe.original} is quantized itself ({original.format.summary.method})",
            hint="give the 16-bit model that the base was quantized from",
        )
    return original


def tokenizer_home(base: Path, adapter: Path | None) -> Path:
    """The adapter's folder where training saved its own tokenizer there, else the base's."""
    own = adapter is not None and any((adapter / name).is_file() for name in TOKENIZER_FILES)
    return adapter if adapter is not None and own else base


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder; `CorpusError` where transformers cannot make one of it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CorpusError(
            f"{folder}: transformers cannot open the tokenizer: {str(error).splitlines()[0]}",
            hint="the folder needs the tokenizer files that came with the model",
        ) from error


def window_length(asked: int | None, skeleton: Skeleton) -> int:
    """`--sequence-length`: at most what the model has positions for."""
    limit = getattr(text_config(skeleton.model.config), "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else None
    if asked is not None and limit is not None and asked > limit:
        raise CorpusError(
            f"--sequence-length {asked} is longer than the model's {limit} positions",
            hint=f"use at most {limit}",
        )
    return asked or min(LONGEST_WINDOW, limit or LONGEST_WINDOW)


def evaluation_texts(
    scoring: Scoring, tokenizer: Any, length: int, faults: Faults, seed: int = 0
) -> tuple[Corpus, ...]:
    """The evaluation corpora, one fault for each that cannot be had."""
    windows = None if scoring.eval_windows == "all" else scoring.eval_windows
    found = []
    for text in scoring.eval_texts() or (OFFLINE_EVALUATION,):
        with faults.at(f"--eval {text.spec}"):
            found.append(
                load_corpus(
                    text.spec,
                    tokenizer,
                    sequence_length=length,
                    windows=windows,
                    name=text.name,
                    role=text.role,
                    seed=seed,
                )
            )
    return tuple(found)


def _texts(
    recipe: Recipe, skeleton: Skeleton, home: Path, faults: Faults, notes: list[str]
) -> tuple[Corpus, tuple[Corpus, ...]] | None:
    calibration = tokenizer = None
    length = 0
    with faults.at("--sequence-length"):
        length = window_length(recipe.sequence_length, skeleton)
    with faults.at("tokenizer"):
        tokenizer = load_tokenizer(home, trust_remote_code=recipe.trust_remote_code)
    if not length or tokenizer is None:
        return None
    with faults.at("--calibration"):
        calibration = load_corpus(
            recipe.calibration or OFFLINE_CALIBRATION,
            tokenizer,
            sequence_length=length,
            windows=recipe.calibration_samples,
            name="calibration",
            role="calibration",
            seed=recipe.seed,
        )
    evaluation = evaluation_texts(recipe, tokenizer, length, faults, recipe.seed)
    for option, given in (("--calibration", recipe.calibration), ("--eval", recipe.eval)):
        if not given:
            notes.append(
                f"{option} is the offline recipe: text of the adapter's own kind is better"
            )
    return (calibration, evaluation) if calibration and evaluation else None


def _settings(recipe: Recipe, base: Weights) -> Settings:
    """What was asked, else what a GPTQ base has, else 4 bits in symmetric groups of 128."""
    summary = base.format.summary
    like = summary if summary.method.startswith("gptq") else None
    group = like.group_size if like and like.group_size in SERVED_GROUPS else DEFAULT_GROUP
    bits = like.bits if like and like.bits else DEFAULT_BITS
    symmetric = like.symmetric if like and like.symmetric is not None else True
    symmetric = symmetric if recipe.symmetric is None else recipe.symmetric
    if recipe.format == "gptq" and not symmetric:
        raise RecipeError(
            "--format gptq (v1) is for symmetric grids: readers disagree about its zero points",
            hint="use --format gptq_v2 or compressed-tensors, or --sym",
        )
    return Settings(
        spec=GridSpec(
            bits=recipe.bits or bits,
            group_size=recipe.group_size or group,
            symmetric=symmetric,
        ),
        order=recipe.act_order,
        damping=recipe.damping,
        format=recipe.format or ("gptq" if symmetric else "gptq_v2"),
    )


def _targets(base: Weights, skeleton: Skeleton) -> frozenset[str]:
    """The linears that the base has quantized; every linear in the layers of a dense base."""
    linears = frozenset(skeleton.linears())
    quantized = {
        module_of(parameter)
        for parameter, stored in base.names.stored.items()
        if base.format.weights[stored].quantized
    }
    return linears & quantized if quantized else linears


def _misfits(skeleton: Skeleton, targets: frozenset[str], spec: GridSpec) -> list[Fault]:
    """Linears whose widths the settings cannot cut into groups or pack into words."""
    linears = skeleton.linears()
    uncut, unpacked = {}, {}
    for name in sorted(targets):
        width, outs = linears[name].in_features, linears[name].out_features
        if spec.group_size != -1 and width % spec.group_size:
            uncut.setdefault(width, name)
        if width * spec.bits % 32 or outs * spec.bits % 32 or (spec.bits == 3 and width % 32):
            unpacked.setdefault((width, outs), name)
    faults = [
        Fault(
            where=name,
            message=f"group size {spec.group_size} does not divide the input width {width}",
            hint=f"use --group-size {_fitting_group(linears, targets)}",
        )
        for width, name in uncut.items()
    ]
    return faults + [
        Fault(
            where=name,
            message=f"{outs} x {width} weights of {spec.bits} bits do not fill 32-bit words",
            hint="this format cannot hold the layer; use --bits 8 or --bits 4, or leave the model dense",
        )
        for (width, outs), name in unpacked.items()
    ]


def _fitting_group(linears: dict[str, Any], targets: frozenset[str]) -> int:
    groups = (group for group in reversed(SERVED_GROUPS) if group > 0)
    return next((g for g in groups if all(linears[n].in_features % g == 0 for n in targets)), -1)


def _strategies(recipe: Recipe, notes: list[str]) -> tuple[str, ...]:
    if recipe.strategy != "auto":
        return (recipe.strategy,)
    if recipe.original is None:
        notes.append("strategy auto: without --original only 'dequantize' is possible")
        return ("dequantize",)
    return ("dequantize", "substitute")


def _effective(recipe: Recipe, settings: Settings, calibration: Corpus) -> Recipe:
    """The recipe with everything said that was left to the base or to a default."""
    return dataclasses.replace(
        recipe,
        bits=settings.spec.bits,
        group_size=settings.spec.group_size,
        symmetric=settings.spec.symmetric,
        format=settings.format,
        sequence_length=calibration.tokens.shape[1],
        calibration=recipe.calibration or OFFLINE_CALIBRATION,
        eval=recipe.eval or (f"{OFFLINE_EVALUATION.name}={OFFLINE_EVALUATION.spec}",),
    )


def pick_device(asked: str) -> torch.device:
    """`--device`; `auto` is the first CUDA device where there is one."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(asked)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"--device {asked}: this machine has no such device", hint="use --device cpu"
        )
    return device


def _calibration_at_once(recipe: Recipe, skeleton: Skeleton, calibration: Corpus) -> int:
    """All windows where their activations in one layer fit the stated memory, else fewer.

    Decided by the recipe alone and never by what happens to be free, so that the same recipe
    makes the same bytes on any day.
    """
    windows, length = calibration.tokens.shape
    room = recipe.memory - layer_bytes(skeleton)
    return int(max(1, min(windows, room // (length * token_bytes(skeleton)))))


def token_bytes(skeleton: Skeleton) -> int:
    """Bytes of activations per token at a layer's widest point: what the MLP holds at once."""
    widest = max(module.out_features for module in skeleton.linears().values())
    hidden = int(text_config(skeleton.model.config).hidden_size)
    return 4 * (4 * hidden + 4 * widest)


def layer_bytes(skeleton: Skeleton) -> int:
    """Bytes of work on one layer's weights: decoded, merged and quantized copies, and Hessians."""
    parameters = sum(
        p.numel() for p in skeleton.model.get_submodule(skeleton.layer_path(0)).parameters()
    )
    widest = max(module.in_features for module in skeleton.linears().values())
    return 4 * (4 * parameters + 4 * widest * widest)


def _summary(recipe: Recipe, job: Job | None, faults: tuple[Fault, ...]) -> PlanSummary:
    listing = tuple(f"{fault.where}: {fault.message}" for fault in faults)
    hints = tuple(fault.hint or "" for fault in faults)
    if job is None:
        return PlanSummary(
            base=str(recipe.base),
            adapter=str(recipe.adapter),
            out=str(recipe.out),
            faults=listing,
            hints=hints,
        )
    units = tuple(_planned(job, unit) for unit in job.skeleton.units())
    out_bytes = sum(unit.bytes_out for unit in units) * len(job.strategies)
    spec = job.settings.spec
    return PlanSummary(
        base=f"{recipe.base} ({job.base.format.name})",
        adapter=f"{recipe.adapter} ({job.injection.adapter.kind}, rank {job.injection.adapter.rank})",
        original=str(recipe.original) if recipe.original else None,
        out=str(recipe.out),
        strategies=job.strategies,
        quantizer=f"{spec.bits} bits, group {spec.group_size}, "
        f"{'symmetric' if spec.symmetric else 'asymmetric'}, act-order {job.settings.order}, "
        f"format {job.settings.format}",
        corpora=tuple(
            f"{c.name}: {c.tokens.shape[0]} x {c.tokens.shape[1]} tokens of {c.source}"
            for c in (job.calibration, *job.evaluation)
        ),
        calibration_at_once=job.calibration_at_once,
        units=units,
        bytes_in=sum(unit.bytes_in for unit in units),
        bytes_out=out_bytes,
        disk_bytes=disk_bytes(job),
        memory_bytes=_memory_bytes(job),
        notes=job.notes,
    )


def _planned(job: Job, unit: Unit) -> PlannedUnit:
    """One unit's bytes: read from the base and the original, written to the release."""
    modules = {f"{unit.path}.{name}" for name in job.targets_of(unit)}
    bytes_in = bytes_out = 0
    for parameter in unit.parameters:
        bytes_in += job.base.stored_bytes(parameter)
        bytes_in += job.original.stored_bytes(parameter) if job.original else 0
        shape = job.base.shape(parameter)
        if module_of(parameter) in modules and parameter.endswith(".weight"):
            bytes_out += packed_bytes(shape, job.settings.spec.bits, job.settings.spec.group_size)
        else:
            bytes_out += job.base.dense_bytes(parameter)
    return PlannedUnit(
        label=unit.label,
        quantized=len(modules),
        dense=len(unit.parameters) - len(modules),
        adapted=sum(name in job.injection.touched for name in unit.parameters),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
    )


def arm_names(job: Job) -> tuple[str, ...]:
    """The arms that stream through the walk, in the order in which they are told."""
    originals = ("original",) if job.original is not None else ()
    made = [name for s in job.strategies for name in (f"merged@{s}", f"release@{s}")]
    return (*originals, "quantized_base", "trained", *made)


def disk_bytes(job: Job) -> int:
    """What a run needs beside its inputs: the releases in the making and the hidden states."""
    units = job.skeleton.units()
    return sum(_planned(job, u).bytes_out for u in units) * len(job.strategies) + _stream_bytes(job)


def _stream_bytes(job: Job) -> int:
    """Two generations of hidden states: each arm's evaluation windows, each release's calibration."""
    hidden = int(text_config(job.skeleton.model.config).hidden_size)
    evaluated = sum(corpus.tokens.numel() for corpus in job.evaluation) * len(arm_names(job))
    calibrated = job.calibration.tokens.numel() * len(job.strategies)
    return 2 * 4 * hidden * (evaluated + calibrated)


def _memory_bytes(job: Job) -> int:
    length = job.calibration.tokens.shape[1]
    return layer_bytes(job.skeleton) + job.calibration_at_once * length * token_bytes(job.skeleton)
