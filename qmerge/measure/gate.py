"""Limits that a release must keep, against the reference, on every corpus."""

from __future__ import annotations

from dataclasses import dataclass

from qmerge.errors import RecipeError
from qmerge.results import ArmScore, GateVerdict, RunResult


@dataclass(frozen=True, kw_only=True)
class Limits:
    """None: no limit. Shares as fractions of 1 (`max_ppl_increase` 0.01 is one per cent)."""

    max_ppl_increase: float | None = None
    max_kl: float | None = None
    min_survival: float | None = None
    min_same_top: float | None = None


def parse_limit(text: str, *, option: str) -> float:
    """ "1%" and "0.01" are the same limit. RecipeError names the option."""
    number, per_cent = (text.strip()[:-1], 100.0) if text.strip().endswith("%") else (text, 1.0)
    try:
        value = float(number) / per_cent
    except ValueError as error:
        raise RecipeError(f"{option}: {text!r} is no number", hint="as in 1% or 0.01") from error
    if not 0 <= value < float("inf"):
        raise RecipeError(f"{option}: {text!r} is out of range", hint="as in 1% or 0.01")
    return value


def check_limits(result: RunResult, limits: Limits) -> tuple[GateVerdict, ...]:
    """One verdict per limit and corpus. What was not measured does not pass."""
    verdicts: list[GateVerdict] = []
    scores = result.arms.get(result.subject or "", {})
    for corpus in scores or dict.fromkeys(["-"]):
        score = scores.get(corpus)
        if limits.max_ppl_increase is not None:
            verdicts.append(_perplexity(corpus, score, limits.max_ppl_increase))
        if limits.max_kl is not None:
            kl = score.kl.mean if score and score.kl else None
            verdicts.append(_most("max_kl", corpus, kl, limits.max_kl, "mean KL"))
        if limits.min_same_top is not None:
            same = score.same_top.mean if score and score.same_top else None
            verdicts.append(
                _least("min_same_top", corpus, same, limits.min_same_top, "same top token")
            )
    if limits.min_survival is not None:
        kept = result.survival.survival if result.survival else None
        verdicts.append(_least("min_survival", None, kept, limits.min_survival, "adapter survival"))
    return tuple(verdicts)


def _perplexity(corpus: str, score: ArmScore | None, bound: float) -> GateVerdict:
    increase = score.change.ratio - 1 if score and score.change else None
    return _most("max_ppl_increase", corpus, increase, bound, "perplexity increase", share=True)


def _most(
    limit: str,
    corpus: str | None,
    value: float | None,
    bound: float,
    what: str,
    share: bool = False,
) -> GateVerdict:
    passed = value is not None and value <= bound
    text = _text(what, corpus, value, bound, "over" if not passed else "within", share)
    return GateVerdict(
        limit=limit, corpus=corpus, value=value, bound=bound, passed=passed, text=text
    )


def _least(
    limit: str, corpus: str | None, value: float | None, bound: float, what: str
) -> GateVerdict:
    passed = value is not None and value >= bound
    text = _text(
        what, corpus, value, bound, "under" if not passed else "within", limit == "min_same_top"
    )
    return GateVerdict(
        limit=limit, corpus=corpus, value=value, bound=bound, passed=passed, text=text
    )


def _text(
    what: str, corpus: str | None, value: float | None, bound: float, side: str, share: bool
) -> str:
    def shown(number: float) -> str:
        return f"{100 * number:.3g}%" if share else f"{number:.3g}"

    where = f" on {corpus}" if corpus not in (None, "-") else ""
    if value is None:
        return f"{what}{where} not measured, limit {shown(bound)}"
    return f"{what} {shown(value)}{where}, {side} the limit of {shown(bound)}"
