"""report.html: parsed as a page, and opened in a real browser where there is one."""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qmerge.report import render
from qmerge.results import Piece, RunResult
from tests.samples import ODD, finished, without_adapter_figures

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


def page(*, odd: bool = False) -> str:
    return drawn(odd)


@functools.cache
def drawn(odd: bool) -> str:
    return render(spaced(finished(damage=0.3, odd=odd)), "html")


def spaced(result: RunResult) -> RunResult:
    """With a passage that holds one long token of spaces, as code has them."""
    name, found = next(iter(result.worst.items()))
    piece = Piece(text=" " * 200, kl=5.0, nll_change=1.0)
    first = dataclasses.replace(found[0], pieces=(piece, *found[0].pieces))
    return dataclasses.replace(result, worst={**result.worst, name: (first, *found[1:])})


class Reader(HTMLParser):
    """Elements and attributes; fails on an element that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("odd", [False, True])
def test_the_page_is_whole_and_reaches_for_nothing(odd: bool) -> None:
    text = page(odd=odd)
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.seen)
    addresses = set(re.findall(r"https?://[^\"'\s<]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert all(name not in ("src", "href") for name, _ in reader.attributes)
    links = [value for name, value in reader.attributes if name == "xlink:href"]
    assert all(value.startswith("#") for value in links)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]


def test_text_from_users_is_shown_as_text() -> None:
    text = page(odd=True)
    assert "<script" not in text
    assert html.escape(ODD.split(" ")[0]) in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_ids_are_unique_and_references_resolve() -> None:
    reader = Reader()
    reader.feed(page())
    # Groups that matplotlib names alike in every plot (figure_1) are referred to by nobody.
    used = {value[1:] for name, value in reader.attributes if name == "xlink:href"}
    used |= set(re.findall(r"url\(#([^)]*)\)", page()))
    ids = [value for name, value in reader.attributes if name == "id"]
    assert used <= set(ids)
    assert all(ids.count(name) == 1 for name in used)


def test_plots_follow_the_pages_colours() -> None:
    text = page()
    plots = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#01010\d|#0102", plots)
    for name in set(re.findall(r"var\(--([\w-]+)\)", text)) - {"heat"}:
        assert f"--{name}:" in text, name


def test_every_plot_has_axes_with_units_and_a_caption() -> None:
    text = page()
    figures = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    titles = [re.search(r"<b>(.*?)</b>", figure)[1] for figure in figures]  # type: ignore[index]
    assert titles == [
        "Perplexity on plays", "Perplexity on encyclopedia", "Change by window",
        "KL by token confidence", "KL by layer depth", "Adapter survival",
        "Error of the base against adapter", "Quantization error",
    ]  # fmt: skip
    for figure in figures:
        assert figure.count("<svg") == 1
        assert re.search(r"</div>\s*<p>\w", figure)
    for label in ("perplexity ± stderr", "share of windows, %", "mean KL, nats", "decoder layer"):
        assert label in text


def test_the_verdict_comes_first_and_the_worst_tokens_are_marked() -> None:
    text = page()
    assert text.index('class="verdict') < text.index("<table") < text.index("<figure")
    assert text.index("<figure") < text.index("Worst windows") < text.index("How it was made")
    assert re.search(r'<mark style="--heat:\d+%" title="KL [\d.e-]+', text)


def test_one_result_is_always_the_same_page() -> None:
    result = without_adapter_figures(finished())
    assert render(result, "html") == render(result, "html")


def test_the_table_of_linears_has_the_columns_that_are_filled() -> None:
    result = finished()
    heads = re.findall(r"<th.*?>(.*?)</th>", linears_of(result))
    assert {"error", "survival", "codes changed", "fallback"} <= set(heads)
    bare = [
        dataclasses.replace(
            layer,
            linears=tuple(
                dataclasses.replace(linear, survival=None, fallback=None)
                for linear in layer.linears
            ),
        )
        for layer in result.layers
    ]
    table = linears_of(dataclasses.replace(result, layers=tuple(bare)))
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", table.partition("</thead>")[0])
    assert heads == ["linear", "bits", "group", "grid", "error", "damping"]
    assert re.search(r'<td class="figure">\d\.\d\de[+-]\d\d</td>', table)


def linears_of(result: RunResult) -> str:
    found = re.search(
        r'<table class="plain linears">.*?</table>', render(result, "html"), re.DOTALL
    )
    assert found
    return found[0]


@pytest.mark.parametrize(("layers", "least"), [(4, "0"), (12, "0"), (18, "510px"), (28, "680px")])
def test_a_plot_by_depth_is_as_wide_as_its_layers_need(layers: int, least: str) -> None:
    result = finished()
    few = [dataclasses.replace(layer, linears=()) for layer in result.layers]
    many = tuple(few[number % len(few)] for number in range(layers))
    text = render(dataclasses.replace(result, layers=many), "html")
    shown = re.search(r'style="--least: (\w+)" role="img" aria-label="KL by layer depth"', text)
    assert shown
    assert shown[1] == least


def test_an_empty_result_is_a_page_too() -> None:
    assert "Nothing was scored." in render(RunResult(qmerge_version="0"), "html")


def test_an_evaluation_has_only_the_plots_it_has_figures_for() -> None:
    text = render(without_adapter_figures(finished()), "html")
    assert text.count("<figure") == 2
    assert "Worst windows" not in text


def test_matplotlib_is_imported_by_the_html_report_alone() -> None:
    code = (
        "import sys, qmerge.report as r, qmerge.results as q;"
        "x = q.RunResult(qmerge_version='0');"
        "[r.render(x, f) for f in ('text', 'md', 'json')]; r.render_card(x);"
        "print([m for m in ('matplotlib', 'jinja2', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PROBE = """<!doctype html><body><iframe style="border:0;width:{width}px;height:900px"
srcdoc="{page}"></iframe><pre></pre><script>
document.querySelector('iframe').onload = (event) => {{
  const found = event.target.contentDocument, root = found.documentElement;
  const style = (node) => event.target.contentWindow.getComputedStyle(node);
  const tick = found.querySelector('svg text');
  document.querySelector('pre').textContent = JSON.stringify({{
    width: root.scrollWidth, scripts: found.scripts.length,
    plots: found.querySelectorAll('svg').length,
    verdict: found.querySelector('.verdict').textContent,
    page: style(found.body).backgroundColor,
    ink: style(found.body).color, tick: style(tick).fill, font: style(tick).fontFamily,
    hidden: [...found.querySelectorAll('.arms thead')].map((x) => style(x).position),
    tallest: Math.max(...[...found.querySelectorAll('svg')].map((x) => x.clientHeight)),
    least: Math.min(...[...found.querySelectorAll('.plot svg')].map((x) => x.clientHeight)),
    cut: [...found.querySelectorAll('.plot')].filter((x) => x.scrollWidth > x.clientWidth).length,
    spill: Math.max(...[...found.querySelectorAll('mark')].map(
      (x) => x.getBoundingClientRect().right - x.closest('p').getBoundingClientRect().right)),
    broken: [...found.querySelectorAll('.linears td.figure')].filter(
      (x) => style(x).whiteSpace !== 'nowrap').length,
  }});
}};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(width=width, page=html.escape(page(odd=True))), encoding="utf-8")
    found = browse(probe, dark=dark)
    assert found["width"] <= width, "the page scrolls sideways"
    assert found["scripts"] == 0
    assert found["plots"] == 8
    assert found["verdict"].startswith("The release")
    light, ink = (brightness(found[key]) for key in ("page", "ink"))
    assert (light < 60 and ink > 200) if dark else (light > 230 and ink < 60)
    tick = brightness(found["tick"])
    assert tick > 140 if dark else tick < 110
    assert "system-ui" in found["font"]
    assert set(found["hidden"]) == ({"absolute"} if width < 760 else {"static"})
    assert found["least"] > 100
    assert found["tallest"] < 700
    assert found["cut"] == 0, "a plot of four layers needs no scrolling"
    assert found["spill"] <= 0, "a marked token paints beyond its passage"
    assert found["broken"] == 0


def browse(probe: Path, *, dark: bool) -> Any:
    assert BROWSER is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", scheme,
        f"--user-data-dir={probe.parent / 'profile'}", "--window-size=1400,1000",
        "--virtual-time-budget=10000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shown = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert shown, done.stderr[-2000:]
    return json.loads(html.unescape(shown[1]))


def brightness(colour: str) -> float:
    red, green, blue = (float(part) for part in re.findall(r"[\d.]+", colour)[:3])
    return 0.3 * red + 0.59 * green + 0.11 * blue
