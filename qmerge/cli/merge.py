"""qmerge merge: a base with its adapter merged, as a dense checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from qmerge.cli.export import Dtype, dtype_option, remote_code_option, write_dense
from qmerge.cli.options import Command, json_option


@click.command("merge", cls=Command)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@dtype_option
@remote_code_option
@json_option
def command(
    base: Path, adapter: Path, out: Path, dtype: Dtype, trust_remote_code: bool, as_json: bool
) -> None:
    """Merge an adapter into a base, dense.

    ADAPTER is merged into the decoded BASE in float32, and the result is written to OUT: what to
    go on training from, or to quantize with something else.
    """
    write_dense(base, adapter, out, dtype, trust_remote_code, as_json)
