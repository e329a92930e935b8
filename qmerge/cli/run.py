"""qmerge run: the main job."""

from __future__ import annotations

from pathlib import Path

import click

from qmerge.cli.options import Command, recipe_options
from qmerge.cli.outputs import Outputs, with_outputs
from qmerge.cli.progress import display
from qmerge.errors import RecipeError
from qmerge.options import made, said
from qmerge.recipe import Recipe


@click.command("run", cls=Command)
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@recipe_options(Recipe)
@with_outputs
def command(recipe: Path | None, outputs: Outputs, **flags: object) -> int:
    """Merge, requantize, and measure what that cost.

    RECIPE is a YAML file whose keys are the options below with underscores (symmetric: true for
    --sym, exclude for --except); flags win over it. The release, its report and the recipe that
    makes it again are written to --out; the table of arms goes to stdout. Where a limit of the
    gate falls, scores are not finite, or the merged model is not the one that was trained, they
    stay, and the exit code is 1. A RECIPE that says adapter: [], as that of a `qmerge quantize`
    release does, is for a model without one.
    """
    given = said(Recipe, flags, file=recipe)
    asked = made(Recipe, given)
    if given.keys().isdisjoint(("adapter", "partial_state")):
        raise RecipeError("missing: --adapter", hint="`qmerge quantize` is for models without one")

    with display(outputs.log_json) as progress:
        from qmerge.pipeline import run

        result = run(asked, progress)

    return outputs.finish(result)
