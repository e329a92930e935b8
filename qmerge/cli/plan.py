"""qmerge plan: what run would do, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qmerge.cli.options import Command, json_option, recipe_options
from qmerge.cli.progress import chatter_to_stderr
from qmerge.options import build
from qmerge.recipe import Recipe


@click.command("plan", cls=Command)
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@recipe_options(Recipe)
@json_option
def command(recipe: Path | None, as_json: bool, **flags: object) -> int:
    """What `qmerge run` would do, and all faults at once.

    Takes the arguments of run, reads headers only and writes nothing. Lists the work layer by
    layer, the bytes in and out, the memory and disk needed, and every fault found; the exit code
    is 1 if there is one.
    """
    asked = build(Recipe, flags, file=recipe)

    with chatter_to_stderr():
        from qmerge.plan import make_plan

        plan = make_plan(asked)

    from qmerge.report.plan import render
    from qmerge.results import encode

    click.echo(json.dumps(encode(plan.summary), indent=2) if as_json else render(plan.summary))
    return 1 if plan.faults else 0
