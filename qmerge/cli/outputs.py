"""Files that a command writes beside its answer, and what a continuous integration is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qmerge.cli.options import Flag
from qmerge.errors import RecipeError, StorageError

if TYPE_CHECKING:
    from qmerge.report.checks import Checked
    from qmerge.results import RunResult

F = TypeVar("F", bound=Callable[..., Any])
SUMMARY = "GITHUB_STEP_SUMMARY"


def file_option(flag: str, name: str, help: str) -> Callable[[F], F]:
    """A file to be written; refused before any work where it cannot be."""
    return click.option(
        flag,
        name,
        cls=Flag,
        metavar="FILE",
        type=click.Path(path_type=Path),
        callback=_writable,
        help=f"{help}  [default: none]",
    )


def _writable(_: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    if file is None:
        return file
    from qmerge.reread import is_of_release

    if is_of_release(file):
        raise RecipeError(
            f"{option.opts[0]}: {file} would be in a release, which would not be verified with it",
            hint="name a file elsewhere",
        )
    if file.exists() and not file.is_dir():
        return file
    folder = Path(os.path.realpath(file)).parent if file.is_symlink() else file.parent
    if file.is_dir() or not folder.is_dir():
        why = "is a folder" if file.is_dir() else f"there is no folder {folder}"
        hint = "name a file in it" if file.is_dir() else "make it first, or name another file"
        raise RecipeError(f"{option.opts[0]}: {file}: {why}", hint=hint)
    return file


def ci_options(command: F) -> F:
    """--junit and --github."""
    command = click.option(
        "--github",
        cls=Flag,
        is_flag=True,
        help="Tell GitHub Actions: a job summary, and an annotation for each limit that fell.",
    )(command)
    return file_option("--junit", "junit", "Write the checks as JUnit XML.")(command)


def log_option(command: F) -> F:
    """--log-json."""
    help = "Write what is shown of the progress as JSON, an event a line."
    return file_option("--log-json", "log_json", help)(command)


def finish(
    result: RunResult, as_json: bool, junit: Path | None = None, github: bool = False
) -> int:
    """Print what was measured, tell those who asked, and say whether all limits hold."""
    from qmerge.report import render

    click.echo(render(result, "json" if as_json else "text").rstrip())
    if junit is not None or github:
        from qmerge.report.checks import of_result

        tell(of_result(result), junit, github)
    return 0 if all(verdict.passed for verdict in result.gate) else 1


def tell(checked: Checked, junit: Path | None, github: bool) -> None:
    """Write what was asked for; the annotations go to stderr, where GitHub reads them as well."""
    if junit is not None:
        from qmerge.report.junit import render

        write(junit, render(checked))
    if github:
        from qmerge.report.github import commands, summary

        print(commands(checked), end="", file=sys.stderr, flush=True)
        if os.environ.get(SUMMARY):
            _append(Path(os.environ[SUMMARY]), summary(checked))


def write(file: Path, text: str) -> None:
    """The whole text, or no file."""
    from qmerge.storage.shards import write_out

    write_out(file, text)


def _append(file: Path, text: str) -> None:
    try:
        with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
    except OSError as error:
        raise StorageError(f"${SUMMARY}: {file}: {error.strerror}") from error
