"""qmerge dequantize: a base as a dense checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from qmerge.cli.export import Dtype, dtype_option, remote_code_option, write_dense
from qmerge.cli.options import Command, json_option


@click.command("dequantize", cls=Command)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@dtype_option
@remote_code_option
@json_option
def command(base: Path, out: Path, dtype: Dtype, trust_remote_code: bool, as_json: bool) -> None:
    """Write a base as a dense checkpoint.

    BASE is decoded as its own runtime decodes it and written to OUT, one layer at a time.
    """
    write_dense(base, None, out, dtype, trust_remote_code, as_json)
