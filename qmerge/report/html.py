"""report.html: one file, no network, no script; light and dark, phone and paper."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qmerge.report import plots
from qmerge.report.figures import (
    COLUMNS,
    STATISTICS,
    Figures,
    Row,
    change_cell,
    corpora,
    duration,
    heading,
    kl_figure,
    printable,
    rows,
    share_cell,
    size,
    statistics,
    subject_score,
)
from qmerge.report.glossary import legend, words
from qmerge.report.lines import (
    doubts,
    error_ratio_phrase,
    findings,
    linears,
    merge_lines,
    pieces_of,
    previous_lines,
    strategy_told,
    survival_phrase,
    warnings,
)
from qmerge.report.verdict import verdict
from qmerge.results import LinearResult, Piece, RunResult, Survival, WorstWindow

# Per cent of colour behind the token that suffered most: text on it is still readable.
STRONGEST = 70
# Pixels of a phone's screen for an inch of a plot: a plot of usual width fits one of 390.
PHONE = 68
# Layers for which a plot by depth needs no more than the usual width.
FEW_LAYERS = 12
MAPS = (
    (
        "survival",
        "Adapter survival",
        plots.survival_map,
        "Share of the adapter's effect that is left: 1 is kept whole, 0 erased. Blank where the"
        " adapter changes nothing.",
    ),
    (
        "ratio",
        "Error of the base against adapter",
        plots.ratio_map,
        "The error that quantizing put into the base over the adapter's effect, on the calibration"
        " text. Where it is large, the original is another model than the one the adapter was"
        " trained on.",
    ),
    (
        "error",
        "Quantization error",
        plots.error_map,
        "Relative output error of each linear on the calibration text, over the median of the same"
        " projection in all layers. Far above 1 is a layer that hurts.",
    ),
)
"""Maps of layers and projections: name, title, drawing and caption."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plot with what it shows; `svg` is ours and is not escaped again."""

    title: str
    caption: str
    svg: Markup
    inches: float = plots.WIDTH

    @property
    def wide(self) -> bool:
        """Whether it takes a line of its own."""
        return self.inches > plots.WIDTH

    @property
    def least(self) -> str:
        """Its width on a phone, where it is wider than the screen: text stays readable."""
        return f"{PHONE * self.inches:.0f}px" if self.wide else "0"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One of the figures under the verdict."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """The arms on one corpus."""

    title: str
    rows: list[Row]
    figures: list[Figures]


class Linears(NamedTuple):
    """Columns that some linear fills, whether each holds figures, and the linears' rows."""

    columns: list[tuple[str, bool]]
    rows: list[tuple[str, list[str]]]


class Passage(NamedTuple):
    """A worst window with the strength of each piece's mark in per cent."""

    corpus: str
    window: WorstWindow
    pieces: list[tuple[Piece, int]]


def render(result: RunResult) -> str:
    """The page. Everything that comes from models, paths and texts is escaped by the template."""
    environment = Environment(
        loader=PackageLoader("qmerge", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=size, duration=duration)
    page = environment.get_template("page.html.j2")
    text = page.render(
        result=result,
        name=_name(result),
        origin=_origin(result),
        verdict=verdict(result),
        tiles=_tiles(result),
        findings=[_coded(line, result) for line in findings(result)] + previous_lines(result),
        doubts=doubts(result),
        warnings=[_coded(line, result) for line in warnings(result)],
        columns=COLUMNS,
        tables=[
            Table(title=heading(result, c), rows=rows(result, c), figures=statistics(result, c))
            for c in corpora(result)
        ],
        statistics=STATISTICS,
        legend=Markup(re.sub("`([^`]*)`", r"<b>\1</b>", legend(result))),
        survival=survival_phrase(result.survival) if result.survival else "",
        ratio=error_ratio_phrase(result),
        pictures=_pictures(result),
        merged=merge_lines(result),
        strategy=strategy_told(result),
        linears=_linears(result),
        words=words(result, linears=True),
        passages=_worst(result),
        scale=_scale(result),
        recipe=yaml.safe_dump(_plain(result.recipe), sort_keys=False, allow_unicode=True),
        folders={**result.inputs, **({"release": result.release} if result.release else {})},
        texts=_texts(result),
    )
    return printable(text)


def _name(result: RunResult) -> str:
    path = result.release.path if result.release is not None else ""
    return PurePath(path).name or "evaluation"


def _origin(result: RunResult) -> str:
    """ "base + adapter · dequantize · gptq", as far as it is known."""
    folders = [result.inputs[role] for role in ("base", "adapter") if role in result.inputs]
    parts = [" + ".join(record.model or PurePath(record.path).name for record in folders)]
    strategy = strategy_told(result)
    if strategy is not None:
        parts.append(strategy.chosen)
    if result.release is not None and result.release.format:
        parts.append(result.release.format)
    return " · ".join(part for part in parts if part)


def _coded(text: str, result: RunResult) -> Markup:
    """What is to be pasted as code, in one piece where there is room."""
    pieces = pieces_of(text, [remedy.option for remedy in result.remedies])
    code = Markup('<code class="option">{}</code>')
    return Markup().join(code.format(piece) if is_code else piece for piece, is_code in pieces)


def _tiles(result: RunResult) -> list[Tile]:
    names = corpora(result)
    score = subject_score(result, names[0]) if names else None
    if score is None or score.change is None or score.kl is None:
        return []
    interval = score.change.ci95
    span = "one window: no interval"
    if interval is not None:
        low, high = (100 * (bound - 1) for bound in interval)
        span = f"95% interval {low:+.2f} to {high:+.2f}%"
    floor = result.noise_floor.get(names[0])
    beside = f"99th percentile {score.kl.p99:.3g}"
    if floor is not None and floor.kl is not None:
        beside += f", 16-bit noise {floor.kl.mean:.2g}"
    tiles = [
        Tile(name="Perplexity", value=change_cell(score.change).value + "%", detail=span),
        Tile(name="KL, nats per token", value=kl_figure(score), detail=beside),
    ]
    if score.same_top is not None:
        rms = score.probability_change
        moved = f"right token's probability moves by {100 * rms.rms:.2f}% rms" if rms else ""
        shown = share_cell(score.same_top).value
        tiles.append(Tile(name="Same top token", value=f"{shown}%", detail=moved))
    if result.survival is not None and result.survival.survival is not None:
        noise = "" if result.survival.noise is None else f"noise {result.survival.noise:.3g}"
        kept = f"{result.survival.survival:.3f}"
        tiles.append(Tile(name="Adapter survival", value=kept, detail=f"1 is whole; {noise}"))
    return tiles


def _pictures(result: RunResult) -> list[Picture]:
    found = [_perplexity(result, corpus) for corpus in corpora(result)]
    windows = any(plots.changes_by_window(result, corpus) for corpus in corpora(result))
    if windows:
        found.append(_histogram(result))
    if any(s.kl_by_confidence for s in result.arms.get(result.subject or "", {}).values()):
        found.append(_confidence(result))
    if any(layer.kl is not None for layer in result.layers):
        # A plot of many layers that would stand alone in its line takes the whole of it.
        layers = sum(layer.kind == "layer" for layer in result.layers)
        found.append(_depth(result, layers if len(found) % 2 == 0 else 0))
    return found + _maps(result)


def _perplexity(result: RunResult, corpus: str) -> Picture:
    arms = sum(corpus in scores for scores in result.arms.values())
    svg = plots.picture(f"ppl-{corpus}", 0.9 + 0.34 * arms, plots.perplexities(result, corpus))
    paired = (
        " To the right the change on the same windows: pairing removes what all arms share, so its"
        " error is the smaller one; arms far beyond are named at the edge."
        if result.reference
        else ""
    )
    caption = f"Left, perplexity with its standard error over windows.{paired}"
    return Picture(title=f"Perplexity on {corpus}", caption=caption, svg=Markup(svg))


def _histogram(result: RunResult) -> Picture:
    return Picture(
        title="Change by window",
        caption=(
            f"Each window's perplexity, {result.subject} against {result.reference}; the outermost"
            " bars take in what lies beyond. A long right tail means that some texts are hurt."
        ),
        svg=Markup(plots.picture("windows", 2.9, plots.window_changes(result))),
    )


def _confidence(result: RunResult) -> Picture:
    return Picture(
        title="KL by token confidence",
        caption=(
            f"Mean KL({result.reference} ‖ {result.subject}) of tokens by how sure"
            f" {result.reference} is. Loss on sure tokens is the kind that users see."
        ),
        svg=Markup(plots.picture("confidence", 3.4, plots.confidence(result))),
    )


def _depth(result: RunResult, layers: int) -> Picture:
    caption = (
        f"Mean KL({result.reference} ‖ {result.subject}) if the model ended behind this layer:"
        " final norm and head on the hidden states there, for some of the in-domain tokens. A step"
        " points at the layer that makes it."
    )
    width = plots.WIDTH * min(2.0, max(1.0, layers / FEW_LAYERS))
    svg = plots.picture("depth", 2.9, plots.depth(result), width)
    return Picture(title="KL by layer depth", caption=caption, svg=Markup(svg), inches=width)


def _maps(result: RunResult) -> list[Picture]:
    found = []
    for name, title, drawn, caption in MAPS:
        if (made := drawn(result)) is not None:
            width, height, draw = made
            svg = Markup(plots.picture(name, height, draw, width))
            found.append(Picture(title=title, caption=caption, svg=svg, inches=width))
    return found


def _linears(result: RunResult) -> Linears:
    """The columns that some linear fills."""
    found = [(linear.name, _told(linear)) for linear in linears(result)]
    used = [title for title in _told(LinearResult(name="")) if any(row[title] for _, row in found)]
    return Linears(
        columns=[(title, title not in ("grid", "fallback")) for title in used],
        rows=[(name, [row[title] for title in used]) for name, row in found],
    )


def _told(linear: LinearResult) -> dict[str, str]:
    kept = linear.survival or Survival()
    return {
        "bits": _formatted(linear.bits, "d"),
        "group": _formatted(linear.group_size, "d"),
        "grid": linear.grid or "",
        "error": _formatted(linear.error, ".2e"),
        "survival": _formatted(kept.survival, ".3f"),
        "noise": _formatted(kept.noise, ".3g"),
        "update of a step": _formatted(kept.step_ratio, ".3g"),
        "base's error / adapter's effect": _formatted(kept.error_ratio, ".3g"),
        "codes changed": _formatted(kept.codes_changed, ".1%"),
        "damping": _formatted(linear.damping, ".3g"),
        "fallback": linear.fallback or "",
    }


def _formatted(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _worst(result: RunResult) -> list[Passage]:
    darkest = _darkest(result)
    return [
        Passage(corpus, window, [(p, _strength(p.kl, darkest)) for p in window.pieces])
        for corpus, found in result.worst.items()
        for window in found
    ]


def _scale(result: RunResult) -> list[tuple[int, float]]:
    """Strengths of marks and the KL that each stands for."""
    darkest = _darkest(result)
    return [(mark, darkest * (mark / STRONGEST) ** 2) for mark in (15, 40, STRONGEST)]


def _darkest(result: RunResult) -> float:
    windows = [window for found in result.worst.values() for window in found]
    found = [piece.kl for window in windows for piece in window.pieces if piece.kl is not None]
    return max((kl for kl in found if math.isfinite(kl)), default=0.0)


def _strength(kl: float | None, darkest: float) -> int:
    """The mark of a token in per cent; the root leaves smaller losses visible beside large."""
    if kl is None or not kl > 0 or not darkest > 0:
        return 0
    return round(STRONGEST * math.sqrt(min(1.0, kl / darkest)))


def _texts(result: RunResult) -> list[Any]:
    first = [result.corpora.calibration] if result.corpora.calibration is not None else []
    return [*first, *result.corpora.evaluation.values()]


def _plain(value: Any) -> Any:
    """Paths and tuples of a recipe as YAML's own types; unset options say nothing."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else str(value)
