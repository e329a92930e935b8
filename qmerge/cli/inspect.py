"""qmerge inspect: what is this folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qmerge.cli.options import Command, json_option
from qmerge.cli.progress import chatter_to_stderr


@click.command("inspect", cls=Command)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def command(folder: Path, as_json: bool) -> None:
    """What a folder holds: a base, an original, an adapter or a release.

    Tells the format, bits, group size and layers of a model, and the kind, rank and targets of an
    adapter, from headers alone.
    """
    with chatter_to_stderr():
        from qmerge.inspect import inspect

        facts = inspect(folder)

    click.echo(json.dumps(facts, indent=2) if as_json else table(facts))


def table(facts: Mapping[str, Any]) -> str:
    """A line per fact; what is unknown or empty is left out."""
    unsaid: tuple[Any, ...] = (None, "", [], {})
    known = {name.replace("_", " "): value for name, value in facts.items() if value not in unsaid}
    width = max(map(len, known), default=0)
    return "\n".join(f"{name:<{width}}  {_words(value)}" for name, value in known.items())


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    if isinstance(value, float):
        return f"{value:.5g}"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
