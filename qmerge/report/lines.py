"""What stands below the verdict and beside the tables, a line each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from statistics import median

from qmerge.names import listed
from qmerge.report.figures import change_phrase, printable, size
from qmerge.report.verdict import GOOD
from qmerge.results import DOUBT, UNPROVEN, LinearResult, RunResult, StrategyResult, Survival

# A linear is pointed at when its error is this far above that of its like in other layers: in a
# healthy release the o_proj of a first layer was at 8, and two bits fewer cost about 25.
LOUD = 12.0
# It also has to be this share of the output's power: what is less is heard nowhere.
HEARD = 0.01
# Names in a line before it says how many more there are.
NAMED = 6


def findings(result: RunResult) -> list[str]:
    """Lines under the verdict: where it hurts, and what would help."""
    lines = []
    weak = weakest(result)
    if weak is not None and weak.survival is not None and _kept(weak) < GOOD["survival"]:
        lines.append(f"Weakest linear: {weak.name}, {survival_phrase(weak.survival)}.")
    for linear, times in loud(result)[:3]:
        bits = f" ({linear.bits} bits)" if linear.bits else ""
        lines.append(f"Largest error: {linear.name}{bits}, {times:.1f} times that of its like.")
    for remedy in result.remedies:
        count = f"{len(remedy.where)} linears" if len(remedy.where) != 1 else "1 linear"
        cost = f"{size(remedy.extra_bytes)} more" if remedy.extra_bytes else "no more bytes"
        lines.append(
            f"Would help: {remedy.option} "
            f"({count}: survival at least {remedy.survival:.3f}, {cost})."
        )
    return lines


def merge_lines(result: RunResult) -> list[str]:
    """How near the merge came to the live adapter, and what was not merged."""
    lines = []
    if result.merge is not None:
        found = result.merge
        lines.append(
            f"merge: within {found.worst:.1e} of the live adapter in every layer"
            f" (farthest: {found.where}), {found.dtype} rounds by {found.rounding:.1e}"
        )
    if result.left_out:
        lines.append(f"left as the base has it: {listed(result.left_out, NAMED)}")
    return lines


def gate_lines(result: RunResult) -> list[str]:
    """How many limits hold, and each one that does not."""
    if not result.gate:
        return []
    fallen = [gate.text for gate in result.gate if not gate.passed]
    held = len(result.gate) - len(fallen)
    return [f"{held} of {len(result.gate)} limits hold", *(f"FAILED {text}" for text in fallen)]


def previous_lines(result: RunResult) -> list[str]:
    """The change from the previous release, per corpus."""
    return [
        f"perplexity {change_phrase(change)} on {corpus} since the previous release"
        for corpus, change in result.change_from_previous.items()
    ]


def doubts(result: RunResult) -> list[str]:
    """Warnings that are about the reference itself, for right below the verdict."""
    return [line for line in result.warnings if DOUBT in line]


def warnings(result: RunResult) -> list[str]:
    """All others."""
    return [line for line in result.warnings if DOUBT not in line]


def pressing(result: RunResult) -> list[str]:
    """Warnings but those that need not be told at the end of a run too."""
    return [line for line in result.warnings if UNPROVEN not in line]


def survival_phrase(survival: Survival | None) -> str:
    """ "survival 0.985, noise 0.123, update 0.076 of a step, 15.0% of codes changed"."""
    if survival is None or survival.survival is None:
        return "not measured"
    parts = [f"survival {survival.survival:.3f}"]
    if survival.noise is not None:
        parts.append(f"noise {survival.noise:.3g}")
    if survival.step_ratio is not None:
        parts.append(f"update {survival.step_ratio:.3g} of a step")
    if survival.codes_changed is not None:
        parts.append(f"{100 * survival.codes_changed:.1f}% of codes changed")
    return ", ".join(parts)


def error_ratio_phrase(result: RunResult) -> str:
    """What quantizing the base cost in units of the adapter's effect; "" without an original."""
    whole = result.survival.error_ratio if result.survival else None
    if whole is None:
        return ""
    found = [
        (layer.survival.error_ratio, layer.name)
        for layer in result.layers
        if layer.survival is not None and layer.survival.error_ratio is not None
    ]
    (least, first), (most, last) = min(found), max(found)
    span = f", by layer {least:.3g} ({first}) to {most:.3g} ({last})" if len(found) > 1 else ""
    return f"the base's quantization error is {whole:.3g} of the adapter's effect{span}"


def strategy_told(result: RunResult) -> StrategyResult | None:
    """What was merged onto and why; None where nothing was merged."""
    return None if result.command == "quantize" else result.strategy


def weakest(result: RunResult) -> LinearResult | None:
    """The linear that kept the least of its update."""
    seen = [x for x in linears(result) if x.survival and x.survival.survival is not None]
    return min(seen, key=_kept, default=None)


def _kept(linear: LinearResult) -> float:
    kept = linear.survival.survival if linear.survival else None
    return math.inf if kept is None else kept


def loud(result: RunResult) -> list[tuple[LinearResult, float]]:
    """Linears whose error stands out from that of their like, and how many times, worst first."""
    measured = [(linear, linear.error) for linear in linears(result) if linear.error is not None]
    found = []
    for linear, error in measured:
        others = [(other, value) for other, value in measured if other is not linear]
        kind = projection(linear.name)
        peers = [value for other, value in others if projection(other.name) == kind]
        if len(peers) < 2:
            peers = [value for _, value in others]
        usual = median(peers) if peers else 0.0
        if usual > 0 and error > max(LOUD * usual, HEARD):
            found.append((linear, error / usual))
    return sorted(found, key=lambda pair: -pair[1])


def linears(result: RunResult) -> Iterator[LinearResult]:
    for layer in result.layers:
        yield from layer.linears


def projection(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def pieces_of(text: str, options: Iterable[str]) -> list[tuple[str, bool]]:
    """A line in pieces, and which of them are options to be pasted; a backtick would end one."""
    found = [printable(option) for option in options if option and "`" not in option]
    if not found:
        return [(text, False)]
    parts = re.split(f"({'|'.join(map(re.escape, found))})", printable(text))
    return [(part, part in found) for part in parts if part]
