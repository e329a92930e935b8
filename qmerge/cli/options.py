"""Recipe fields as flags, and a help page that shows them by section."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import MISSING
from typing import Any, TypeVar

import click

from qmerge.options import NBYTES, SECTIONS, SWITCH, Option, options

F = TypeVar("F", bound=Callable[..., Any])

MERGING = ("base_quant", "combine", "density", "only", "exclude", "partial_state", "allow_noop")
"""What a recipe says of a merge beside the folders."""
OTHER = "Other"  # the section of what belongs to the command and not to the recipe


class Flag(click.Option):
    """A click option that knows its section of the help page."""

    def __init__(self, *args: Any, section: str = OTHER, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A click command whose help page groups its options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {name: [] for name in (*SECTIONS, OTHER)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                rows[getattr(parameter, "section", OTHER)].append(record)
        for name, records in rows.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def recipe_options(
    recipe: type[Any], *, without: Container[str] = (), only: Container[str] | None = None
) -> Callable[[F], F]:
    """One flag per field of the recipe class; a flag that was not given is passed as None."""

    def wrap(command: F) -> F:
        for each in reversed(options(recipe)):
            if each.name not in without and (only is None or each.name in only):
                command = _flag(each)(command)
        return command

    return wrap


def json_option(command: F) -> F:
    """--json: the result on stdout is for a program."""
    return click.option(
        "--json", "as_json", cls=Flag, is_flag=True, help="Print the result as JSON."
    )(command)


def _flag(each: Option) -> Callable[[F], F]:
    common: dict[str, Any] = {"cls": Flag, "section": each.section, "default": None}
    common["help"] = f"{each.help}  [{_note(each)}]"
    if each.kind is SWITCH:
        return click.option(each.flag, each.name, is_flag=True, **common)
    if each.kind.many:  # click says () where a flag was not given
        common |= {"multiple": True, "callback": lambda _, __, given: given or None}
    return click.option(each.flag, each.name, metavar=each.kind.metavar, **common)


def _note(each: Option) -> str:
    return "required" if each.default is MISSING else f"default: {each.unset or _shown(each)}"


def _shown(each: Option) -> str:
    if each.kind is NBYTES:
        return f"{each.default >> 30}GiB"
    if each.kind is SWITCH:
        return "on" if each.default else "off"
    return str(each.default)
