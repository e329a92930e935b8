"""What all reports say alike: numbers as text, the arms' table as cells, the verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from qmerge.names import listed
from qmerge.results import (
    DOUBT,
    UNPROVEN,
    ArmScore,
    Change,
    CorpusRecord,
    Estimate,
    LinearResult,
    RunResult,
    StrategyResult,
    Survival,
)

COLUMNS = ("perplexity", "change", "KL", "same top token")
DASH = "–"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# The verdict's steps, for a release against `trained`. The first is what the gate's examples ask
# for; beyond the second the loss is of the size that nearest rounding brings, which loses the
# adapter (KL 0.07 to 0.26, perplexity +12% to +39% where GPTQ has 0.001 and +0.1%).
GOOD = {"increase": 0.01, "kl": 0.05, "survival": 0.9}
FAIR = {"increase": 0.05, "kl": 0.2, "survival": 0.7}
# An adapter whose own gain is below this share of perplexity has no gain to speak of.
SMALLEST_GAIN = 0.02
# A linear is pointed at when its error is this far above that of its like in other layers: in a
# healthy release the o_proj of a first layer was at 8, and two bits fewer cost about 25.
LOUD = 12.0
# It also has to be this share of the output's power: what is less is heard nowhere.
HEARD = 0.01
# Names in a line before it says how many more there are.
NAMED = 6
# merged and trained are one model under `dequantize`, up to rounding in the forward pass.
EQUAL_KL = 1e-5


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`tone` is "good", "fair", "poor" or "plain"; the sentence says why."""

    tone: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure and its error, already as text. A `word` stands in place of a figure."""

    value: str = ""
    error: str = ""
    unit: str = ""
    word: str = ""

    def __str__(self) -> str:
        if self.word:
            return self.word
        error = f" ± {self.error}" if self.error else ""
        return f"{self.value}{error}{self.unit}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm on one corpus: cells in the order of COLUMNS."""

    arm: str
    label: str
    cells: tuple[Cell, ...]
    note: str = ""


def figure(value: float | None, error: float | None, digits: int, unit: str = "") -> Cell:
    if value is None or not math.isfinite(value):
        return Cell(word=DASH if value is None else "not finite")
    shown = f"{error:.{digits}f}" if error is not None and math.isfinite(error) else ""
    told = f"{value:.{digits}f}"
    return Cell(value=told.lstrip("-") if float(told) == 0 else told, error=shown, unit=unit)


def perplexity(score: ArmScore) -> Cell:
    size = abs(score.perplexity)
    digits = 4 if size < 2 else 3 if size < 20 else 2 if size < 1000 else 1 if size < 1e5 else 0
    return figure(score.perplexity, score.stderr, digits)


def change_cell(change: Change | None) -> Cell:
    if change is None:
        return Cell(word=DASH)
    if not math.isfinite(change.ratio):
        return Cell(word="not finite")
    per_cent = 100 * (change.ratio - 1)
    error = None if change.ratio_stderr is None else 100 * change.ratio_stderr
    digits = 2 if abs(per_cent) < 100 else 1 if abs(per_cent) < 1e4 else 0
    cell = figure(per_cent, error, digits, "%")
    return Cell(value=_signed(per_cent, digits), error=cell.error, unit="%")


def _signed(value: float, digits: int) -> str:
    """With its sign; zero has none."""
    told = f"{value:+.{digits}f}"
    return told[1:] if float(told) == 0 else told


def kl_cell(score: ArmScore) -> Cell:
    if score.kl is None:
        return Cell(word=DASH)
    return figure(score.kl.mean, score.kl.stderr, 5)


def kl_figure(score: ArmScore) -> str:
    """Three digits, for a sentence."""
    return DASH if score.kl is None else f"{score.kl.mean:.3g}"


def share_cell(share: Estimate | None) -> Cell:
    if share is None:
        return Cell(word=DASH)
    error = None if share.stderr is None else 100 * share.stderr
    return figure(100 * share.mean, error, 2, "%")


def rows(result: RunResult, corpus: str) -> list[Row]:
    """The arms' table of one corpus, then the noise floor where one was measured."""
    found = []
    for arm, scores in result.arms.items():
        if corpus not in scores:
            continue
        score = scores[corpus]
        found.append(
            Row(
                arm=arm,
                label=label(result, arm),
                cells=_cells(score, is_reference=arm == result.reference),
                note=_note(result, arm, score),
            )
        )
    floor = result.noise_floor.get(corpus)
    if floor is not None:
        note = f"{result.reference} in 16 bits, {len(floor.window_nll)} windows"
        cells = (Cell(word=DASH), *_cells(floor, is_reference=False)[1:])
        found.append(Row(arm="noise_floor", label="noise floor", cells=cells, note=note))
    return found


LEGEND = {
    "original": "`original` is the 16-bit model that the base was quantized from",
    "quantized_base": "`quantized base` the base that training ran on, without adapter",
    "trained": "`trained` the base with the adapter live on top, as it was trained and validated",
    "dense": "`dense` the model that was quantized",
    "merged": "`merged` the merged model before it was quantized",
    "release": "`release` what is on disk, decoded from its packed codes",
    "previous": "`previous` an earlier release",
    "noise_floor": "`noise floor` the reference itself in 16 bits",
}


PLAIN_BASE = {"quantized_base": "`base` the base as it is stored, without adapter"}


def _base_is_plain(result: RunResult) -> bool:
    """Whether nothing quantized the base: it is dense, and no training in few bits is known."""
    return "base" in result.inputs and result.inputs["base"].format == "dense"


def legend(result: RunResult) -> str:
    """What the arms of the tables are, in a sentence; empty where they have names of their own."""
    if result.command == "evaluate":
        return ""
    present = {*result.arms, *(["noise_floor"] if result.noise_floor else [])}
    others = [arm for arm in present if arm not in LEGEND]
    known = LEGEND | (PLAIN_BASE if _base_is_plain(result) else {})
    told = [text for arm, text in known.items() if arm in present]
    rest = (
        " Arms that name a strategy were merged in that way, and not published." if others else ""
    )
    return f"{', '.join(told)}.{rest}" if told else ""


OTHER_STRATEGY = "merged (substitute), release (dequantize), …"
WORDS = {
    "±": "a standard error over windows; of a change, that of the differences window by window",
    "change": "perplexity over that of the reference on the same windows, less one",
    "KL": "the mean of KL(reference ‖ arm) over tokens, in nats",
    "same top token": "share of tokens after which the arm and the reference hold the same one for"
    " the likeliest",
    "adapter's gain kept": "ln(base / release) / ln(base / trained), of perplexities",
    OTHER_STRATEGY: "what the strategy that was not published came"
    " to: substitute merges onto the original, dequantize onto the decoded base",
    "survival": "share of the change that merging made to a linear's output which the release still"
    " has, along that change: ⟨E, D⟩ / ⟨D, D⟩ over the calibration text, for the merged weight D"
    " and the released one E, both less the weight before the merge; 1 is whole, 0 erased; of"
    " several linears, products are summed first",
    "noise": "how far what the release has is from that change, in power over the change's own:"
    " ‖E − D‖² / ‖D‖²",
    "update of a step": "root mean square of D over the release's mean quantization step",
    "codes changed": "share of the release's codes that differ from the base's, where the base has"
    " such codes and the adapter changed the linear",
    "base's error / adapter's effect": "‖W − B‖ / ‖D‖ in a linear's output, for the original's"
    " weight W and the base's B",
    "error": "‖M − Q‖² / ‖M‖² in a linear's output, for the weight M that was to be quantized and"
    " the released one Q",
    "grid": "steps and zero points: fresh ones, or anchored, the base's own, by share of rows",
    "damping": "what was added to the Hessian's diagonal, as a share of its mean",
}
"""What tables and lines call things, for those who did not write them."""
OF_LINEARS = ("error", "grid", "damping")


def words(result: RunResult, *, linears: bool) -> dict[str, str]:
    """Those that a report of this result has; of `linears` where it lists them."""
    names = corpora(result)
    kept = result.survival or Survival()
    known = {
        "±": bool(names),
        **dict.fromkeys(("change", "KL", "same top token"), result.reference is not None),
        "adapter's gain kept": bool(names) and gain_kept(result, names[0]) is not None,
        OTHER_STRATEGY: result.strategy is not None and len(result.strategy.candidates) > 1,
        "survival": kept.survival is not None,
        "noise": kept.noise is not None,
        "update of a step": kept.step_ratio is not None,
        "codes changed": kept.codes_changed is not None,
        "base's error / adapter's effect": kept.error_ratio is not None,
        **dict.fromkeys(OF_LINEARS, linears),
    }
    return {word: meaning for word, meaning in WORDS.items() if known[word]}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Everything that was measured of one arm on one corpus, as text in the order of STATISTICS."""

    arm: str
    label: str
    values: tuple[str, ...]


STATISTICS = (
    "95% interval", "difference", "KL median", "90%", "95%", "99%", "99.9%", "largest",
    "probability, rms",
)  # fmt: skip


def statistics(result: RunResult, corpus: str) -> list[Figures]:
    """What the arms' table leaves out: intervals, percentiles of KL, change of probability."""
    scores = {arm: found[corpus] for arm, found in result.arms.items() if corpus in found}
    if corpus in result.noise_floor:
        scores["noise_floor"] = result.noise_floor[corpus]
    return [
        Figures(
            arm=arm,
            label="noise floor" if arm == "noise_floor" else label(result, arm),
            values=_statistics(score),
        )
        for arm, score in scores.items()
        if score.kl is not None and score.change is not None
    ]


def _statistics(score: ArmScore) -> tuple[str, ...]:
    assert score.change is not None
    assert score.kl is not None
    ends = [_signed(100 * (end - 1), 2) for end in score.change.ci95 or ()]
    moved, kl = score.probability_change, score.kl
    return (
        " to ".join(ends) + "%" if ends else DASH,
        str(figure(score.change.difference, score.change.difference_stderr, 3)),
        *(f"{value:.3g}" for value in (kl.median, kl.p90, kl.p95, kl.p99, kl.p999, kl.max)),
        f"{100 * moved.rms:.3g}%" if moved else DASH,
    )


def label(result: RunResult, arm: str) -> str:
    """An arm as readers call it; what was carried along and not published names its strategy."""
    if arm == result.reference:
        return f"{arm} (reference)"
    head, _, tail = arm.partition("_")
    strategies = [found.strategy for found in result.strategy.candidates] if result.strategy else []
    if tail in strategies:
        return f"{head} ({tail})"
    if arm == "quantized_base":
        return "base" if _base_is_plain(result) else "quantized base"
    return arm


def _cells(score: ArmScore, *, is_reference: bool) -> tuple[Cell, ...]:
    if is_reference:
        return (perplexity(score), Cell(word=DASH), Cell(word=DASH), Cell(word=DASH))
    return (
        perplexity(score),
        change_cell(score.change),
        kl_cell(score),
        share_cell(score.same_top),
    )


def _note(result: RunResult, arm: str, score: ArmScore) -> str:
    if score.unscored_tokens:
        return f"{score.unscored_tokens} tokens are not in its vocabulary"
    same = arm == "merged" and result.strategy is not None
    if same and result.strategy and result.strategy.chosen == "dequantize" and score.kl:
        if score.kl.mean < EQUAL_KL:
            return "equals trained"
        return "differs from trained"
    return ""


def corpora(result: RunResult) -> list[str]:
    """Corpora with scores, the in-domain one first."""
    names = dict.fromkeys(name for scores in result.arms.values() for name in scores)
    known = result.corpora.evaluation
    return sorted(names, key=lambda n: n not in known or known[n].role != "in_domain")


def heading(name: str, record: CorpusRecord | None) -> str:
    if record is None:
        return name
    role = record.role.replace("_", "-")
    parts = [name, role, f"{record.windows} × {record.sequence_length} tokens"]
    return " · ".join(dict.fromkeys(parts))


def subject_score(result: RunResult, corpus: str) -> ArmScore | None:
    return result.arms.get(result.subject or "", {}).get(corpus)


def verdict(result: RunResult) -> Verdict:
    """The report's first sentence: is the release as good as what was trained, and by how much."""
    names = corpora(result)
    score = subject_score(result, names[0]) if names else None
    if not names:
        return Verdict(tone="plain", sentence="Nothing was scored.")
    if score is None or score.change is None or score.kl is None:
        return _ranking(result, names[0])
    figures = _figures(result, names[0], score)
    if not (math.isfinite(score.change.ratio) and math.isfinite(score.kl.mean)):
        sentence = f"The {result.subject} is broken: its scores are not finite on {names[0]}."
        return Verdict(tone="poor", sentence=sentence)
    if any(not gate.passed for gate in result.gate):
        fallen = [gate.text for gate in result.gate if not gate.passed]
        more = f", and {len(fallen) - 1} more" if len(fallen) > 1 else ""
        sentence = f"The {result.subject} does not pass: {fallen[0]}{more}. On {figures}."
        return Verdict(tone="poor", sentence=sentence)
    tone, opinion = _opinion(result, score)
    if tone == "good" and [*_elsewhere(result, names[0])]:
        tone, opinion = "fair", f"{opinion} on {names[0]} only"
    return Verdict(tone=tone, sentence=f"The {result.subject} {opinion}: on {figures}.")


def _opinion(result: RunResult, score: ArmScore) -> tuple[str, str]:
    assert score.change is not None
    assert score.kl is not None
    low = score.change.ci95[0] if score.change.ci95 else score.change.ratio
    # An increase within noise is none.
    increase = score.change.ratio - 1 if low > 1 else 0.0
    survival = result.survival.survival if result.survival else None
    measured = {"increase": increase, "kl": score.kl.mean}
    kept = 1.0 if survival is None else survival
    reference = "what you trained" if result.reference == "trained" else str(result.reference)
    for tone, bounds, opinion in (
        ("good", GOOD, f"is as good as {reference}"),
        ("fair", FAIR, f"is somewhat worse than {reference}"),
    ):
        if (
            all(value <= bounds[key] for key, value in measured.items())
            and kept >= bounds["survival"]
        ):
            return tone, opinion
    return "poor", f"lost much of {reference}"


def _figures(result: RunResult, corpus: str, score: ArmScore) -> str:
    parts = [f"{corpus} perplexity {change_phrase(score.change)}", f"KL {kl_figure(score)}"]
    if score.same_top is not None:
        parts.append(f"same top token {share_cell(score.same_top).value}%")
    kept = gain_kept(result, corpus)
    if kept is not None:
        share = f"{100 * kept:.1f}%" if kept > 0 else "none"
        parts.append(f"{share} of the adapter's gain kept")
    left = result.survival.survival if result.survival else None
    if left is not None and left < GOOD["survival"]:
        parts.append(f"adapter survival {left:.2f}")
    return "; ".join([", ".join(parts), *_elsewhere(result, corpus)])


def _elsewhere(result: RunResult, corpus: str) -> Iterator[str]:
    """Other texts where they are hurt more than a good verdict would allow."""
    for name in corpora(result):
        score = subject_score(result, name)
        if name == corpus or score is None or score.change is None or score.kl is None:
            continue
        low = score.change.ci95[0] if score.change.ci95 else score.change.ratio
        hurt = low > 1 and score.change.ratio - 1 > GOOD["increase"]
        if hurt or score.kl.mean > GOOD["kl"]:
            yield f"on {name} perplexity {change_phrase(score.change)}, KL {kl_figure(score)}"


def change_phrase(change: Change | None) -> str:
    cell = change_cell(change)
    if change is None or change.ci95 is None:
        return f"{cell}"
    low, high = change.ci95
    return f"{cell} (within noise)" if low <= 1 <= high else f"{cell}"


def gain_kept(result: RunResult, corpus: str) -> float | None:
    """Share of the adapter's gain in log-likelihood over the base that the release still has."""
    names = ("quantized_base", result.reference or "", result.subject or "")
    found = [result.arms.get(name, {}).get(corpus) for name in names]
    if any(score is None or not score.perplexity > 0 for score in found):
        return None
    base, trained, release = (math.log(score.perplexity) for score in found if score is not None)
    if not base - trained > SMALLEST_GAIN or not math.isfinite(release):
        return None
    return (base - release) / (base - trained)


def _ranking(result: RunResult, corpus: str) -> Verdict:
    scores = {arm: found[corpus] for arm, found in result.arms.items() if corpus in found}
    near = {arm: s.kl.mean for arm, s in scores.items() if s.kl is not None}
    if near and len(near) > 1:
        best = min(near, key=lambda arm: (math.isnan(near[arm]), near[arm]))
        if math.isnan(near[best]):
            sentence = f"No KL from {result.reference} is finite on {corpus}."
            return Verdict(tone="poor", sentence=sentence)
        sentence = f"Nearest to {result.reference} on {corpus}: {best}, KL {near[best]:.5f}."
        return Verdict(tone="plain", sentence=sentence)
    best = min(scores, key=lambda a: (math.isnan(scores[a].perplexity), scores[a].perplexity))
    if not math.isfinite(scores[best].perplexity):
        return Verdict(tone="poor", sentence=f"No score is finite on {corpus}.")
    lead = "Lowest perplexity" if len(scores) > 1 else "Perplexity"
    return Verdict(
        tone="plain", sentence=f"{lead} on {corpus}: {best}, {perplexity(scores[best])}."
    )


def survival_phrase(survival: Survival | None) -> str:
    """ "survival 0.985, noise 0.123, update 0.076 of a step, 15.0% of codes changed"."""
    if survival is None or survival.survival is None:
        return "not measured"
    parts = [f"survival {survival.survival:.3f}"]
    if survival.noise is not None:
        parts.append(f"noise {survival.noise:.3g}")
    if survival.step_ratio is not None:
        parts.append(f"update {survival.step_ratio:.3g} of a step")
    if survival.codes_changed is not None:
        parts.append(f"{100 * survival.codes_changed:.1f}% of codes changed")
    return ", ".join(parts)


def error_ratio_phrase(result: RunResult) -> str:
    """What quantizing the base cost in units of the adapter's effect; "" without an original."""
    whole = result.survival.error_ratio if result.survival else None
    if whole is None:
        return ""
    found = [
        (layer.survival.error_ratio, layer.name)
        for layer in result.layers
        if layer.survival is not None and layer.survival.error_ratio is not None
    ]
    (least, first), (most, last) = min(found), max(found)
    span = f", by layer {least:.3g} ({first}) to {most:.3g} ({last})" if len(found) > 1 else ""
    return f"the base's quantization error is {whole:.3g} of the adapter's effect{span}"


def strategy_told(result: RunResult) -> StrategyResult | None:
    """What was merged onto and why; None where nothing was merged."""
    return None if result.command == "quantize" else result.strategy


def merge_lines(result: RunResult) -> list[str]:
    """How near the merge came to the live adapter, and what was not merged."""
    lines = []
    if result.merge is not None:
        found = result.merge
        lines.append(
            f"merge: within {found.worst:.1e} of the live adapter in every layer"
            f" (farthest: {found.where}), {found.dtype} rounds by {found.rounding:.1e}"
        )
    if result.left_out:
        lines.append(f"left as the base has it: {listed(result.left_out, NAMED)}")
    return lines


def linears(result: RunResult) -> Iterator[LinearResult]:
    for layer in result.layers:
        yield from layer.linears


def weakest(result: RunResult) -> LinearResult | None:
    """The linear that kept the least of its update."""
    seen = [x for x in linears(result) if x.survival and x.survival.survival is not None]
    return min(seen, key=_kept, default=None)


def _kept(linear: LinearResult) -> float:
    kept = linear.survival.survival if linear.survival else None
    return math.inf if kept is None else kept


def loud(result: RunResult) -> list[tuple[LinearResult, float]]:
    """Linears whose error stands out from that of their like, and how many times, worst first."""
    measured = [(linear, linear.error) for linear in linears(result) if linear.error is not None]
    found = []
    for linear, error in measured:
        others = [(other, value) for other, value in measured if other is not linear]
        kind = projection(linear.name)
        peers = [value for other, value in others if projection(other.name) == kind]
        if len(peers) < 2:
            peers = [value for _, value in others]
        usual = median(peers) if peers else 0.0
        if usual > 0 and error > max(LOUD * usual, HEARD):
            found.append((linear, error / usual))
    return sorted(found, key=lambda pair: -pair[1])


def projection(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def gate_lines(result: RunResult) -> list[str]:
    """How many limits hold, and each one that does not."""
    if not result.gate:
        return []
    fallen = [gate.text for gate in result.gate if not gate.passed]
    held = len(result.gate) - len(fallen)
    return [f"{held} of {len(result.gate)} limits hold", *(f"FAILED {text}" for text in fallen)]


def previous_lines(result: RunResult) -> list[str]:
    """The change from the previous release, per corpus."""
    return [
        f"perplexity {change_phrase(change)} on {corpus} since the previous release"
        for corpus, change in result.change_from_previous.items()
    ]


def findings(result: RunResult) -> list[str]:
    """Lines under the verdict: where it hurts, and what would help."""
    lines = []
    weak = weakest(result)
    if weak is not None and weak.survival is not None and _kept(weak) < GOOD["survival"]:
        lines.append(f"Weakest linear: {weak.name}, {survival_phrase(weak.survival)}.")
    for linear, times in loud(result)[:3]:
        bits = f" ({linear.bits} bits)" if linear.bits else ""
        lines.append(f"Largest error: {linear.name}{bits}, {times:.1f} times that of its like.")
    for remedy in result.remedies:
        count = f"{len(remedy.where)} linears" if len(remedy.where) != 1 else "1 linear"
        cost = f"{size(remedy.extra_bytes)} more" if remedy.extra_bytes else "no more bytes"
        lines.append(
            f"Would help: {remedy.option} "
            f"({count}: survival at least {remedy.survival:.3f}, {cost})."
        )
    return lines


def doubts(result: RunResult) -> list[str]:
    """Warnings that are about the reference itself, for right below the verdict."""
    return [line for line in result.warnings if DOUBT in line]


def warnings(result: RunResult) -> list[str]:
    """All others."""
    return [line for line in result.warnings if DOUBT not in line]


def pressing(result: RunResult) -> list[str]:
    """Warnings but those that need not be told at the end of a run too."""
    return [line for line in result.warnings if UNPROVEN not in line]


def pieces_of(text: str, options: Iterable[str]) -> list[tuple[str, bool]]:
    """A line in pieces, and which of them are options to be pasted; a backtick would end one."""
    found = [printable(option) for option in options if option and "`" not in option]
    if not found:
        return [(text, False)]
    parts = re.split(f"({'|'.join(map(re.escape, found))})", printable(text))
    return [(part, part in found) for part in parts if part]


def printable(text: str) -> str:
    """Without control characters, which a name can carry and a terminal or XML obeys."""
    return CONTROL.sub("", text)


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
