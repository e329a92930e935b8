"""The first sentence of every report: is the release as good as what was trained?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qmerge.report.figures import (
    change_phrase,
    corpora,
    kl_figure,
    perplexity,
    share_cell,
    subject_score,
)
from qmerge.results import ArmScore, Change, RunResult

# The verdict's steps, for a release against `trained`. The first is what the gate's examples ask
# for; beyond the second the loss is of the size that nearest rounding brings, which loses the
# adapter (KL 0.07 to 0.26, perplexity +12% to +39% where GPTQ has 0.001 and +0.1%).
GOOD = {"increase": 0.01, "kl": 0.05, "survival": 0.9}
FAIR = {"increase": 0.05, "kl": 0.2, "survival": 0.7}
# An adapter whose own gain is below this share of perplexity has no gain to speak of.
SMALLEST_GAIN = 0.02


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`tone` is "good", "fair", "poor" or "plain"; the sentence says why."""

    tone: str
    sentence: str


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
    survival = result.survival.survival if result.survival else None
    kept = 1.0 if survival is None else survival
    reference = "what you trained" if result.reference == "trained" else str(result.reference)
    for tone, bounds, opinion in (
        ("good", GOOD, f"is as good as {reference}"),
        ("fair", FAIR, f"is somewhat worse than {reference}"),
    ):
        near = _increase(score.change) <= bounds["increase"] and score.kl.mean <= bounds["kl"]
        if near and kept >= bounds["survival"]:
            return tone, opinion
    return "poor", f"lost much of {reference}"


def _increase(change: Change) -> float:
    """What perplexity rose by; a rise within noise is none."""
    low = change.ci95[0] if change.ci95 else change.ratio
    return change.ratio - 1 if low > 1 else 0.0


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
        if _increase(score.change) > GOOD["increase"] or score.kl.mean > GOOD["kl"]:
            yield f"on {name} perplexity {change_phrase(score.change)}, KL {kl_figure(score)}"


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
