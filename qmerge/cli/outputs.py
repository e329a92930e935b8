"""Files that a command writes beside its answer, and what a continuous integration is told."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qmerge.cli.options import Flag, json_option
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


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a command's answer goes, by the options of `with_outputs`."""

    as_json: bool = False
    junit: Path | None = None
    github: bool = False
    log_json: Path | None = None

    def finish(self, result: RunResult) -> int:
        """Print what was measured, tell those who asked, and say whether all limits hold."""
        from qmerge.report import render

        click.echo(render(result, "json" if self.as_json else "text").rstrip())
        if self.junit is not None or self.github:
            from qmerge.report.checks import of_result

            self.tell(of_result(result))
        return 0 if all(verdict.passed for verdict in result.gate) else 1

    def tell(self, checked: Checked) -> None:
        """Write what was asked for; annotations go to stderr, where GitHub reads them as well."""
        if self.junit is not None:
            from qmerge.report.junit import render

            write(self.junit, render(checked))
        if self.github:
            from qmerge.report.github import commands, summary

            print(commands(checked), end="", file=sys.stderr, flush=True)
            if os.environ.get(SUMMARY):
                _append(Path(os.environ[SUMMARY]), summary(checked))


def with_outputs(command: Callable[..., int]) -> Callable[..., int]:
    """--log-json, --junit, --github and --json, which the command gets as `outputs`."""

    @functools.wraps(command)
    def wrapped(
        *, as_json: bool, junit: Path | None, github: bool, log_json: Path | None, **given: Any
    ) -> int:
        outputs = Outputs(as_json=as_json, junit=junit, github=github, log_json=log_json)
        return command(outputs=outputs, **given)

    told = "Tell GitHub Actions: a job summary, and an annotation for each limit that fell."
    log = "Write what is shown of the progress as JSON, an event a line."
    for option in (
        json_option,
        click.option("--github", cls=Flag, is_flag=True, help=told),
        file_option("--junit", "junit", "Write the checks as JUnit XML."),
        file_option("--log-json", "log_json", log),
    ):
        wrapped = option(wrapped)
    return wrapped


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
