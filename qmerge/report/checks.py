"""What a continuous integration asks of a result: named checks that hold or do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qmerge.report.figures import DASH, change_phrase, printable
from qmerge.report.lines import findings, gate_lines, pressing
from qmerge.report.markdown import coded, doubted, escape, grid, summary
from qmerge.report.text import render, render_comparison, tables
from qmerge.report.verdict import verdict
from qmerge.results import FINITE, Comparison, CorpusComparison, GateVerdict, RunResult


@dataclass(frozen=True, kw_only=True)
class Check:
    """`name` stays the same from run to run, `text` says what was found."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """All checks of one command, with its report in a sentence, as text and as markdown."""

    command: str
    sentence: str
    checks: tuple[Check, ...]
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    text: str
    markdown: str


def of_result(result: RunResult) -> Checked:
    """The limits; that there are scores at all, and finite ones, is a check of its own."""
    sentence = verdict(result).sentence
    broken = [found.text for found in result.gate if found.limit == FINITE]
    limits = [found for found in result.gate if found.limit != FINITE]
    scored = Check(name="scored", passed=not broken, text="; ".join(broken) or sentence)
    found = [f"- {coded(line, result)}" for line in findings(result)]
    return Checked(
        command=f"qmerge {result.command}",
        sentence=sentence,
        checks=(scored, *_limits(limits)),
        warnings=tuple(pressing(result)),
        seconds=result.timings.get("total", 0.0),
        text=render(result),
        markdown=_blocks(
            [f"**{escape(sentence)}**", doubted(result), "\n".join(found), summary(result)]
        ),
    )


def of_comparison(comparison: Comparison, new: RunResult) -> Checked:
    """That no corpus is worse or missing, and the limits that `new` carries."""
    text = render_comparison(comparison)
    sentence = text.partition("\n")[0]
    checks = [_no_regression(name, found) for name, found in comparison.corpora.items()]
    checks += [_not_scored(name) for name in comparison.missing]
    scored = new.command == "evaluate"
    return Checked(
        command="qmerge compare",
        sentence=sentence,
        checks=(*checks, *_limits(new.gate)),
        seconds=new.timings.get("total", 0.0) if scored else 0.0,
        text=_blocks([text.rstrip(), _gate(new), printable(_blocks(tables(new))) if scored else ""])
        + "\n",
        markdown=_blocks([f"**{escape(sentence)}**", _compared(comparison), summary(new)]),
    )


def _limits(gate: Iterable[GateVerdict]) -> list[Check]:
    """The words before " is " name a limit; those after it hold its value."""
    return [
        Check(
            name=found.text.rpartition(" is ")[0] or found.limit,
            passed=found.passed,
            text=found.text,
        )
        for found in gate
    ]


def _no_regression(corpus: str, found: CorpusComparison) -> Check:
    return Check(
        name=f"no regression on {corpus}",
        passed=found.verdict != "worse",
        text=f"{corpus}: {found.verdict}, perplexity {change_phrase(found.change)}",
    )


def _not_scored(corpus: str) -> Check:
    return Check(
        name=f"no regression on {corpus}",
        passed=False,
        text=f"{corpus}: missing, only the old one was scored on it",
    )


def _gate(result: RunResult) -> str:
    return printable("\n".join(f"gate: {line}" for line in gate_lines(result)))


def _compared(comparison: Comparison) -> str:
    body = [
        [name, found.verdict, change_phrase(found.change)]
        for name, found in comparison.corpora.items()
    ]
    body += [[name, "missing", DASH] for name in comparison.missing]
    body += [[name, "added", DASH] for name in comparison.added]
    grown = [f"- larger error: {escape(name)}" for name in comparison.layers]
    return _blocks([grid(["corpus", "new is", "perplexity"], body), "\n".join(grown)])


def _blocks(blocks: Iterable[str]) -> str:
    return "\n\n".join(block for block in blocks if block)
