"""What a run would do and what came out of it: frozen records with one JSON form.

Units: perplexity without unit, nll and kl in nats per token, shares between 0 and 1, times in
seconds, sizes in bytes. A number that could not be measured is None; one that is not finite is
null in JSON and reads back as NaN. Unknown keys of a later version are ignored when reading.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qmerge.errors import InputError

SCHEMA_VERSION = 1
REPORT = "qmerge_report.json"

T = typing.TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its standard error; windows are the sampling unit. One window has no error."""

    mean: float
    stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Kullback-Leibler divergence from the reference, nats per token, over all tokens."""

    mean: float
    stderr: float | None = None
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True, kw_only=True)
class ProbabilityChange:
    """Root mean square change of the probability of the right token against the reference."""

    rms: float
    stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """Perplexity of one model against another on the same windows, errors paired.

    `ratio` and `difference` are new to old; `ci95` is the interval of the ratio, from the
    Student t quantile of the per-window log-likelihood differences, None with one window.
    """

    ratio: float
    ratio_stderr: float | None = None
    difference: float
    difference_stderr: float | None = None
    ci95: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ConfidenceBin:
    """Divergence of the tokens whose most likely continuation has a probability in [low, high)."""

    low: float
    high: float
    tokens: int
    kl: float
    stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class ArmScore:
    """One model on one corpus. Fields after `window_nll` need a reference and are empty without.

    `window_nll` and `window_kl` are means per window in corpus order, rounded to nine digits:
    a later run on the same windows is compared with this one through them.
    """

    perplexity: float
    stderr: float | None = None
    tokens: int
    unscored_tokens: int = 0  # targets that are not in this model's vocabulary
    window_nll: tuple[float, ...] = ()
    kl: Divergence | None = None
    same_top: Estimate | None = None
    probability_change: ProbabilityChange | None = None
    change: Change | None = None
    kl_by_confidence: tuple[ConfidenceBin, ...] = ()
    window_kl: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A token (or the few that make one character) of a passage, and what was lost on it."""

    text: str
    kl: float | None = None
    nll_change: float | None = None


@dataclass(frozen=True, kw_only=True)
class WorstWindow:
    """A window where the release is far from the reference, and its hottest passage."""

    window: int
    kl: float
    nll_change: float
    start: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Survival:
    """What requantizing left of the adapter. None throughout where the adapter changed nothing.

    `energy` is the trace of D H D^T, the weight with which this linear counts when linears are
    pooled; `update_rms`, `step` and `elements` pool the step ratio, `codes` the codes changed.
    `error_ratio` is ||(W - Wq) X|| / ||D X||, the error that quantizing put into the base over the
    adapter's effect, where the original W is at hand: what decides between strategies.
    """

    survival: float | None = None
    noise: float | None = None
    step_ratio: float | None = None
    codes_changed: float | None = None
    energy: float = 0.0
    update_rms: float = 0.0
    step: float = 0.0
    elements: int = 0
    codes: int = 0
    error_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A setting that was tried where too little survived, and what it would bring: the lowest
    survival of the linears `where`, for `extra_bytes` more in all."""

    option: str
    where: tuple[str, ...] = ()
    survival: float
    extra_bytes: int = 0


FEW_TOKENS = "too few tokens chose this expert: calibrated with all"
"""The fallback of an expert's linear whose own tokens would not do."""
LEFT_BESIDE = "left in 16 bits beside linears that read the same input and are quantized: "
"""How the warning begins that a server which fuses them cannot load the release."""


DOUBT = "this is not what you trained"
"""In a warning that is about the reference itself: it stands right below the verdict."""


UNPROVEN = "compare the sha256 of its weights with that model's"
"""In a warning that comes with a right base as with a wrong one: told once, when a run begins, and
in what it writes."""


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """One requantized linear. `anchored` is the share of its rows on the base's own grid, `kappa`
    how far the target was pushed out so that the update survives whole. `error` is
    ||(W - Q) X||^2 / ||W X||^2 on the calibration text."""

    name: str
    bits: int | None = None
    group_size: int | None = None
    grid: str | None = None
    anchored: float | None = None
    kappa: float | None = None
    loss: float | None = None
    error: float | None = None
    damping: float | None = None
    fallback: str | None = None
    tokens: int | None = None
    """How many calibration tokens chose it, where it is an expert's."""
    survival: Survival | None = None


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """One unit of the walk. `drift` is, per arm, the relative root mean square distance of the
    hidden states behind this unit from the reference's; `merge` the same distance of the merged
    layers from the live adapter's on the same base, on a little of the calibration text; `kl` the
    divergence of the release from the reference if the model ended here, on some of the in-domain
    tokens; `remedies` what would have kept more of the adapter."""

    name: str
    kind: str = "layer"
    seconds: float = 0.0
    bytes: int = 0
    linears: tuple[LinearResult, ...] = ()
    survival: Survival | None = None
    remedies: tuple[Remedy, ...] = ()
    drift: Mapping[str, float] = field(default_factory=dict)
    merge: float | None = None
    kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class MergeCheck:
    """The merged model against the live adapter on the same base, layer by layer, on the first
    `tokens` tokens of the calibration text: relative root mean square distances of embedding,
    hidden states behind each layer and logits. `rounding` is what `dtype` rounds a weight by."""

    tokens: int
    dtype: str
    rounding: float
    worst: float
    where: str
    logits: float

    @property
    def passed(self) -> bool:
        return self.worst <= self.rounding


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A release that was carried through the walk and could have been published."""

    strategy: str
    kl: Estimate | None = None
    perplexity: float | None = None
    stderr: float | None = None
    survival: float | None = None


@dataclass(frozen=True, kw_only=True)
class StrategyResult:
    """Which weight the adapter was merged onto, and why."""

    chosen: str
    why: str
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CorpusRecord:
    """A text as it was used: `sha256` of the int64 little-endian tokens of all windows."""

    name: str
    source: str
    role: str
    windows: int
    sequence_length: int
    tokens: int
    documents: int = 1
    sha256: str
    text_sha256: str | None = None
    seed: int | None = None
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """The texts of a run; `evaluation` by name, in the order in which they were given."""

    calibration: CorpusRecord | None = None
    evaluation: Mapping[str, CorpusRecord] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class InputRecord:
    """A folder that went in or came out: `files` maps file names to their sha256."""

    path: str
    format: str | None = None
    bytes: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    license: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


FINITE = "finite"
"""No limit that is asked for: what a gate says of scores that are no numbers."""


@dataclass(frozen=True, kw_only=True)
class GateVerdict:
    """One limit on one corpus (None: the whole model). `value` None: it was not measured."""

    limit: str
    corpus: str | None = None
    value: float | None = None
    bound: float
    passed: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class CorpusComparison:
    """Two releases on the same windows. `kl` is new minus old, None unless both were measured
    against the same reference. `verdict` is "better", "worse" or "same" beyond noise; worse, too,
    where the new one's scores are not `finite`."""

    verdict: str
    change: Change
    kl: Estimate | None = None
    finite: bool = True


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs side by side; `layers` names those whose error rose the most, worst first.

    `missing` are corpora that only the old one was scored on, `added` those of the new one alone.
    With one missing, what is not "worse" is "incomplete".
    """

    verdict: str
    corpora: Mapping[str, CorpusComparison]
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    survival: tuple[float | None, ...] = (None, None)
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Everything a run measured. `reference` and `subject` name the arms that limits, changes
    and the verdict speak of; `evaluate` without a reference has neither. `left_out` are modules
    that the adapter changes and that were asked to stay the base's."""

    schema_version: int = SCHEMA_VERSION
    qmerge_version: str
    command: str = "run"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    strategy: StrategyResult | None = None
    reference: str | None = "trained"
    subject: str | None = "release"
    corpora: Corpora = field(default_factory=Corpora)
    arms: Mapping[str, Mapping[str, ArmScore]] = field(default_factory=dict)
    change: Mapping[str, Change] = field(default_factory=dict)
    change_from_previous: Mapping[str, Change] = field(default_factory=dict)
    noise_floor: Mapping[str, ArmScore] = field(default_factory=dict)
    survival: Survival | None = None
    merge: MergeCheck | None = None
    left_out: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    layers: tuple[LayerResult, ...] = ()
    worst: Mapping[str, tuple[WorstWindow, ...]] = field(default_factory=dict)
    gate: tuple[GateVerdict, ...] = ()
    inputs: Mapping[str, InputRecord] = field(default_factory=dict)
    release: InputRecord | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    peak_rss_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The plain form: only dict, list, str, int, finite float, bool and None."""
        return typing.cast(dict[str, Any], encode(self))

    @classmethod
    def from_dict(cls, data: Any, *, source: str = "report") -> RunResult:
        """Reads `to_dict` back. InputError names the key that is missing or of another kind."""
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if not isinstance(version, int):
            raise InputError(
                f"{source} is not a qmerge report: it has no schema_version",
                hint="give a qmerge_report.json or a release folder that holds one",
            )
        if version > SCHEMA_VERSION:
            raise InputError(
                f"{source} has schema_version {version}; this qmerge reads up to {SCHEMA_VERSION}",
                hint="install the qmerge that wrote it, or a newer one",
            )
        return decode(cls, data, where=source)


@dataclass(frozen=True, kw_only=True)
class PlannedUnit:
    """One unit of the walk as it would be done; `adapted` counts weights the adapter changes."""

    label: str
    quantized: int
    dense: int
    adapted: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """What a run would do, in words and bytes; with faults only what was asked is filled in.
    `renamed` maps tensors of the adapter files to the names they were understood as, `left_out`
    are modules that --only and --except keep the base's."""

    base: str
    adapter: str
    out: str
    original: str | None = None
    strategies: tuple[str, ...] = ()
    quantizer: str = ""
    limits: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ()
    at_once: int = 0
    waiting: bool = True
    units: tuple[PlannedUnit, ...] = ()
    bytes_in: int = 0
    bytes_out: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    device_bytes: int = 0
    """Memory of `device`, where that is not the host."""
    device: str = "cpu"
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By parts of the work that is left, named as the timings of a run are."""
    goes_on: str = ""
    """What a stopped run has done already."""
    notes: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


# The JSON form of any record.


def encode(value: Any) -> Any:
    """A record or a tree of records as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [encode(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def decode(kind: type[T], value: Any, *, where: str) -> T:
    """The inverse of `encode` for a record class. InputError names the key."""
    return typing.cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        inner = [option for option in typing.get_args(kind) if option is not types.NoneType]
        return None if value is None else _decode(inner[0], value, where)
    if origin is tuple:
        item = typing.get_args(kind)[0]
        _expect(isinstance(value, list | tuple), "a list", value, where)
        return tuple(_decode(item, part, f"{where}[{i}]") for i, part in enumerate(value))
    if origin is Mapping:
        item = typing.get_args(kind)[1]
        _expect(isinstance(value, Mapping), "an object", value, where)
        return {str(key): _decode(item, part, f"{where}.{key}") for key, part in value.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, value, where)
    return _decode_plain(kind, value, where)


def _decode_record(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, Mapping), "an object", value, where)
    hints = _hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name, entry in known.items():
        optional = (
            entry.default is not dataclasses.MISSING
            or entry.default_factory is not dataclasses.MISSING
        )
        if name not in value and not optional:
            raise InputError(f"{where}: key {name!r} is missing", hint="the report is damaged")
    found = {n: _decode(hints[n], value[n], f"{where}.{n}") for n in known if n in value}
    return kind(**found)


def _decode_plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(value is None or number, "a number", value, where)
        return math.nan if value is None else float(value)
    if kind is int:
        _expect(isinstance(value, int) and not isinstance(value, bool), "a number", value, where)
        return value
    _expect(isinstance(value, kind), f"a {kind.__name__}", value, where)
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _expect(holds: bool, wanted: str, value: Any, where: str) -> None:
    if not holds:
        raise InputError(
            f"{where}: {wanted} expected, found {type(value).__name__}",
            hint="the report is damaged or was written by something else",
        )
