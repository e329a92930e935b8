"""Limits that a release must keep, against the reference, on every corpus; a merge that went wrong
and scores that are not finite fail whatever the limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from qmerge.recipe import Scoring
from qmerge.results import FINITE, ArmScore, GateVerdict, MergeCheck, RunResult, Survival


@dataclass(frozen=True, kw_only=True)
class Limits:
    """None: no limit. Shares as fractions of 1 (`max_ppl_increase` 0.01 is one per cent)."""

    max_ppl_increase: float | None = None
    max_kl: float | None = None
    min_survival: float | None = None
    min_same_top: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What a limit is about: a ceiling, or a floor; a share is told in per cent."""

    limit: str
    what: str
    floor: bool = False
    share: bool = False

    def verdict(
        self, value: float | None, bound: float, of: str, corpus: str | None
    ) -> GateVerdict:
        """What was not measured, or is no number, does not pass."""
        passed = value is not None and (value >= bound if self.floor else value <= bound)
        where = f"{of} on {corpus}" if corpus else of
        side = "within" if passed else "under" if self.floor else "over"
        said = f"{self._shown(value)}, {side} the" if value is not None else "not measured,"
        return GateVerdict(
            limit=self.limit,
            corpus=corpus,
            value=value,
            bound=bound,
            passed=passed,
            text=f"{self.what}{where} is {said} limit of {self._shown(bound)}",
        )

    def asked(self, bound: float) -> str:
        """The limit in words."""
        return f"{self.what} {'at least' if self.floor else 'at most'} {self._shown(bound)}"

    def _shown(self, number: float) -> str:
        return f"{100 * number:.3g}%" if self.share else f"{number:.3g}"


def _increase(score: ArmScore) -> float | None:
    return score.change.ratio - 1 if score.change else None


def _kl(score: ArmScore) -> float | None:
    return score.kl.mean if score.kl else None


def _same_top(score: ArmScore) -> float | None:
    return score.same_top.mean if score.same_top else None


ON_CORPORA: tuple[tuple[_Kept, Callable[[ArmScore], float | None]], ...] = (
    (_Kept(limit="max_ppl_increase", what="perplexity increase", share=True), _increase),
    (_Kept(limit="max_kl", what="mean KL"), _kl),
    (_Kept(limit="min_same_top", what="same top token", floor=True, share=True), _same_top),
)
ON_MODEL = _Kept(limit="min_survival", what="adapter survival", floor=True)


def limits_of(asked: Scoring) -> Limits:
    """The limits that a recipe sets."""
    return Limits(
        max_ppl_increase=asked.max_ppl_increase,
        max_kl=asked.max_kl,
        min_same_top=asked.min_same_top,
        min_survival=getattr(asked, "min_survival", None),
    )


def told_limits(limits: Limits) -> Iterator[str]:
    """Each limit that there is, in words."""
    for kept in (*(each for each, _ in ON_CORPORA), ON_MODEL):
        if (bound := getattr(limits, kept.limit)) is not None:
            yield kept.asked(bound)


def check_limits(
    result: RunResult,
    limits: Limits,
    kept: Mapping[str, Survival | None] | None = None,
    missing: Iterable[str] = (),
) -> tuple[GateVerdict, ...]:
    """One verdict per limit and corpus for the subject, or for every arm but the reference where
    there is none; survival once, or for each model that has it in `kept`. On corpora that are
    `missing` nothing was measured. One that failed, too, where scores are not finite and where the
    merged model is not the trained one: nobody has to ask for that.

    Texts are "WHAT is VALUE, …", and what stands before " is " tells them apart.
    """
    gone: dict[str, ArmScore | None] = dict.fromkeys(missing)
    verdicts = [
        verdict
        for of, scores in _checked(result)
        for verdict in _on_corpora(of, {**scores, **gone}, limits)
    ]
    if limits.min_survival is not None:
        models = {f" of {name}": found for name, found in (kept or {}).items()}
        for of, found in (models or {"": result.survival}).items():
            value = found.survival if found else None
            verdicts.append(ON_MODEL.verdict(value, limits.min_survival, of, None))
    return (*verdicts, *_on_scores(result), *_on_merge(result.merge))


def _on_scores(result: RunResult) -> Iterator[GateVerdict]:
    for of, scores in _checked(result):
        for corpus, score in scores.items():
            change, kl = score.change, score.kl
            figures = [score.perplexity]
            figures += [change.ratio] if change is not None else []
            figures += [kl.mean] if kl is not None else []
            if not all(map(math.isfinite, figures)):
                yield GateVerdict(
                    limit=FINITE,
                    corpus=corpus,
                    value=math.nan,
                    bound=math.inf,
                    passed=False,
                    text=f"score{of} on {corpus} is not finite",
                )


def _on_merge(merge: MergeCheck | None) -> Iterator[GateVerdict]:
    if merge is not None and not merge.passed:
        yield GateVerdict(
            limit="merge",
            value=merge.worst,
            bound=merge.rounding,
            passed=False,
            text=f"what merging moved {merge.where} by is {merge.worst:.2g}, over what"
            f" {merge.dtype} rounds ({merge.rounding:.2g}): this is not the model that was trained",
        )


def _checked(result: RunResult) -> list[tuple[str, Mapping[str, ArmScore]]]:
    """Scores to check, and how their arm is called where there are several."""
    if result.subject is not None:
        return [("", result.arms.get(result.subject, {}))]
    arms = [(f" of {arm}", s) for arm, s in result.arms.items() if arm != result.reference]
    return arms or [("", {})]


def _on_corpora(
    of: str, scores: Mapping[str, ArmScore | None], limits: Limits
) -> Iterator[GateVerdict]:
    found: list[tuple[str | None, ArmScore | None]] = [*scores.items()]
    for corpus, score in found or [(None, None)]:
        for kept, read in ON_CORPORA:
            bound = getattr(limits, kept.limit)
            if bound is not None:
                yield kept.verdict(read(score) if score else None, bound, of, corpus)
