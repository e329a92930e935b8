"""Two releases side by side: from their reports, or scored on the same tokens here and now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qmerge.errors import Fault, InputError, PlanError
from qmerge.measure import FEWEST_WINDOWS, check_limits, compare_results, limits_of
from qmerge.options import options
from qmerge.progress import Progress
from qmerge.recipe import CompareRecipe
from qmerge.reread import read_report
from qmerge.results import REPORT, Comparison, RunResult

OLD, NEW = "old", "new"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """`new` carries the verdicts on the limits; with --eval it holds the scores of both."""

    comparison: Comparison
    new: RunResult

    @property
    def passed(self) -> bool:
        """No regression, no corpus missing, and no limit fell."""
        held = all(verdict.passed for verdict in self.new.gate)
        return self.comparison.verdict in ("same", "better") and held


def compare(recipe: CompareRecipe, progress: Progress | None = None) -> Compared:
    """Whether NEW is better, worse or the same beyond noise, window by window.

    An increase of perplexity is limited against OLD; KL, same top token and survival against the
    reference that NEW was measured against, which is OLD where both are scored here. CorpusError
    names a corpus of which the two have other tokens.
    """
    faults = (*recipe.faults(), *_for_scoring_alone(recipe))
    if faults:
        raise PlanError(faults)
    old, new = _scored(recipe, progress) if recipe.eval else _reported(recipe)
    comparison = compare_results(old, new)
    return Compared(comparison=comparison, new=_with_gate(recipe, comparison, new))


def _for_scoring_alone(recipe: CompareRecipe) -> Iterator[Fault]:
    """Reports hold what was scored: nothing that says how to score changes that."""
    for each in options(CompareRecipe):
        given = getattr(recipe, each.name) != each.default
        if not recipe.eval and each.section == "Text" and given:
            yield Fault(
                where=each.flag,
                message="is for scoring, and reports are compared as they are",
                hint="give --eval TEXT to score both, or leave it out",
            )


def _reported(recipe: CompareRecipe) -> tuple[RunResult, RunResult]:
    return _of_one_model(recipe.old), _of_one_model(recipe.new)


def _of_one_model(place: str) -> RunResult:
    """One of `qmerge evaluate` is taken where it speaks of one model beside the reference."""
    path = Path(place).expanduser()
    if path.is_dir() and not (path / REPORT).is_file():
        raise InputError(
            f"{place} holds no {REPORT}",
            hint="give --eval TEXT to score both, or releases that `qmerge run` made",
        )
    result = read_report(path)
    others = [arm for arm in result.arms if arm != result.reference]
    if result.subject is None and len(others) == 1:
        return replace(result, subject=others[0])
    return result


def _scored(recipe: CompareRecipe, progress: Progress | None) -> tuple[RunResult, RunResult]:
    from qmerge.evaluate import evaluate

    both = evaluate(recipe.scoring(), progress, fewest=FEWEST_WINDOWS)
    return replace(both, subject=OLD), replace(both, subject=NEW)


def _with_gate(recipe: CompareRecipe, comparison: Comparison, new: RunResult) -> RunResult:
    """The limits hold on every corpus of either; against OLD, on those that it has."""
    subject, limits = new.subject or "", limits_of(recipe)
    scores = {
        corpus: replace(new.arms[subject][corpus], change=found.change)
        for corpus, found in comparison.corpora.items()
    }
    measured = replace(new, arms={subject: scores})
    verdicts = check_limits(measured, limits, missing=comparison.missing)
    found = new.arms[subject]
    added = {name: found[name] for name in comparison.added if name in found}
    if added:
        alone = replace(limits, max_ppl_increase=None, min_survival=None)
        verdicts += check_limits(replace(new, arms={subject: added}, merge=None), alone)
    return replace(new, gate=verdicts)
