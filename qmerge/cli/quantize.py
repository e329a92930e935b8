"""qmerge quantize: plain GPTQ of a model that needs no adapter."""

from __future__ import annotations

from pathlib import Path

import click

from qmerge.cli.options import MERGING, Command, recipe_options
from qmerge.cli.outputs import Outputs, with_outputs
from qmerge.cli.progress import display
from qmerge.options import build
from qmerge.recipe import Recipe

GIVEN = ("base", "adapter", "out", "original", "strategy", "force")
OF_ADAPTERS = (*MERGING, "unit_survival", "min_survival")
"""Options that are about an adapter; here is no adapter."""


@click.command("quantize", cls=Command)
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@recipe_options(Recipe, without=(*GIVEN, *OF_ADAPTERS))
@with_outputs
def command(dense: Path, out: Path, outputs: Outputs, **flags: object) -> int:
    """Quantize a model with GPTQ, and measure what that cost.

    DENSE is any model folder that qmerge reads; the release is written to OUT with its report.
    """
    asked = build(Recipe, {**flags, "base": dense, "out": out})

    with display(outputs.log_json) as progress:
        from qmerge.pipeline import run

        result = run(asked, progress)

    return outputs.finish(result)
