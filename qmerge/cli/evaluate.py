"""qmerge evaluate: checkpoints side by side."""

from __future__ import annotations

import click

from qmerge.cli.options import Command, recipe_options
from qmerge.cli.outputs import Outputs, with_outputs
from qmerge.cli.progress import display
from qmerge.options import build
from qmerge.recipe import EvaluateRecipe


@click.command("evaluate", cls=Command)
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]DIR[+ADAPTER]...")
@recipe_options(EvaluateRecipe)
@with_outputs
def command(models: tuple[str, ...], outputs: Outputs, **flags: object) -> int:
    """Score checkpoints side by side on the same tokens.

    Each is a folder, with an adapter live on top where one is named after a plus sign; NAME is
    what the table calls it, by default the folder's name. Limits are for every checkpoint but the
    reference; where one falls or scores are not finite, the exit code is 1.
    """
    asked = build(EvaluateRecipe, {**flags, "models": models})

    with display(outputs.log_json) as progress:
        from qmerge.evaluate import evaluate

        result = evaluate(asked, progress)

    return outputs.finish(result)
