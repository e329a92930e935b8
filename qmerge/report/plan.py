"""A plan as text: what would be done, unit by unit, and all that stands against it."""

from __future__ import annotations

from qmerge.names import listed
from qmerge.report.figures import duration, size
from qmerge.report.lines import NAMED
from qmerge.results import PlannedUnit, PlanSummary

HEAD = ("unit", "quantized", "dense", "adapted", "in", "out")


def render(plan: PlanSummary) -> str:
    """Plain text; the faults last, where the eye ends."""
    lines = [
        f"{label:<12}{value}"
        for label, value in (
            ("base", plan.base),
            ("adapter", plan.adapter),
            ("original", plan.original),
            ("out", plan.out),
            ("strategy", " and ".join(plan.strategies)),
            ("quantizer", plan.quantizer),
            ("limits", ", ".join(plan.limits)),
        )
        if value
    ]
    lines += [f"{'text':<12}{corpus}" for corpus in plan.corpora]
    if plan.units:
        lines += ["", *_table(plan.units), "", *_needs(plan)]
    if plan.renamed:
        told = (f"{name} -> {target}" for name, target in plan.renamed.items())
        shown = listed(told, NAMED)
        lines.append(f"note: {len(plan.renamed)} tensors of training are named otherwise: {shown}")
    if plan.left_out:
        lines.append(f"note: left as the base has it: {listed(plan.left_out, NAMED)}")
    lines += [f"note: {note}" for note in (plan.goes_on, *plan.notes) if note]
    for fault, hint in zip(plan.faults, plan.hints, strict=True):
        lines.append(f"fault: {fault}")
        if hint:
            lines.append(f"  hint: {hint}")
    return "\n".join(lines)


def _table(units: tuple[PlannedUnit, ...]) -> list[str]:
    rows = [HEAD] + [
        (
            unit.label,
            str(unit.quantized),
            str(unit.dense),
            str(unit.adapted),
            size(unit.bytes_in),
            size(unit.bytes_out),
        )
        for unit in units
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]


def _needs(plan: PlanSummary) -> list[str]:
    return [
        f"reads {size(plan.bytes_in)}, writes {size(plan.bytes_out)}",
        needs(plan),
        f"calibration: {plan.at_once} windows at once, "
        + ("one forward of each layer" if plan.waiting else "a forward for each group of linears"),
    ]


def needs(plan: PlanSummary) -> str:
    """Time, memory and disk in one line."""
    whole = sum(plan.seconds.values())
    most, part = max((share, name) for name, share in plan.seconds.items())
    device = f" and {size(plan.device_bytes)} on {plan.device}" if plan.device_bytes else ""
    return (
        f"takes about {duration(whole)} on this machine ({100 * most / whole:.0f}% {part}), "
        f"{size(plan.memory_bytes)} of memory beside the libraries{device}, "
        f"{size(plan.disk_bytes)} of disk while it runs"
    )
