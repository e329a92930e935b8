"""The table of arms as plain text: what a person sees on stdout when a run is done."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from qmerge.report.figures import (
    COLUMNS,
    Cell,
    Row,
    change_phrase,
    corpora,
    heading,
    printable,
    rows,
)
from qmerge.report.lines import (
    doubts,
    error_ratio_phrase,
    findings,
    gate_lines,
    merge_lines,
    pressing,
    previous_lines,
    strategy_told,
    survival_phrase,
    warnings,
)
from qmerge.report.verdict import verdict
from qmerge.results import Comparison, RunResult

WIDTH = 100
GLUE = "\0"


def render(result: RunResult) -> str:
    """Verdict, one table per corpus, survival, warnings; no colour, lines under 100 columns
    wherever names allow."""
    blocks = [_wrapped(verdict(result).sentence)]
    blocks.append("\n".join(_wrapped(f"warning: {line}") for line in doubts(result)))
    options = [remedy.option for remedy in result.remedies]
    lines = findings(result)
    if lines:
        blocks.append("\n".join(_wrapped(line, options) for line in lines))
    blocks += tables(result)
    blocks.append("\n".join(_facts(result)))
    others = [line for line in warnings(result) if line in pressing(result)]
    blocks.append("\n".join(_wrapped(f"warning: {line}", options) for line in others))
    return printable("\n\n".join(block for block in blocks if block) + "\n")


def render_comparison(found: Comparison) -> str:
    """Two releases side by side: verdict, change and KL per corpus, linears that got worse."""
    broken = [name for name, corpus in found.corpora.items() if not corpus.finite]
    why = f": its scores are not finite on {', '.join(broken)}" if broken else ""
    sentences = {
        "better": "The new release is better than the old one.",
        "worse": f"The new release is worse than the old one{why}.",
        "same": "No difference beyond noise.",
        "incomplete": f"The new release was not scored on {', '.join(found.missing)}, as the old"
        " one was.",
    }
    lines = [sentences[found.verdict], ""]
    for name, corpus in found.corpora.items():
        parts = [f"  {name}: {corpus.verdict}, perplexity {change_phrase(corpus.change)}"]
        if corpus.kl is not None and corpus.finite:
            error = "" if corpus.kl.stderr is None else f" ± {corpus.kl.stderr:.5f}"
            parts.append(f"KL from the reference {corpus.kl.mean:+.5f}{error}")
        lines.append(", ".join(parts))
    lines += [f"  {name}: missing, only the old one was scored on it" for name in found.missing]
    lines += [f"  {name}: added, only the new one was scored on it" for name in found.added]
    old, new = found.survival
    if old is not None and new is not None:
        lines.append(f"  adapter survival: {old:.3f} before, {new:.3f} now")
    lines += [f"  larger error: {name}" for name in found.layers]
    return printable("\n".join(lines) + "\n")


def _facts(result: RunResult) -> list[str]:
    facts = []
    if result.survival is not None:
        facts.append(_wrapped(f"adapter: {survival_phrase(result.survival)}"))
    ratio = error_ratio_phrase(result)
    if ratio:
        facts.append(_wrapped(f"original: {ratio}"))
    facts.extend(_wrapped(line) for line in merge_lines(result))
    strategy = strategy_told(result)
    if strategy is not None:
        facts.append(_wrapped(f"strategy: {strategy.chosen}, {strategy.why}"))
    facts.extend(_wrapped(f"gate: {line}") for line in gate_lines(result))
    facts.extend(_wrapped(line) for line in previous_lines(result))
    if result.release is not None:
        facts.append(f"written: {result.release.path}, with report.html and a model card")
    return facts


def tables(result: RunResult) -> list[str]:
    """The arms' table of each corpus, under its heading."""
    return [
        "\n".join([heading(result, corpus), *_table(rows(result, corpus))])
        for corpus in corpora(result)
    ]


def _table(found: list[Row]) -> list[str]:
    """Rows with labels to the left, figures and their errors each aligned to the right."""
    if not found:
        return []
    columns = [_column(title, [row.cells[i] for row in found]) for i, title in enumerate(COLUMNS)]
    used = [column for column in columns if any(cell.strip(" –") for cell in column[1:])]
    labels = [row.label for row in found]
    left = max(len(label) for label in labels)
    lines = [_line("", left, [column[0] for column in used])]
    for number, row in enumerate(found, start=1):
        line = _line(row.label, left, [column[number] for column in used])
        note = "" if row.arm == "noise_floor" else row.note
        lines.append(f"{line}  {note}".rstrip())
    return lines


def _line(label: str, left: int, cells: list[str]) -> str:
    return "  ".join([f"  {label:<{left}}", *cells]).rstrip()


def _column(title: str, cells: list[Cell]) -> list[str]:
    values = max((len(cell.value) for cell in cells), default=0)
    errors = max((len(cell.error) for cell in cells), default=0)
    unit = next((cell.unit for cell in cells if cell.unit), "")
    shown = [_aligned(cell, values, errors, unit) for cell in cells]
    width = max(len(text) for text in [title, *shown])
    return [f"{text:>{width}}" for text in [title, *shown]]


def _aligned(cell: Cell, values: int, errors: int, unit: str) -> str:
    if cell.word:
        return cell.word
    error = f" ± {cell.error:>{errors}}" if cell.error else " " * (errors + 3 if errors else 0)
    return f"{cell.value:>{values}}{error}{cell.unit:<{len(unit)}}"


def _wrapped(text: str, whole: Iterable[str] = ()) -> str:
    """Lines of WIDTH; what is to be pasted stays `whole`, in one line however long."""
    for part in whole:
        text = text.replace(part, part.replace(" ", GLUE))
    filled = textwrap.fill(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return filled.replace(GLUE, " ")
