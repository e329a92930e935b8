"""Options: a dataclass field that knows how it is read, from a flag and from a recipe file alike.

A value goes through the same reader from both, so that both refuse the same things in the same
words. Nothing here looks whether a path exists: that is the plan's.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from qmerge.errors import RecipeError

R = TypeVar("R")

SECTIONS = ("Models", "Text", "Quantizer", "Gate", "Machine")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`read` takes what the user wrote and raises ValueError with the end of a sentence."""

    metavar: str
    read: Callable[[object], Any]
    many: bool = False  # the flag may be repeated, the key holds a list
    write: Callable[[Any], object] = lambda value: value  # what `read` takes for that value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("is not a text")
    return value


def _path(value: object) -> Path:
    try:
        return Path(_text(str(value) if isinstance(value, Path) else value)).expanduser()
    except (ValueError, RuntimeError):  # expanduser of an unknown user
        raise ValueError("is not a path") from None


def _texts(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(_text(item) for item in items)


def _whole(value: object, *, least: int) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"is not a whole number of at least {least}")
    return value


def whole(least: int) -> Kind:
    return Kind(metavar="N", read=lambda value: _whole(value, least=least))


def _whole_or_all(value: object) -> int | Literal["all"]:
    if value == "all":
        return "all"
    try:
        return _whole(value, least=1)
    except ValueError as error:
        raise ValueError(f"{error}, nor 'all'") from None


def _fraction(value: object) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < 1:
        raise ValueError("is not a number between 0 and 1")
    return number


def _per_cent(value: object) -> bool:
    return isinstance(value, str) and value.strip().endswith("%")


def _share(value: object) -> float:
    """0.01 and "1%" are the same share."""
    per_cent = _per_cent(value)
    text = value.strip()[:-1] if isinstance(value, str) and per_cent else value
    try:
        number = float(text) if isinstance(text, str | int | float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise ValueError("is not a limit such as 1% or 0.01")
    return number / 100 if per_cent else number


MOST_SURVIVAL = 2.0  # an update may come out larger than it was, but not by much


def _part(value: object, *, most: float) -> float:
    """A share that cannot be above `most`; 95 for 95% is."""
    number = _share(value)
    if number <= most:
        return number
    if _per_cent(value) or number > 100 * most:
        raise ValueError(f"is {100 * number:g}%, and {100 * most:g}% is the most there can be")
    raise ValueError(f"is {100 * number:g}%; write {number:g}% or {number / 100:g}")


def _increase(value: object) -> float:
    """A share that may be above 1, but not by a slip: 1 for 1% is refused."""
    number = _share(value)
    if number < 1 or _per_cent(value):
        return number
    told = f"{100 * number:g}%"
    raise ValueError(f"is {told}: write {number:g}% for {number:g} per cent, {told} for that")


def _written_increase(number: float | None) -> float | str | None:
    return number if number is None or number < 1 else f"{100 * number:.15g}%"


LEAST_MEMORY = 1 << 20  # below it a unit has been forgotten
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def _nbytes(value: object) -> int:
    shape = r"(\d{1,15})(\.\d{1,9})?\s*([kmgt]?)(?:i?b)?"
    match = None if isinstance(value, bool) else re.fullmatch(shape, str(value), re.IGNORECASE)
    size = int(float(match[1] + (match[2] or "")) * _UNITS[match[3].lower()]) if match else 0
    if size < 1:
        raise ValueError("is not a size such as 4GiB or 800MiB")
    if size < LEAST_MEMORY:
        unit = "GiB" if size < 1 << 10 else "MiB"
        meant = f"; write {size}{unit}" if str(value).strip().isdigit() else ", less than 1MiB"
        raise ValueError(f"is {size} byte{'s' * (size != 1)}{meant}")
    return size


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    return value


def _device(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise ValueError("is not one of auto, cpu, cuda, cuda:N")
    return value


def choice(*allowed: str | int) -> Kind:
    by_text = {str(value): value for value in allowed}

    def read(value: object) -> str | int:
        if isinstance(value, bool) or str(value) not in by_text:
            raise ValueError(f"is not one of {', '.join(by_text)}")
        return by_text[str(value)]

    return Kind(metavar="|".join(by_text), read=read)


TEXT = Kind(metavar="TEXT", read=_text)
SPEC = Kind(metavar="SPEC", read=_text)
EVALS = Kind(metavar="[NAME=]SPEC", read=_texts, many=True)
PATTERNS = Kind(metavar="PATTERN", read=_texts, many=True)
ADAPTERS = Kind(metavar="DIR[@WEIGHT]", read=_texts, many=True)
OVERRIDES = Kind(metavar="PATTERN=SETTINGS", read=_texts, many=True)
BASE_QUANT = Kind(
    metavar="nf4|fp4|int8[,double][,block=N][,dtype=DTYPE][,skip=MODULE]|none", read=_text
)
FOLDER = Kind(metavar="DIR", read=_path)
FILE = Kind(metavar="FILE", read=_path)
WINDOWS = Kind(metavar="N|all", read=_whole_or_all)
FRACTION = Kind(metavar="X", read=_fraction)
SHARE = Kind(metavar="X|X%", read=_share)
PART = Kind(metavar="X|X%", read=lambda value: _part(value, most=1.0))
INCREASE = Kind(metavar="X|X%", read=_increase, write=_written_increase)
SURVIVAL = Kind(metavar="X|X%", read=lambda value: _part(value, most=MOST_SURVIVAL))
NBYTES = Kind(metavar="SIZE", read=_nbytes)
DEVICE = Kind(metavar="DEVICE", read=_device)
SWITCH = Kind(metavar="", read=_switch)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field as a flag and as a key. `unset` says in words what the default None means."""

    name: str
    default: Any
    kind: Kind
    section: str
    help: str
    flag: str
    unset: str | None
    transient: bool  # how to run, not what to make: a flag only, never a recipe key

    @property
    def required(self) -> bool:
        return self.default is MISSING

    def value(self, given: object, where: str) -> Any:
        """`given` as the field's type; RecipeError naming `where`."""
        try:
            return self.kind.read(given)
        except ValueError as error:
            raise RecipeError(f"{where}: {reprlib.repr(given)} {error}") from error


def option(
    default: Any,
    kind: Kind,
    section: str,
    help: str,
    *,
    flag: str | None = None,
    unset: str | None = None,
    transient: bool = False,
) -> Any:
    """A dataclass field that carries what the command line needs to know about it."""
    about = {"kind": kind, "section": section, "help": help}
    about |= {"flag": flag, "unset": unset, "transient": transient}
    return field(default=default, metadata=about)


def options(recipe: type[Any]) -> tuple[Option, ...]:
    """The fields of a recipe class, by section and in each section as declared."""

    def read(spec: Field[Any]) -> Option:
        meta = {**spec.metadata}
        meta["flag"] = meta["flag"] or "--" + spec.name.replace("_", "-")
        return Option(name=spec.name, default=spec.default, **meta)

    found = [read(spec) for spec in fields(recipe) if spec.metadata]
    return tuple(sorted(found, key=lambda each: SECTIONS.index(each.section)))


LARGEST_RECIPE = 1 << 16  # bytes; a recipe is a page, and YAML takes seconds on what is not


def build(recipe: type[R], flags: Mapping[str, object], *, file: Path | None = None) -> R:
    """The recipe of what is `said`; RecipeError, too, for required options that are missing."""
    return made(recipe, said(recipe, flags, file=file))


def said(
    recipe: type[Any], flags: Mapping[str, object], *, file: Path | None = None
) -> dict[str, Any]:
    """The values of a file and of flags, which win; a flag that is None was not given.

    Raises RecipeError naming the file or flag for unreadable files, unknown keys (with the
    nearest known one), and values of the wrong kind.
    """
    known = {each.name: each for each in options(recipe)}
    values: dict[str, Any] = {}
    if file is not None:
        keys = {name: each for name, each in known.items() if not each.transient}
        for key, given in _read_file(file, keys).items():
            if given is not None or keys[key].default is not None:
                values[key] = keys[key].value(given, f"{file}: {key}")
    for name, given in flags.items():
        if given is not None:
            values[name] = known[name].value(given, known[name].flag) if name in known else given
    return values


def made(recipe: type[R], values: Mapping[str, Any]) -> R:
    """The recipe of values that were `said`; RecipeError where a required one was not."""
    missing = [x.flag for x in options(recipe) if x.required and x.name not in values]
    if missing:
        raise RecipeError(
            f"missing: {', '.join(missing)}", hint="give them as flags or in a recipe file"
        )
    return recipe(**values)


def _read_file(file: Path, keys: Mapping[str, Option]) -> Mapping[str, object]:
    content = _parse(file)
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys to values")
    unknown = [str(key) for key in content if key not in keys]
    if unknown:
        hint = "; ".join(_nearest(key, tuple(keys)) for key in unknown)
        raise RecipeError(f"{file}: unknown key {', '.join(map(reprlib.repr, unknown))}", hint=hint)
    return content


def _parse(file: Path) -> object:
    import yaml

    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_RECIPE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{file}: cannot be read: {reason}") from error
    if len(content) > LARGEST_RECIPE:
        raise RecipeError(f"{file}: larger than a recipe can be")
    try:
        return yaml.safe_load(content) if content.strip() else {}
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(f"{file}: not YAML: {line}{error.problem}") from error
    except Exception as error:  # its constructors let ValueError, KeyError, RecursionError … out
        raise RecipeError(f"{file}: not YAML: {type(error).__name__}") from error


def _nearest(key: str, keys: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key.lower(), keys, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(keys)}"
