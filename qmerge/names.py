"""Names: stored tensor, module parameter, unit of the walk, and patterns over them.

A *parameter* is what the model built by transformers calls a weight; a *stored name* is what the
checkpoint calls the same dense weight on disk. A *module* is either name without `.weight`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qmerge.errors import RecipeError

WEIGHT = ".weight"


def module_of(name: str) -> str:
    """The module that owns the weight `name`; names of other tensors lose their last part too."""
    return name.rpartition(".")[0]


def under(name: str, path: str) -> str | None:
    """`name` relative to the module `path`, or None where it lies outside."""
    if not path:
        return name
    return name[len(path) + 1 :] if name.startswith(f"{path}.") else None


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


@dataclass(frozen=True, kw_only=True)
class NameMap:
    """One checkpoint's stored names against the parameters of the model built for it."""

    stored: Mapping[str, str]
    """Parameter to stored name."""
    unknown: tuple[str, ...] = ()
    """Stored names that the model has no parameter for."""
    ignored: tuple[str, ...] = ()
    """Stored names that transformers leaves out when it loads such a model."""
    missing: tuple[str, ...] = ()
    """Parameters that the checkpoint does not hold."""
    written: Mapping[str, str] = field(default_factory=dict)
    """Parameters that are written under another name than they are read: untied heads."""
    fused: Mapping[str, str] = field(default_factory=dict)
    """Parameters that are taken apart into single experts to the stored names of the whole."""
    twice: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Second names of tied parameters to the stored names of both, where both are stored."""

    def to_write(self, parameter: str) -> str:
        return self.written.get(parameter, self.stored[parameter])

    def module_to_write(self, module: str) -> str:
        """What `module` is called where it is written; one that is not, such as a tied head, keeps
        its name."""
        parameter = module + WEIGHT
        return module_of(self.to_write(parameter)) if parameter in self.stored else module


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One step of the walk, and one shard of the release."""

    kind: str
    """`embedding`, `vision`, `layer` or `head`."""
    path: str
    """Module path for a layer, else empty."""
    index: int
    """Depth of a layer; -1 for the others."""
    parameters: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"layer {self.index}" if self.kind == "layer" else self.kind


def matches(pattern: str, name: str) -> bool:
    """Whether a PATTERN (a glob, or a regular expression after `re:`) fits a whole name."""
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise RecipeError(
            f"pattern {pattern!r} is not a regular expression: {error}",
            hint="leave out `re:` to use a glob such as '*.mlp.*'",
        ) from error


def listed(names: Iterable[str], most: int) -> str:
    """The first few of many names, and how many more there are."""
    shown = list(names)
    rest = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {rest} more" if rest > 0 else "")


def common_unit(parameter: str, layer_paths: Iterable[str]) -> str | None:
    """The layer path that holds `parameter`, or None where it is outside the layers."""
    return next((path for path in layer_paths if under(parameter, path) is not None), None)
