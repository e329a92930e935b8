"""qmerge verify: open a release again and prove it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qmerge.cli.options import Command, Flag, json_option
from qmerge.cli.progress import display
from qmerge.errors import RecipeError

if TYPE_CHECKING:
    from qmerge.verify import Against, Verification

FOLDER = click.Path(path_type=Path)


@click.command("verify", cls=Command)
@click.argument("release", type=FOLDER)
@click.option(
    "--against",
    "pair",
    cls=Flag,
    nargs=2,
    metavar="BASE ADAPTER",
    type=FOLDER,
    help="Prove the weights from the base and the adapter it was made of.  [default: none]",
)
@click.option(
    "--against-base",
    "base",
    cls=Flag,
    metavar="DIR",
    type=FOLDER,
    help="The base alone, where there was no adapter or more than one.  [default: none]",
)
@click.option(
    "--against-adapter",
    "adapters",
    cls=Flag,
    metavar="DIR",
    type=FOLDER,
    multiple=True,
    help="The adapter that was merged; of several each, in their order.  [default: none]",
)
@click.option(
    "--original",
    cls=Flag,
    metavar="DIR",
    type=FOLDER,
    help="The original, where the adapter was merged onto it.  [default: none]",
)
@click.option(
    "--load",
    cls=Flag,
    is_flag=True,
    help="Load it in transformers or gptqmodel (extra: verify) and score a sample again.",
)
@click.option(
    "--trust-remote-code",
    cls=Flag,
    is_flag=True,
    help="Run model code that comes with the release.",
)
@json_option
def command(
    release: Path,
    pair: tuple[Path, Path] | None,
    base: Path | None,
    adapters: tuple[Path, ...],
    original: Path | None,
    load: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> int:
    """Open RELEASE again and prove what it claims.

    Each check has a name and a sentence. Without options: digests, index, every weight decoded,
    names, shapes, settings and tokenizer, and what transformers and vLLM demand. The exit code is
    1 where a check failed.
    """
    if pair is not None:
        if base is not None or adapters:
            raise RecipeError("--against names base and adapter; leave out --against-base")
        base, adapters = pair[0], (pair[1],)

    with display() as progress:
        from qmerge.verify import verify

        found = verify(
            release,
            against=_against(base, adapters, original),
            load=load,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )

    click.echo(_json(found) if as_json else table(found))
    if found.failed:
        print(f"error: failed: {', '.join(dict.fromkeys(found.failed))}", file=sys.stderr)
    return 1 if found.failed else 0


def _against(
    base: Path | None, adapters: tuple[Path, ...], original: Path | None
) -> Against | None:
    from qmerge.verify import Against

    if base is None:
        if adapters or original is not None:
            raise RecipeError(
                "missing: --against-base",
                hint="a proof begins with the base: --against BASE ADAPTER",
            )
        return None
    return Against(base=base, adapters=adapters, original=original)


def table(found: Verification) -> str:
    """A line per check: outcome, name, sentence."""
    from qmerge.report.figures import printable

    width = max(len(check.name) for check in found.checks)
    lines = (f"{c.outcome}  {c.name:<{width}}  {c.text}" for c in found.checks)
    return printable("\n".join(lines))


def _json(found: Verification) -> str:
    from qmerge.results import encode

    return json.dumps({**encode(found), "failed": list(dict.fromkeys(found.failed))}, indent=2)
