"""qmerge merge: a base with its adapters merged, as a dense checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from qmerge.cli.export import dtype_option, write_dense
from qmerge.cli.options import MERGING, Command, json_option, recipe_options
from qmerge.errors import RecipeError
from qmerge.options import build
from qmerge.recipe import Dtype, Recipe


@click.command("merge", cls=Command)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapter", nargs=-1, metavar="ADAPTER[@WEIGHT]...")
@click.argument("out", type=click.Path(path_type=Path))
@dtype_option
@recipe_options(Recipe, only=(*MERGING, "seed", "trust_remote_code"))
@json_option
def command(
    base: Path,
    adapter: tuple[str, ...],
    out: Path,
    dtype: Dtype | None,
    as_json: bool,
    **flags: object,
) -> None:
    """Merge adapters into a base, dense.

    Each ADAPTER is merged into the decoded BASE in float32, on the result of the one before, and
    the result is written to OUT: what to go on training from, or to quantize with something else.
    """
    asked = build(Recipe, {**flags, "base": base, "adapter": adapter, "out": out})
    if not asked.adapter and asked.partial_state is None:
        raise RecipeError(
            "missing: ADAPTER or OUT: the last argument is the output folder",
            hint="`qmerge dequantize` is for a base without an adapter",
        )
    write_dense(asked, dtype, as_json)
