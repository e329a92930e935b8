"""qmerge evaluate: checkpoints side by side."""

from __future__ import annotations

import click

from qmerge.cli.options import Command, json_option, recipe_options
from qmerge.cli.progress import display
from qmerge.options import build
from qmerge.recipe import EvaluateRecipe


@click.command("evaluate", cls=Command)
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]DIR[+ADAPTER]...")
@recipe_options(EvaluateRecipe)
@json_option
def command(models: tuple[str, ...], as_json: bool, **flags: object) -> None:
    """Score checkpoints side by side on the same tokens.

    Each is a folder, with an adapter live on top where one is named after a plus sign; NAME is
    what the table calls it, by default the folder's name.
    """
    asked = build(EvaluateRecipe, {**flags, "models": models})

    with display() as progress:
        from qmerge.evaluate import evaluate

        result = evaluate(asked, progress)

    from qmerge.report import render

    click.echo(render(result, "json" if as_json else "text").rstrip())
