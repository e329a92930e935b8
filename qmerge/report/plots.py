"""The report's plots as SVG text, in colours that follow the page.

matplotlib draws with stand-in colours; `_themed` turns them into the page's CSS variables, so that
one picture serves light, dark and print. Sizes are made for a phone's width: text stays readable.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from qmerge.report.figures import corpora, label
from qmerge.report.lines import projection
from qmerge.results import Change, LinearResult, RunResult

# A stand-in for each CSS variable of the page: any colours that nothing else in a plot has.
INK, MUTED, LINE, PANEL = "#010101", "#010102", "#010103", "#010104"
ACCENT, SECOND, GOOD, BAD = "#010105", "#010106", "#010107", "#010108"
HEAT = tuple(f"#0102{step:02x}" for step in range(7))
NAMES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    PANEL: "panel",
    ACCENT: "accent",
    SECOND: "second",
    GOOD: "good",
    BAD: "bad",
    **{colour: f"heat{step}" for step, colour in enumerate(HEAT)},
}
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
}
WIDTH = 5.0
# Arms that are this many times farther from the reference than the subject are shown at the edge.
FAR = 12.0
SURVIVAL_BOUNDS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.05)
SURVIVAL_NAMES = ("< 0.5", "0.5–0.7", "0.7–0.8", "0.8–0.9", "0.9–0.95", "0.95–1.05", "> 1.05")
# Error of a linear over that of its like: worst first, as in the survival map.
ERROR_BOUNDS = (0.5, 2.0, 3.0, 5.0, 8.0, 12.0)
ERROR_NAMES = ("> 12", "8–12", "5–8", "3–5", "2–3", "0.5–2", "< 0.5")
# The base's quantization error in units of the adapter's effect, worst first.
RATIO_BOUNDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
RATIO_NAMES = ("> 5", "2–5", "1–2", "0.5–1", "0.2–0.5", "0.1–0.2", "< 0.1")

Draw = Callable[[Figure], None]
Grid = Mapping[tuple[str, int], float]
Map = tuple[float, float, Draw]
"""Width, height and drawing of a map of layers and projections."""


def picture(name: str, height: float, draw: Draw, width: float = WIDTH) -> str:
    """An inline `<svg>` with deterministic ids that no other plot of the page shares."""
    settings: Any = {**SETTINGS, "svg.hashsalt": name}
    with mpl.rc_context(settings), warnings.catch_warnings():
        # The page's fonts draw the text; what matplotlib's own font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        stream = io.StringIO()
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return _themed(stream.getvalue())


def _themed(svg: str) -> str:
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", body, count=1)
    return re.sub(r'style="[^"]*"', _themed_style, body)


def _themed_style(match: re.Match[str]) -> str:
    """The page's fonts and colours, in style attributes only: a name in a plot stays as it is."""
    style = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", match[0])
    style = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", style)
    for stand_in, name in NAMES.items():
        style = style.replace(stand_in, f"var(--{name})")
    return style


def perplexities(result: RunResult, corpus: str) -> Draw:
    """Left: perplexity ± standard error. Right: paired change with its 95 % interval."""
    arms = [arm for arm, scores in result.arms.items() if corpus in scores]
    scores = [result.arms[arm][corpus] for arm in arms]
    colours = [arm_colour(result, arm) for arm in arms]
    near = _near(result, corpus)

    def draw(figure: Figure) -> None:
        paired = any(score.change for score in scores)
        axes = figure.subplots(1, 2 if paired else 1, sharey=True, squeeze=False)[0]
        for place, (score, colour) in enumerate(zip(scores, colours, strict=True)):
            _point(axes[0], score.perplexity, score.stderr, score.stderr, place, colour)
            if score.change is not None:
                _change_point(axes[1], score.change, place, colour, near)
        _scale_perplexity(axes[0], [s.perplexity for s in scores if math.isfinite(s.perplexity)])
        axes[0].set_yticks(range(len(arms)), [label(result, arm) for arm in arms])
        axes[0].tick_params(axis="y", length=0, labelcolor=INK)
        axes[0].set_ylim(len(arms) - 0.5, -0.5)
        axes[0].set_xlabel("perplexity ± stderr")
        if paired:
            axes[1].axvline(0, color=MUTED, linewidth=1)
            axes[1].set_xlim(-near, near)
            axes[1].tick_params(axis="y", length=0)
            axes[1].set_xlabel("change, %, 95% interval")

    return draw


def _scale_perplexity(axes: Axes, values: Sequence[float]) -> None:
    if values and max(values) > 3 * min(values) > 0:
        axes.set_xscale("log")
        _plain_log(axes.xaxis)


def _plain_log(axis: Axis) -> None:
    """Ticks as 1, 2, 5, 10 and not as powers, which need mathematical text."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _near(result: RunResult, corpus: str) -> float:
    """Per cent shown on either side: arms far beyond the subject's own change would hide it."""
    reach = {}
    for arm, scores in result.arms.items():
        change = scores[corpus].change if corpus in scores else None
        if change is not None and math.isfinite(change.ratio):
            ends = change.ci95 or (change.ratio,)
            reach[arm] = max(100 * abs(end - 1) for end in ends)
    own = max(reach.get(result.subject or "", 0.0), 0.1)
    far = FAR * own if result.subject in reach else math.inf
    return 1.2 * max([own, *(value for value in reach.values() if value <= far)])


def _change_point(axes: Axes, change: Change, place: int, colour: str, near: float) -> None:
    centre = 100 * (change.ratio - 1)
    low, high = (100 * (x - 1) for x in change.ci95 or (change.ratio, change.ratio))
    if not math.isfinite(centre) or max(abs(low), abs(high)) <= near:
        _point(axes, centre, centre - low, high - centre, place, colour)
        return
    side = math.copysign(1, centre)
    axes.plot([0.96 * side * near], [place], ">" if side > 0 else "<", color=colour, markersize=6)
    where: Any = {"ha": "right" if side > 0 else "left", "va": "center"}
    axes.text(0.86 * side * near, place, f"{centre:+.3g}%", fontsize=9, color=colour, **where)


def arm_colour(result: RunResult, arm: str) -> str:
    return ACCENT if arm == result.subject else INK if arm == result.reference else MUTED


def _point(
    axes: Axes, centre: float, low: float | None, high: float | None, place: int, colour: str
) -> None:
    if not math.isfinite(centre):
        return
    errors = None if low is None or high is None else [[max(low, 0.0)], [max(high, 0.0)]]
    axes.errorbar(
        [centre],
        [place],
        xerr=errors,
        fmt="o",
        color=colour,
        capsize=3,
        markersize=5,
        linewidth=1.6,
    )


def window_changes(result: RunResult) -> Draw:
    """Histogram over windows of the change in perplexity, one outline per corpus."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        found = {corpus: changes_by_window(result, corpus) for corpus in corpora(result)}
        found = {corpus: values for corpus, values in found.items() if values}
        everything = [value for values in found.values() for value in values]
        edges = _edges(everything)
        for corpus, colour in zip(found, _cycle(len(found)), strict=True):
            shares = [100 / len(found[corpus])] * len(found[corpus])
            held = [min(max(value, edges[0]), edges[-1]) for value in found[corpus]]
            axes.hist(held, edges, weights=shares, histtype="stepfilled", color=colour, alpha=0.18)
            axes.hist(held, edges, weights=shares, histtype="step", color=colour, linewidth=1.6)
            centre = sum(found[corpus]) / len(found[corpus])
            axes.axvline(centre, color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_xlabel(f"change of perplexity from {result.reference}, % (dashed: mean)")
        axes.set_ylabel("share of windows, %")
        _legend(figure, list(found))

    return draw


def changes_by_window(result: RunResult, corpus: str) -> list[float]:
    """Per cent per window; empty without a reference and a subject."""
    base = result.arms.get(result.reference or "", {}).get(corpus)
    score = result.arms.get(result.subject or "", {}).get(corpus)
    if base is None or score is None or len(base.window_nll) != len(score.window_nll):
        return []
    pairs = zip(score.window_nll, base.window_nll, strict=True)
    values = [100 * math.expm1(min(new - old, 50.0)) for new, old in pairs]
    return [value for value in values if math.isfinite(value)]


def _edges(values: Sequence[float]) -> list[float]:
    """Bins over the middle 98%, zero among the edges; the outermost take what lies beyond."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = min(ordered[cut], 0.0), max(ordered[-1 - cut], 0.0)
    bins = max(8, min(36, round(2 * len(ordered) ** 0.5)))
    width = (high - low) / bins or 1e-3
    first, last = math.floor(low / width), math.ceil(high / width)
    return [width * step for step in range(first, max(last, first + 1) + 1)]


def confidence(result: RunResult) -> Draw:
    """Above: mean KL by the reference's confidence. Below: where the tokens are."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
        names = _with_bins(result)
        for number, (corpus, colour) in enumerate(zip(names, _cycle(len(names)), strict=True)):
            bins = result.arms[str(result.subject)][corpus].kl_by_confidence
            total = sum(part.tokens for part in bins)
            centres = [(part.low + part.high) / 2 for part in bins]
            errors = [part.stderr or 0.0 for part in bins]
            means = [part.kl for part in bins]
            upper.errorbar(centres, means, errors, fmt="o-", color=colour, capsize=3, markersize=4)
            width = 0.084 / len(names)
            places = [part.low + 0.008 + (number + 0.5) * width for part in bins]
            shares = [100 * part.tokens / total for part in bins]
            lower.bar(places, shares, width * 0.92, color=colour, alpha=0.55)
        upper.set_ylim(bottom=0)
        upper.set_ylabel("mean KL, nats")
        lower.set_ylabel("tokens, %")
        lower.set_xlabel(f"probability {result.reference} gives its likeliest token")
        lower.set_xlim(0, 1)
        _legend(figure, names)

    return draw


def _with_bins(result: RunResult) -> list[str]:
    scores = result.arms.get(result.subject or "", {})
    return [name for name in corpora(result) if name in scores and scores[name].kl_by_confidence]


def depth(result: RunResult) -> Draw:
    """KL by the number of layers behind which the model is taken to end."""
    layers = [layer for layer in result.layers if layer.kind == "layer"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        values = [math.nan if layer.kl is None else layer.kl for layer in layers]
        axes.plot(range(len(layers)), values, "o-", color=ACCENT, markersize=4, linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("mean KL, nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def survival_map(result: RunResult) -> Map | None:
    """Survival by layer and projection, the worst of its kind; None where none was measured."""
    cells = _worst(result, lambda x: x.survival.survival if x.survival else None, min)
    return _heat_map(cells, SURVIVAL_BOUNDS, HEAT, SURVIVAL_NAMES, "survival")


def ratio_map(result: RunResult) -> Map | None:
    """As `survival_map`, of the base's quantization error over the adapter's effect."""
    cells = _worst(result, lambda x: x.survival.error_ratio if x.survival else None, max)
    title = "base's error over the adapter's effect"
    return _heat_map(cells, RATIO_BOUNDS, HEAT[::-1], RATIO_NAMES, title)


def error_map(result: RunResult) -> Map | None:
    """As `survival_map`, of each linear's output error over the median of its like in other
    layers."""
    errors = _worst(result, lambda x: x.error, max)
    usual = {
        name: median(value for (other, _), value in errors.items() if other == name)
        for name, _ in errors
    }
    cells = {(n, c): value / usual[n] for (n, c), value in errors.items() if usual[n] > 0}
    title = "error over the median of its kind"
    return _heat_map(cells, ERROR_BOUNDS, HEAT[::-1], ERROR_NAMES, title)


def _worst(
    result: RunResult,
    read: Callable[[LinearResult], float | None],
    worse: Callable[[float, float], float],
) -> dict[tuple[str, int], float]:
    """The worst figure of a layer's linears of one projection, by projection and layer."""
    cells: dict[tuple[str, int], float] = {}
    layers = [layer for layer in result.layers if layer.kind == "layer"]
    for column, layer in enumerate(layers):
        for linear in layer.linears:
            place, value = (projection(linear.name), column), read(linear)
            if value is not None:
                cells[place] = worse(value, cells.get(place, value))
    return cells


def _heat_map(
    cells: Grid, bounds: Sequence[float], colours: Sequence[str], names: Sequence[str], title: str
) -> Map | None:
    if not cells:
        return None
    rows = list(dict.fromkeys(name for name, _ in cells))
    columns = 1 + max(column for _, column in cells)
    width = max(WIDTH, min(2 * WIDTH + 0.5, 1.4 + 0.42 * columns))
    values = [[cells.get((row, column), math.nan) for column in range(columns)] for row in rows]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shades = ListedColormap(list(colours))
        norm = BoundaryNorm([-math.inf, *bounds, math.inf], len(colours))
        axes.pcolormesh(values, cmap=shades, norm=norm, edgecolors=PANEL, linewidth=1.5)
        axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
        step = max(1, math.ceil(columns / 20))
        shown = range(0, columns, step)
        axes.set_xticks([x + 0.5 for x in shown], [str(x) for x in shown])
        axes.tick_params(length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("decoder layer")
        for side in axes.spines.values():
            side.set_visible(False)
        if columns <= 20:
            _write_values(axes, values)
        ordered = list(zip(names, HEAT, strict=True))
        marks = [Patch(facecolor=colour, label=name) for name, colour in ordered]
        figure.legend(
            handles=marks,
            title=title,
            ncols=len(marks) if width > 7 else 4,
            loc="outside lower center",
            handlelength=1,
            handleheight=1,
            columnspacing=1,
        )

    height = 1.35 + 0.32 * len(rows) + (0.25 if width <= 7 else 0)
    return width, height, draw


def _write_values(axes: Axes, values: Sequence[Sequence[float]]) -> None:
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isfinite(value):
                text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
                axes.text(x + 0.5, y + 0.5, text, fontsize=8, color=INK, ha="center", va="center")


def _cycle(count: int) -> list[str]:
    colours = (ACCENT, SECOND, GOOD, MUTED)
    return [colours[number % len(colours)] for number in range(count)]


def _legend(figure: Figure, names: Sequence[str]) -> None:
    if len(names) < 2:
        return
    marks = [Patch(facecolor=c, label=n) for n, c in zip(names, _cycle(len(names)), strict=True)]
    columns = 2 if len(names) < 5 else 1
    figure.legend(
        handles=marks, loc="outside upper left", ncols=columns, handlelength=1, handleheight=1
    )
