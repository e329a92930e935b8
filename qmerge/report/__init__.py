"""A result as text: every renderer is a pure function of `RunResult`."""

from __future__ import annotations

from qmerge.report.card import render as render_card
from qmerge.report.json import render as render_json
from qmerge.report.markdown import render as render_markdown
from qmerge.report.text import render as render_text
from qmerge.report.text import render_comparison
from qmerge.results import RunResult

FORMATS = ("text", "md", "json", "html")

__all__ = [
    "FORMATS",
    "render",
    "render_card",
    "render_comparison",
    "render_json",
    "render_markdown",
    "render_text",
]


def render(result: RunResult, form: str) -> str:
    """The report in one of FORMATS. HTML draws plots, and is the only one that needs matplotlib."""
    if form == "html":
        from qmerge.report.html import render as render_html

        return render_html(result)
    if form == "md":
        return render_markdown(result)
    return render_json(result) if form == "json" else render_text(result)
