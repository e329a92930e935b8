"""qmerge dequantize: a base as a dense checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from qmerge.cli.export import dtype_option, write_dense
from qmerge.cli.options import Command, json_option, recipe_options
from qmerge.options import build
from qmerge.recipe import Dtype, Recipe


@click.command("dequantize", cls=Command)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@dtype_option
@recipe_options(Recipe, only=("trust_remote_code",))
@json_option
def command(base: Path, out: Path, dtype: Dtype | None, as_json: bool, **flags: object) -> None:
    """Write a base as a dense checkpoint.

    BASE is decoded as its own runtime decodes it and written to OUT, one layer at a time.
    """
    write_dense(build(Recipe, {**flags, "base": base, "out": out}), dtype, as_json)
