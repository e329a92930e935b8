"""The report as markdown, for the model card, a job summary or a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qmerge.report.figures import (
    COLUMNS,
    STATISTICS,
    corpora,
    duration,
    heading,
    printable,
    rows,
    size,
    statistics,
)
from qmerge.report.glossary import legend, words
from qmerge.report.lines import (
    doubts,
    error_ratio_phrase,
    findings,
    gate_lines,
    merge_lines,
    pieces_of,
    previous_lines,
    strategy_told,
    survival_phrase,
    warnings,
)
from qmerge.report.verdict import verdict
from qmerge.results import RunResult

NUMBER = r"[+-]?[\d.]+(e[+-]?\d+)?"
FIGURE = re.compile(
    rf"({NUMBER}( ([±×]|to) {NUMBER})?( tokens|%)?|{NUMBER} ([KMGT]iB|B|s)|[\d hmins]+"
    r"|–|not finite)?\Z"
)


def render(result: RunResult) -> str:
    """Verdict, tables, survival, layers, corpora, inputs, versions, times: the whole report."""
    blocks = ["# qmerge report", _bold(verdict(result).sentence), doubted(result)]
    blocks.append("\n".join(f"- {coded(line, result)}" for line in findings(result)))
    blocks.append(summary(result))
    blocks.append(escape(legend(result)).replace("\\`", "`"))
    blocks.append(_all_figures(result))
    blocks.append(_layers(result))
    blocks.append(_words(result))
    blocks.append(_texts(result))
    blocks.append(_inputs(result))
    blocks.append(_costs(result))
    if warnings(result):
        lines = [f"- {coded(line, result)}" for line in warnings(result)]
        blocks.append("\n".join(["## Warnings", "", *lines]))
    return "\n\n".join(block for block in blocks if block) + "\n"


def doubted(result: RunResult) -> str:
    """Warnings that question the reference itself, and with it the verdict."""
    return "\n\n".join(f"Warning: {escape(line)}" for line in doubts(result))


def summary(result: RunResult) -> str:
    """The arms' tables with survival, strategy and gate: what the card shows too."""
    blocks = []
    for corpus in corpora(result):
        body = [
            [row.label, *(str(cell) for cell in row.cells), row.note]
            for row in rows(result, corpus)
        ]
        blocks.append(
            f"### {escape(heading(result, corpus))}\n\n" + grid(["arm", *COLUMNS, "note"], body)
        )
    if result.survival is not None:
        blocks.append(f"Adapter: {escape(survival_phrase(result.survival))}.")
    ratio = error_ratio_phrase(result)
    if ratio:
        blocks.append(f"Original: {escape(ratio)}.")
    strategy = strategy_told(result)
    if strategy is not None:
        blocks.append(f"Strategy: {escape(strategy.chosen)}, {escape(strategy.why)}")
    lines = [f"Gate: {line}" for line in gate_lines(result)]
    lines += [*previous_lines(result), *merge_lines(result)]
    if lines:
        blocks.append("\n".join(f"- {escape(line)}" for line in lines))
    return "\n\n".join(blocks)


def _all_figures(result: RunResult) -> str:
    about = "Intervals of the change, percentiles of KL, change of the right token's probability."
    blocks = [f"## All figures\n\n{about}"]
    for corpus in corpora(result):
        body = [[row.label, *row.values] for row in statistics(result, corpus)]
        if body:
            title = escape(heading(result, corpus))
            blocks.append(f"### {title}\n\n" + grid(["arm", *STATISTICS], body))
    return "\n\n".join(blocks) if len(blocks) > 1 else ""


def grid(head: list[str], body: list[list[str]]) -> str:
    """A table; columns that are empty throughout are left out, figures stand to the right."""
    columns = [
        (title, [row[i] for row in body])
        for i, title in enumerate(head)
        if i == 0 or any(row[i] not in ("", "–") for row in body)
    ]
    right = [
        i > 0 and all(FIGURE.match(cell) for cell in cells) for i, (_, cells) in enumerate(columns)
    ]
    lines = [_row(title for title, _ in columns)]
    lines.append(_row("---:" if side else "---" for side in right))
    lines += [_row(cells[i] for _, cells in columns) for i in range(len(body))]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return (
        "| " + " | ".join(cell if set(cell) <= set("-:") else escape(cell) for cell in cells) + " |"
    )


def escape(text: str) -> str:
    """Text from models, paths and corpora cannot become markup."""
    flat = re.sub(r"\s+", " ", printable(text))
    marked = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", flat)
    return marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def coded(text: str, result: RunResult) -> str:
    """Escaped text, with what is to be pasted as code, in which nothing is escaped."""
    pieces = pieces_of(text, [remedy.option for remedy in result.remedies])
    return "".join(f"`{piece}`" if code else escape(piece) for piece, code in pieces)


def _bold(text: str) -> str:
    return f"**{escape(text)}**"


def _layers(result: RunResult) -> str:
    """Survival, noise and the base's error over the adapter's effect, layer by layer."""
    kept = [(layer.name, layer.survival) for layer in result.layers if layer.survival is not None]
    body = [
        [name, *map(_short, (found.survival, found.noise, found.error_ratio))]
        for name, found in kept
    ]
    head = ["layer", "survival", "noise", "base's error / adapter's effect"]
    return "## Layers\n\n" + grid(head, body) if body else ""


def _words(result: RunResult) -> str:
    """What the tables and lines above mean by their words."""
    found = words(result, linears=False)
    lines = [f"- *{escape(word)}*: {escape(meaning)}" for word, meaning in found.items()]
    return "## Words\n\n" + "\n".join(lines) if lines else ""


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _texts(result: RunResult) -> str:
    texts = list(result.corpora.evaluation.values())
    if result.corpora.calibration is not None:
        texts.insert(0, result.corpora.calibration)
    if not texts:
        return ""
    body = [
        [
            t.name,
            t.role.replace("_", "-"),
            t.source,
            f"{t.windows} × {t.sequence_length}",
            t.sha256[:16],
        ]
        for t in texts
    ]
    return "## Texts\n\n" + grid(["name", "role", "source", "tokens", "sha256"], body)


def _inputs(result: RunResult) -> str:
    folders = dict(result.inputs)
    if result.release is not None:
        folders["release"] = result.release
    if not folders:
        return ""
    body = []
    for role, record in folders.items():
        shown = size(record.bytes) if record.bytes else ""
        body.append([role, record.path, record.format or "", shown])
    return "## Folders\n\n" + grid(["role", "path", "format", "size"], body)


def _costs(result: RunResult) -> str:
    body = [
        [stage, duration(seconds), _memory(result, stage)]
        for stage, seconds in result.timings.items()
    ]
    blocks = ["## Cost\n\n" + grid(["stage", "time", "peak memory"], body)] if body else []
    if result.peak_rss_bytes:
        blocks.append(f"Peak memory of the process: {size(result.peak_rss_bytes)}.")
    if result.versions:
        named = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        blocks.append(f"qmerge {escape(result.qmerge_version)}; {escape(named)}.")
    return "\n\n".join(blocks)


def _memory(result: RunResult, stage: str) -> str:
    return size(result.memory[stage]) if stage in result.memory else ""
