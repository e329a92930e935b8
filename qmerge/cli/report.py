"""qmerge report: draw again what a run measured."""

from __future__ import annotations

from pathlib import Path

import click

from qmerge.cli.options import Command, Flag
from qmerge.cli.outputs import file_option, write


@click.command("report", cls=Command)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    cls=Flag,
    type=click.Choice(["text", "md", "json", "html"]),
    default="text",
    help="How it is drawn; html is one file with plots.  [default: text]",
)
@file_option("--out", "out", "Write it there and not to stdout.")
def command(run: Path, form: str, out: Path | None) -> None:
    """Draw the report of a finished run again.

    RUN is a release, or a qmerge_report.json alone: everything is drawn from that file.
    """
    from qmerge.report import render
    from qmerge.reread import read_report

    drawn = render(read_report(run), form)
    if out is None:
        click.echo(drawn.rstrip())
    else:
        write(out, drawn)
