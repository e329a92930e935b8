"""Numbers as text: the cells and rows of the arms' tables, sizes and times."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from qmerge.results import ArmScore, Change, Estimate, RunResult

COLUMNS = ("perplexity", "change", "KL", "same top token")
STATISTICS = (
    "95% interval", "difference", "KL median", "90%", "95%", "99%", "99.9%", "largest",
    "probability, rms",
)  # fmt: skip
DASH = "–"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# merged and trained are one model under `dequantize`, up to rounding in the forward pass.
EQUAL_KL = 1e-5


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


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Everything that was measured of one arm on one corpus, as text in the order of STATISTICS."""

    arm: str
    label: str
    values: tuple[str, ...]


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


def label(result: RunResult, arm: str) -> str:
    """An arm as readers call it; what was carried along and not published names its strategy."""
    if arm == result.reference:
        return f"{arm} (reference)"
    head, _, tail = arm.partition("_")
    strategies = [found.strategy for found in result.strategy.candidates] if result.strategy else []
    if tail in strategies:
        return f"{head} ({tail})"
    if arm == "quantized_base":
        return "base" if base_is_plain(result) else "quantized base"
    return arm


def base_is_plain(result: RunResult) -> bool:
    """Whether nothing quantized the base: it is dense, and no training in few bits is known."""
    return "base" in result.inputs and result.inputs["base"].format == "dense"


def corpora(result: RunResult) -> list[str]:
    """Corpora with scores, the in-domain one first."""
    names = dict.fromkeys(name for scores in result.arms.values() for name in scores)
    known = result.corpora.evaluation
    return sorted(names, key=lambda n: n not in known or known[n].role != "in_domain")


def heading(result: RunResult, corpus: str) -> str:
    """A corpus with its role and size, as far as the report has them."""
    record = result.corpora.evaluation.get(corpus)
    if record is None:
        return corpus
    role = record.role.replace("_", "-")
    parts = [corpus, role, f"{record.windows} × {record.sequence_length} tokens"]
    return " · ".join(dict.fromkeys(parts))


def subject_score(result: RunResult, corpus: str) -> ArmScore | None:
    return result.arms.get(result.subject or "", {}).get(corpus)


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


def change_phrase(change: Change | None) -> str:
    cell = change_cell(change)
    if change is None or change.ci95 is None:
        return f"{cell}"
    low, high = change.ci95
    return f"{cell} (within noise)" if low <= 1 <= high else f"{cell}"


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


def _signed(value: float, digits: int) -> str:
    """With its sign; zero has none."""
    told = f"{value:+.{digits}f}"
    return told[1:] if float(told) == 0 else told


def _cells(score: ArmScore, *, is_reference: bool) -> tuple[Cell, ...]:
    if is_reference:
        return (perplexity(score), Cell(word=DASH), Cell(word=DASH), Cell(word=DASH))
    return (
        perplexity(score),
        change_cell(score.change),
        kl_cell(score),
        share_cell(score.same_top),
    )


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


def _note(result: RunResult, arm: str, score: ArmScore) -> str:
    if score.unscored_tokens:
        return f"{score.unscored_tokens} tokens are not in its vocabulary"
    same = arm == "merged" and result.strategy is not None
    if same and result.strategy and result.strategy.chosen == "dequantize" and score.kl:
        if score.kl.mean < EQUAL_KL:
            return "equals trained"
        return "differs from trained"
    return ""


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


def printable(text: str) -> str:
    """Without control characters, which a name can carry and a terminal or XML obeys."""
    return CONTROL.sub("", text)
