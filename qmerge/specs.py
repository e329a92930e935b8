"""Options that say several things in one text, and what they say.

    [NAME=]SPEC          a text to score
    [NAME=]DIR[+ADAPTER] a checkpoint to score
    DIR[@WEIGHT]         an adapter
    PATTERN=SETTINGS     other settings for some modules

"=", "+" and the ":" before a column may also be part of a file's name. Where something is there
under the whole text, that is what is meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qmerge.errors import RecipeError

EvalRole = Literal["in_domain", "general"]

_OVERRIDE = re.compile(
    r"(?P<pattern>.+)=(?P<settings>skip|bits:[2348]|group:(?:-1|[1-9]\d{0,4})"
    r"|bits:[2348],group:(?:-1|[1-9]\d{0,4}))"
)


@dataclass(frozen=True, kw_only=True)
class EvalText:
    """One evaluation corpus as asked for. The in-domain one decides where one must."""

    name: str
    spec: str
    role: EvalRole


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One checkpoint to evaluate, with an adapter live on top where there is one."""

    name: str
    folder: Path
    adapter: Path | None


@dataclass(frozen=True, kw_only=True)
class WeightedAdapter:
    """One adapter as asked for."""

    folder: Path
    weight: float


@dataclass(frozen=True, kw_only=True)
class Override:
    """Settings of the modules that `pattern` fits; None is as for the others."""

    pattern: str
    skip: bool
    bits: int | None
    group_size: int | None


def expanded(path: str) -> Path:
    """With a home folder for a `~` at its start; as it stands where nobody has that one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_there(text: str) -> bool:
    """Whether a file or folder is called so; what no path can be is not."""
    try:
        return expanded(text).exists()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def eval_texts(given: Sequence[str]) -> tuple[EvalText, ...]:
    """The corpora in the order given: the one named in_domain has that role, else the first that is
    not named general."""
    named = [_named(text, _corpus_name) for text in given]
    names = [name for name, _ in named]
    first = next((name for name in names if name != "general"), None)
    own = "in_domain" if "in_domain" in names else first
    return tuple(
        EvalText(name=name, spec=spec, role="in_domain" if name == own else "general")
        for name, spec in named
    )


def contestant(text: str) -> Contestant:
    name, spec = _named(text, _folder_name)
    folder, adapter = _parts(spec)
    return Contestant(
        name=name, folder=expanded(folder), adapter=expanded(adapter) if adapter else None
    )


def weighted(text: str) -> WeightedAdapter:
    """What follows the last "@" is a weight if it is a number, whatever is there."""
    folder, _, number = text.rpartition("@")
    try:
        weight = float(number) if folder else 1.0
    except ValueError:
        folder, weight = text, 1.0
    return WeightedAdapter(folder=expanded(folder or text), weight=weight)


def override(text: str) -> Override:
    """RecipeError for a text that is not PATTERN=SETTINGS."""
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise RecipeError(
            f"{text!r} is not PATTERN=SETTINGS",
            hint="SETTINGS is bits:2|3|4|8, group:N, both as in bits:8,group:32, or skip",
        )
    values = dict(each.split(":") for each in match["settings"].split(",") if ":" in each)
    return Override(
        pattern=match["pattern"],
        skip=match["settings"] == "skip",
        bits=int(values["bits"]) if "bits" in values else None,
        group_size=int(values["group"]) if "group" in values else None,
    )


def _named(text: str, otherwise: Callable[[str], str]) -> tuple[str, str]:
    """What stands before "=" is a name unless it looks like part of a path."""
    match = re.fullmatch(r"([\w.-]+)=(.+)", text, re.DOTALL)
    if match is None:
        return otherwise(text), text
    return match[1], text if is_there(text) else match[2]


def _corpus_name(spec: str) -> str:
    """wiki.jsonl:text → wiki; hub:ORG/NAME@REV/CONFIG/SPLIT → NAME; a recipe's name → itself."""
    if spec.startswith("hub:"):
        parts = spec.removeprefix("hub:").split("/")
        return parts[min(1, len(parts) - 1)].partition("@")[0]
    return Path(re.sub(r"(\.(?:jsonl|parquet)):[^/]*$", r"\1", spec)).stem


def _folder_name(spec: str) -> str:
    """models/base+out/adapter → base+adapter."""
    return "+".join(Path(part).name or part for part in _parts(spec) if part)


def _parts(spec: str) -> tuple[str, str]:
    """The last "+" divides; one at either end is part of the folder's name."""
    folder, _, adapter = spec.rpartition("+")
    return (folder, adapter) if folder and adapter and not is_there(spec) else (spec, "")
