"""qmerge compare: is a new release as good as an old one."""

from __future__ import annotations

import json

import click

from qmerge.cli.options import Command, recipe_options
from qmerge.cli.outputs import Outputs, with_outputs
from qmerge.cli.progress import display
from qmerge.options import build
from qmerge.recipe import CompareRecipe


@click.command("compare", cls=Command)
@click.argument("old")
@click.argument("new")
@recipe_options(CompareRecipe)
@with_outputs
def command(old: str, new: str, outputs: Outputs, **flags: object) -> int:
    """Say whether NEW is better or worse than OLD, or no different beyond noise.

    Both are releases, or their qmerge_report.json, that were scored on the same text; with --eval
    they are model folders (an adapter after a plus sign), scored side by side. Windows are paired;
    text that differs is refused. The exit code is 1 where NEW is worse on a text, was not scored on
    one that OLD was, or a limit falls. Perplexity is limited against OLD; KL, same top token and
    survival against what NEW was measured against: its trained model, with --eval OLD.
    """
    asked = build(CompareRecipe, {**flags, "old": old, "new": new})

    with display(outputs.log_json) as progress:
        from qmerge.compare import compare

        found = compare(asked, progress)

    from qmerge.report.checks import of_comparison
    from qmerge.results import encode

    checked = of_comparison(found.comparison, found.new)
    if outputs.as_json:
        answer = {**encode(found.comparison), "gate": encode(found.new.gate)}
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo(checked.text.rstrip())
    outputs.tell(checked)
    return 0 if found.passed else 1
