"""What the commands with a dense result share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from qmerge.cli.options import Flag
from qmerge.cli.progress import display
from qmerge.recipe import Dtype, Recipe

F = TypeVar("F", bound=Callable[..., Any])


def dtype_option(command: F) -> F:
    """--dtype: what the dense weights are rounded to."""
    return click.option(
        "--dtype",
        cls=Flag,
        type=click.Choice(get_args(Dtype)),
        help="Dtype of the weights.  [default: the model's own 16-bit dtype]",
    )(command)


def write_dense(recipe: Recipe, dtype: Dtype | None, as_json: bool) -> None:
    """Export with progress on stderr, and say on stdout what was written."""
    with display() as progress:
        from qmerge.export import export

        written = export(recipe, dtype=dtype, progress=progress)
        for note in written["notes"]:
            progress.warn(note)
    if as_json:
        click.echo(json.dumps(written, indent=2))
        return
    from qmerge.report.figures import size

    merged = f"{len(written['merged'])} merged, " if written["merged"] else ""
    click.echo(
        f"{written['out']}: {written['tensors']} tensors of {written['source_format']} as "
        f"{written['dtype']}, {merged}{size(written['bytes'])}"
    )
