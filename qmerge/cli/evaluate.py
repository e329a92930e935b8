"""qmerge evaluate: checkpoints side by side."""

from __future__ import annotations

from pathlib import Path

import click

from qmerge.cli.options import Command, json_option, recipe_options
from qmerge.cli.outputs import ci_options, finish, log_option
from qmerge.cli.progress import display
from qmerge.options import build
from qmerge.recipe import EvaluateRecipe


@click.command("evaluate", cls=Command)
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]DIR[+ADAPTER]...")
@recipe_options(EvaluateRecipe)
@log_option
@ci_options
@json_option
def command(
    models: tuple[str, ...],
    as_json: bool,
    junit: Path | None,
    github: bool,
    log_json: Path | None,
    **flags: object,
) -> int:
    """Score checkpoints side by side on the same tokens.

    Each is a folder, with an adapter live on top where one is named after a plus sign; NAME is
    what the table calls it, by default the folder's name. Limits are for every checkpoint but the
    reference; where one falls or scores are not finite, the exit code is 1.
    """
    asked = build(EvaluateRecipe, {**flags, "models": models})

    with display(log_json) as progress:
        from qmerge.evaluate import evaluate

        result = evaluate(asked, progress)

    return finish(result, as_json, junit, github)
