"""Two runs against each other, window by window."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from qmerge.errors import CorpusError
from qmerge.measure.statistics import paired_change, paired_estimate, student_quantile
from qmerge.results import (
    ArmScore,
    Change,
    Comparison,
    CorpusComparison,
    CorpusRecord,
    Estimate,
    RunResult,
)

# A linear is pointed at when its error grew by this factor, far beyond what a seed does.
GREW = 2.0
# Rounding of the stored per-window means; smaller differences are none.
ROUNDING = 2e-8
# Windows without which there is no standard error, and nothing is beyond noise.
FEWEST_WINDOWS = 2


def pair(old: ArmScore, new: ArmScore) -> Change:
    """Change of perplexity from `old` to `new`, from their stored window means."""
    assert len(old.window_nll) == len(new.window_nll), "same windows"
    new_W = torch.tensor(new.window_nll, dtype=torch.float64)
    return paired_change(new_W, torch.tensor(old.window_nll, dtype=torch.float64))


def compare_results(old: RunResult, new: RunResult) -> Comparison:
    """Whether `new` is better, worse or the same beyond noise, on every corpus of both.

    Worse on one corpus is worse, and so are scores that are not finite. CorpusError where no corpus
    is shared, a shared name stands for other text, or nothing can be said against `old`: its scores
    are not finite, or there is one window.
    """
    before, after = old.corpora.evaluation, new.corpora.evaluation
    corpora = {name: _compare_corpus(name, old, new) for name in _shared_corpora(before, after)}
    missing = tuple(name for name in before if name not in after)
    verdicts = {found.verdict for found in corpora.values()} | (
        {"incomplete"} if missing else set()
    )
    verdict = next((v for v in ("worse", "incomplete", "better") if v in verdicts), "same")
    return Comparison(
        verdict=verdict,
        corpora=corpora,
        missing=missing,
        added=tuple(name for name in after if name not in before),
        survival=(_survival(old), _survival(new)),
        layers=_grown_layers(old, new),
    )


def _shared_corpora(old: Mapping[str, CorpusRecord], new: Mapping[str, CorpusRecord]) -> list[str]:
    hint = "evaluate both on the same --eval text, windows, --sequence-length and tokenizer"
    shared = [name for name in new if name in old]
    if not shared:
        raise CorpusError(
            f"no corpus in common: {', '.join(old) or 'none'} and {', '.join(new) or 'none'}",
            hint=hint,
        )
    for name in shared:
        if old[name].sha256 != new[name].sha256:
            raise CorpusError(f"corpus {name!r}: the two runs scored different tokens", hint=hint)
    return shared


def _compare_corpus(name: str, old: RunResult, new: RunResult) -> CorpusComparison:
    before, after = _subject(old, name), _subject(new, name)
    if not _is_finite(before):
        raise CorpusError(
            f"corpus {name!r}: the old scores are not finite, and nothing compares with them",
            hint="give another OLD: this one is broken",
        )
    change = pair(before, after)
    kl = _kl_change(name, old, new)
    if not (_is_finite(after) and math.isfinite(change.ratio)):
        return CorpusComparison(verdict="worse", change=change, kl=kl, finite=False)
    if change.ci95 is None:
        raise too_few_windows(name)
    sides = [_side_of_ratio(change), _side_of_kl(kl, len(after.window_kl))]
    verdict = next((v for v in ("worse", "better") if v in sides), "same")
    return CorpusComparison(verdict=verdict, change=change, kl=kl)


def too_few_windows(corpus: str) -> CorpusError:
    """The error for a corpus of one window, which has no spread."""
    return CorpusError(
        f"corpus {corpus!r}: one window cannot tell a difference from noise",
        hint="give more text or windows, or a smaller --sequence-length",
    )


def _is_finite(score: ArmScore) -> bool:
    """Windows of which a model can score no token have no mean."""
    windows = () if score.unscored_tokens else score.window_nll
    kl = (score.kl.mean,) if score.kl is not None else ()
    return all(map(math.isfinite, (score.perplexity, *kl, *windows, *score.window_kl)))


def _subject(result: RunResult, corpus: str) -> ArmScore:
    score = result.arms.get(result.subject or "", {}).get(corpus)
    if score is None:
        raise CorpusError(
            f"corpus {corpus!r}: the report has no score of {result.subject or 'a release'}",
            hint="compare reports that `qmerge run` or `qmerge evaluate` wrote",
        )
    return score


def _kl_change(name: str, old: RunResult, new: RunResult) -> Estimate | None:
    """None unless both were measured against a reference that scored every window alike."""
    before, after = _subject(old, name), _subject(new, name)
    bases = [run.arms.get(run.reference or "", {}).get(name) for run in (old, new)]
    if bases[0] is None or bases[1] is None or not before.window_kl or not after.window_kl:
        return None
    pairs = zip(bases[0].window_nll, bases[1].window_nll, strict=True)
    if any(abs(a - b) > 1e-4 for a, b in pairs):
        return None
    return paired_estimate(
        torch.tensor(after.window_kl, dtype=torch.float64),
        torch.tensor(before.window_kl, dtype=torch.float64),
    )


def _side_of_ratio(change: Change) -> str:
    if change.ci95 is None:
        return "same"
    low, high = change.ci95
    return "worse" if low > 1 + ROUNDING else "better" if high < 1 - ROUNDING else "same"


def _side_of_kl(kl: Estimate | None, windows: int) -> str:
    if kl is None or kl.stderr is None:
        return "same"
    reach = student_quantile(windows - 1) * kl.stderr + ROUNDING
    return "worse" if kl.mean > reach else "better" if kl.mean < -reach else "same"


def _survival(result: RunResult) -> float | None:
    return result.survival.survival if result.survival else None


def _grown_layers(old: RunResult, new: RunResult) -> tuple[str, ...]:
    before = {linear.name: linear.error for layer in old.layers for linear in layer.linears}
    grown = []
    for layer in new.layers:
        for linear in layer.linears:
            was, now = before.get(linear.name), linear.error
            if was is not None and now is not None and now > GREW * was and now > 0:
                grown.append((now / was if was > 0 else float("inf"), linear.name))
    return tuple(name for _, name in sorted(grown, key=lambda item: (-item[0], item[1])))
