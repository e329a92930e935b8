"""From a recipe to a job: everything that can be known from headers, and every fault in it at once.

Nothing is left on the disk, and no weight is decoded but to see where a base is padded. A plan
without faults carries a `Job`, and a job does not fail for a reason that could have been seen
before it began.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qmerge.adapters import open_adapter
from qmerge.corpus import Corpus
from qmerge.errors import Fault, ModelError, PlanError, QmergeError, RecipeError
from qmerge.estimate import memory_notes, room_faults, summarize, waiting_bytes, walking_bytes
from qmerge.formats.padded import PaddedReader
from qmerge.formats.simulated import AS_STORED, BaseQuant, SimulatedReader, loaded_dtype
from qmerge.gptq import GridSpec
from qmerge.grids import SERVED_GROUPS, beside, grids, misfits, serving_notes, torn
from qmerge.heap import keep_freed
from qmerge.job import Faults, Job, Settings, check_out, pick_device
from qmerge.model.opening import open_model, open_original, told
from qmerge.model.paused import Held
from qmerge.model.probe import probe
from qmerge.model.reshape import Shape, open_sibling, vocabulary_of
from qmerge.model.skeleton import Skeleton
from qmerge.model.weights import Weights
from qmerge.names import WEIGHT, module_of
from qmerge.recipe import Recipe
from qmerge.results import PlanSummary
from qmerge.storage.checkpoint import Checkpoint
from qmerge.texts import (
    OFFLINE_EVALUATION,
    TOKENS_AT_ONCE,
    calibration_text,
    check_calibration,
    check_texts,
    check_tokens,
    evaluation_texts,
    fewer,
    load_processor,
    load_tokenizer,
    overlap_notes,
    stray_templates,
    tokenizer_home,
    tokenizer_notes,
    window_length,
    window_notes,
)
from qmerge.training import Decision, decide
from qmerge.tuning import Tuning, open_tuning, tuning_notes
from qmerge.workspace import done_before

DEFAULT_BITS = 4
DEFAULT_GROUP = 128
FEWEST_OUTPUTS = 8
PACK_QUANTIZED = "pack-quantized"
"""How compressed-tensors calls codes of few bits on a grid."""
FUSED_IN_16 = (
    "the experts are taken in 16 bits: training that keeps them fused, as transformers 5 does,"
    " quantizes the other linears only"
)
NO_ORIGINAL = Fault(
    where="--strategy",
    message="'substitute' needs the 16-bit original; without it only 'dequantize' can be",
    hint="give --original DIR, or --strategy dequantize",
)
LOADED = (
    "the weights are quantized from {}, in which transformers loads this base unless it is told"
    " otherwise: where training loaded another dtype, say so, as in --base-quant {}"
)
SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
OFFLINE_CALIBRATION = "pydoc"


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


def make_plan(recipe: Recipe) -> Plan:
    """Open everything, check everything, spend nothing."""
    keep_freed()
    faults = Faults()
    with faults.at("--out"):
        check_out(recipe.out)
    job = _make_job(recipe, faults)
    done: frozenset[str] = frozenset()
    if job is not None:
        job = dataclasses.replace(job, notes=(*job.notes, *memory_notes(job)))
        faults.found += room_faults(job)
        done = _done_before(job, faults)
    found = _once(faults.found)
    summary = summarize(recipe, job, found, done)
    return Plan(faults=found, job=None if found else job, summary=summary)


def _once(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    """Each where it was met first: several checks meet the same broken pattern."""
    first: dict[tuple[str, str | None], Fault] = {}
    for fault in faults:
        first.setdefault((fault.message, fault.hint), fault)
    return tuple(first.values())


def _done_before(job: Job, faults: Faults) -> frozenset[str]:
    """Units that need not be done again. `StorageError`, which is no fault of the recipe, where
    the folder is damaged or another process is at work in it."""
    try:
        return done_before(job)
    except RecipeError as error:
        faults.found.append(Fault(where="--out", message=error.message, hint=error.hint))
        return frozenset()


@dataclass(kw_only=True)
class _Base:
    """What `--base` holds, as far as it could be opened."""

    skeleton: Skeleton | None = None
    stored: Weights | None = None
    trained: Weights | None = None
    """As the adapter saw it."""
    loaded: Decision | None = None
    siblings: frozenset[tuple[str, ...]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class _Models:
    """All models in the shape that training left, and how the release's linears are quantized."""

    skeleton: Skeleton
    base: Weights
    original: Weights | None
    previous: Weights | None
    settings: Settings | None
    specs: dict[str, GridSpec]
    notes: list[str]


def _make_job(recipe: Recipe, faults: Faults, *, scored: bool = True) -> Job | None:
    """Every check runs that can, whatever the others found."""
    faults.found += recipe.faults()
    found = _open_base(recipe, faults)
    tuning = open_tuning(recipe, found.skeleton, found.trained, faults)
    models = _open_models(recipe, found, tuning, faults)
    skeleton, notes = (models.skeleton, models.notes) if models else (None, [])
    home = tokenizer_home(recipe.base, *recipe.trained())
    texts = _texts(recipe, skeleton, home, faults, notes, scored=scored)
    device = None
    with faults.at("--device"):
        device = pick_device(recipe.device)
    if faults.found or not (models and models.settings and found.loaded and texts and device):
        return None
    skeleton, settings = models.skeleton, models.settings
    calibration, evaluation = texts
    notes += _left_dense(skeleton)
    if home != recipe.base:
        notes.append(f"tokenizer files are those that training saved in {home}")
    notes += stray_templates(home, recipe.trained())
    if tuning:
        notes += tuning_notes(tuning, recipe.base, recipe.original or recipe.base)
    notes += fewer(calibration, recipe.calibration_samples)
    notes += window_notes(recipe, evaluation)
    notes += overlap_notes(calibration, evaluation)
    at_once = max(1, TOKENS_AT_ONCE // calibration.tokens.shape[1])
    held = waiting_bytes(skeleton, calibration.tokens.shape[1], found.siblings)
    return Job(
        recipe=_effective(recipe, settings, calibration, found.loaded.quant),
        skeleton=skeleton,
        base=models.base,
        original=models.original,
        previous=models.previous,
        change=tuning.change if tuning else None,
        adapters=tuning.adapters if tuning else (),
        tokenizer_folder=home,
        calibration=calibration,
        evaluation=evaluation,
        settings=settings,
        strategies=_strategies(recipe, tuning, models.original, notes),
        specs=models.specs,
        at_once=at_once,
        held=held,
        waiting=_may_wait(recipe.memory, skeleton, settings.streams, calibration, at_once, held),
        device=device,
        notes=tuple(notes),
    )


def _open_base(recipe: Recipe, faults: Faults) -> _Base:
    found = _Base()
    with faults.at("--base"):
        trust = recipe.trust_remote_code
        found.skeleton, found.stored = open_model(recipe.base, trust_remote_code=trust)
        found.siblings = probe(found.skeleton)
        found.trained, found.loaded = as_trained(recipe, found.skeleton, found.stored)
    return found


def _open_models(
    recipe: Recipe, found: _Base, tuning: Tuning | None, faults: Faults
) -> _Models | None:
    """The base's siblings beside it, and grids for its linears; None where there is no base."""
    plain, whole, stored, loaded = found.skeleton, found.trained, found.stored, found.loaded
    if plain is None or whole is None or stored is None or loaded is None:
        return None
    original = previous = settings = None
    specs: dict[str, GridSpec] = {}
    notes = [*loaded.notes]
    shape = tuning.shape if tuning else Shape(skeleton=plain)
    skeleton, base = shape.skeleton, shape.fit(whole)
    with faults.at("--original"):
        original = _open_original(recipe, plain, whole, shape, notes)
        if original is None and whole is not stored:
            # What training quantized on the fly is the original itself.
            original = shape.fit(stored)
    if recipe.strategy == "substitute" and recipe.original is None and original is None:
        faults.found.append(NO_ORIGINAL)
    with faults.at("--previous"):
        previous = _open_previous(recipe, plain, skeleton)
    spec = _spec(recipe, base)
    with faults.at("--format"):
        settings = _settings(recipe, spec)
    with faults.at("--override"):
        targets, head = _targets(base, skeleton), skeleton.head()
        tied = head + WEIGHT in skeleton.tied()
        specs = grids(recipe, targets, spec, faults, head=head, tied=tied)
        faults.found += misfits(skeleton, specs)
        faults.found += torn(recipe, skeleton, specs, found.siblings, targets)
        notes += beside(skeleton, targets, found.siblings)
    if settings is not None:
        notes += serving_notes(settings.format, skeleton, specs)
    return _Models(
        skeleton=skeleton,
        base=base,
        original=original,
        previous=previous,
        settings=settings,
        specs=specs,
        notes=notes,
    )


def _left_dense(skeleton: Skeleton) -> list[str]:
    """What is not even a candidate for quantizing, said once."""
    notes = []
    if states := skeleton.states():
        notes.append(f"left dense in the layers: {', '.join(states)}")
    if stacks := skeleton.stacks():
        notes.append(
            f"the experts of {len(stacks)} layers have biases or are stored in one piece: they stay"
            " in 16 bits, because no layout is known in which they are packed and servers load them"
        )
    if tower := skeleton.tower():
        notes.append(
            f"vision tower and projector are left dense ({len(tower)} tensors); what an adapter"
            " changes there is merged"
        )
    return notes


def plan_proof(recipe: Recipe) -> Job:
    """The job that a release was made by, to prove it: without evaluation text, and with no room
    asked for that only a run needs. `PlanError` with all faults."""
    keep_freed()
    faults = Faults()
    job = _make_job(recipe, faults, scored=False)
    if job is None:
        raise PlanError(_once(faults.found))
    return job


def as_trained(recipe: Recipe, skeleton: Skeleton, base: Weights) -> tuple[Weights, Decision]:
    """The base as the adapter saw it, and how that is known."""
    folders = tuple(each.folder for each in recipe.adapters())
    loaded = decide(recipe.base_quant, base.format.summary, folders)
    loaded = dataclasses.replace(loaded, notes=(*told(skeleton, base), *loaded.notes))
    quant = loaded.quant
    if quant is None:
        return base, loaded
    if quant.dtype is None:
        dtype = loaded_dtype(base.checkpoint.config, base.format.summary.dtype)
        quant = dataclasses.replace(quant, dtype=dtype)
        loaded = dataclasses.replace(
            loaded, quant=quant, notes=(*loaded.notes, LOADED.format(dtype, quant.option))
        )
    single = not skeleton.fusions or any(_tunes_single_experts(folder) for folder in folders)
    notes = () if single else (FUSED_IN_16,)
    loaded = dataclasses.replace(loaded, notes=(*loaded.notes, *notes))
    return _simulated(skeleton, base, quant, single_experts=single), loaded


def _simulated(
    skeleton: Skeleton, base: Weights, quant: BaseQuant, *, single_experts: bool
) -> Weights:
    """The base as training quantized it on the fly.

    bitsandbytes quantizes linears. Experts were such while each was a module; fused ones it leaves.
    """
    chosen = [name for name in skeleton.replaceable(head=bool(quant.skip)) if quant.quantizes(name)]
    if not single_experts:
        fused = _fused_experts(skeleton)
        chosen = [name for name in chosen if name not in fused]
    names = [base.names.stored[name + WEIGHT] for name in chosen]
    turned = [base.names.stored[name] for name in skeleton.turned]
    return dataclasses.replace(
        base, format=SimulatedReader(base.checkpoint, base.format, names, quant, turned)
    )


def _tunes_single_experts(folder: Path) -> bool:
    """Whether an adapter was trained while each expert was a module of its own."""
    try:
        return any(SINGLE_EXPERT.search(name) for name in open_adapter(folder).tensors)
    except QmergeError:  # told where the adapter is opened to be merged
        return False


def _open_original(
    recipe: Recipe, skeleton: Skeleton, base: Weights, shape: Shape, notes: list[str]
) -> Weights | None:
    if recipe.original is None:
        return None
    original = open_original(Checkpoint.open(recipe.original), skeleton, base)
    if isinstance(original.format, PaddedReader):
        sizes = ", ".join(f"{narrow} to {wide}" for narrow, wide in original.format.kept)
        notes.append(f"the base is padded with zeros, from {sizes}: the original is laid out alike")
    if original.format.summary.quantized:
        raise ModelError(
            f"{recipe.original} is quantized itself ({original.format.summary.method})",
            hint="give the 16-bit model that the base was quantized from",
        )
    return shape.fit(original)


def _open_previous(recipe: Recipe, plain: Skeleton, skeleton: Skeleton) -> Weights | None:
    if recipe.previous is None:
        return None
    trust = recipe.trust_remote_code
    checkpoint = Checkpoint.open(recipe.previous, config_required=True)
    return open_sibling(checkpoint, plain, skeleton, trust_remote_code=trust)


def _texts(
    recipe: Recipe,
    skeleton: Skeleton | None,
    home: Path,
    faults: Faults,
    notes: list[str],
    *,
    scored: bool,
) -> tuple[Corpus, tuple[Corpus, ...]] | None:
    """The texts in windows. Where the base or its tokenizer has faults of its own, what can be seen
    of the files without them is told too."""
    calibration = tokenizer = None
    length = 0
    if skeleton is not None:
        with faults.at("--sequence-length"):
            length = window_length(recipe.sequence_length, skeleton)
        with faults.at("tokenizer"):
            trust = recipe.trust_remote_code
            tokenizer = load_tokenizer(home, trust_remote_code=trust)
            check_tokens(tokenizer, home, recipe.base, vocabulary_of(skeleton), trust=trust)
            notes += tokenizer_notes(tokenizer, home, recipe.base, trust=trust)
    if not length or tokenizer is None:
        with faults.at("--calibration"):
            check_calibration(recipe.calibration or OFFLINE_CALIBRATION)
        if scored:
            check_texts(recipe, faults)
        return None
    with faults.at("--calibration"):
        trusted = recipe.trust_remote_code
        calibration = calibration_text(
            recipe.calibration or OFFLINE_CALIBRATION,
            tokenizer,
            length,
            recipe.calibration_samples,
            recipe.seed,
            lambda: load_processor(recipe.base, trust_remote_code=trusted),
        )
    evaluation = evaluation_texts(recipe, tokenizer, length, faults) if scored else ()
    for option, given in (("--calibration", recipe.calibration), ("--eval", recipe.eval)):
        if not given:
            notes.append(
                f"{option} is the offline recipe: text of the adapter's own kind is better"
            )
    return (calibration, evaluation) if calibration and (evaluation or not scored) else None


def _spec(recipe: Recipe, base: Weights) -> GridSpec:
    """What was asked, else what a base on integer grids has, else 4 bits in symmetric groups of
    128."""
    summary = base.format.summary
    gptq = summary.method.startswith("gptq")
    like = summary if gptq or summary.checkpoint_format == PACK_QUANTIZED else None
    group = like.group_size if like and like.group_size in SERVED_GROUPS else DEFAULT_GROUP
    bits = like.bits if like and like.bits else DEFAULT_BITS
    symmetric = like.symmetric if like and gptq and like.symmetric is not None else True
    return GridSpec(
        bits=recipe.bits or bits,
        group_size=recipe.group_size or group,
        symmetric=symmetric if recipe.symmetric is None else recipe.symmetric,
    )


def _settings(recipe: Recipe, spec: GridSpec) -> Settings:
    if recipe.format == "gptq" and not spec.symmetric:
        raise RecipeError(
            "gptq (v1) is for symmetric grids: readers disagree about its zero points",
            hint="use --format gptq_v2 or compressed-tensors, or --sym",
        )
    return Settings(
        spec=spec,
        order=recipe.act_order,
        damping=recipe.damping,
        grid=recipe.grid,
        unit_survival=recipe.unit_survival,
        refine=recipe.refine,
        asymmetric=recipe.objective == "asymmetric",
        format=recipe.format or ("gptq" if spec.symmetric else "gptq_v2"),
    )


def _targets(base: Weights, skeleton: Skeleton) -> frozenset[str]:
    """The linears that the base has quantized; of a base that has none, every linear in the layers
    but gates of a few outputs, which cost nothing in 16 bits and which no format packs."""
    linears = frozenset(
        name for name, module in skeleton.linears().items() if module.out_features >= FEWEST_OUTPUTS
    )
    quantized = {
        module_of(parameter)
        for parameter, stored in base.names.stored.items()
        if base.format.weights[stored].quantized
    }
    if quantized and base.format.summary.method == "bitsandbytes":
        quantized |= _fused_experts(skeleton)  # it cannot quantize those, wanted or not
    return linears & quantized or linears


def _fused_experts(skeleton: Skeleton) -> set[str]:
    """Linears that transformers keeps in one parameter with others."""
    return {module_of(part) for fusion in skeleton.fusions for part in fusion.parts}


def _strategies(
    recipe: Recipe, tuning: Tuning | None, original: Weights | None, notes: list[str]
) -> tuple[str, ...]:
    if recipe.strategy != "auto":
        return (recipe.strategy,)
    bound = [each for each in tuning.adapters if each.bound_to_base] if tuning else []
    if bound:
        notes.append(f"strategy auto: only 'dequantize' is right: {bound[0].base_reason}")
        return ("dequantize",)
    if original is None:
        notes.append("strategy auto: without --original only 'dequantize' is possible")
        return ("dequantize",)
    return ("dequantize", "substitute")


def _effective(
    recipe: Recipe, settings: Settings, calibration: Corpus, quant: BaseQuant | None
) -> Recipe:
    """The recipe with everything said that was left to the base or to a default."""
    return dataclasses.replace(
        recipe,
        base_quant=quant.option if quant else recipe.base_quant and AS_STORED,
        bits=settings.spec.bits,
        group_size=settings.spec.group_size,
        symmetric=settings.spec.symmetric,
        format=settings.format,
        sequence_length=calibration.tokens.shape[1],
        calibration=recipe.calibration or OFFLINE_CALIBRATION,
        eval=recipe.eval or (f"{OFFLINE_EVALUATION.name}={OFFLINE_EVALUATION.spec}",),
    )


def _may_wait(
    memory: int, skeleton: Skeleton, streams: int, calibration: Corpus, at_once: int, held: Held
) -> bool:
    """Whether forwards of all calibration windows fit in the stated memory while they wait.

    Decided by the recipe alone and never by what happens to be free, so that the same recipe
    makes the same bytes on any day.
    """
    windows, length = calibration.tokens.shape
    waiting = windows * length * held.of(streams)
    return walking_bytes(skeleton, streams, at_once * length, waiting) <= memory
