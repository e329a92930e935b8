"""Targets and patterns of another library generation, said in the names that this model has.

A configuration names modules by whole paths or by patterns over them, and both go out of date when
a library moves the language model to another place. What the adapter's tensors are called shows
which modules were meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from qmerge.adapters.spelling import bare

PATTERNS = ("rank_pattern", "alpha_pattern")
WHOLE = ("weight", "bias")
"""What is left of a tensor's name where it is a module's own parameter and no update of it."""


def retarget(config: Any, model: nn.Module, tensors: Iterable[str]) -> bool:
    """Let a configuration target just the modules that `tensors` belong to; False where none does.

    For one whose own targets are nowhere in the model.
    """
    paths = _by_bare(name for name, module in model.named_modules() if not list(module.children()))
    found: dict[str, None] = {}
    for name in tensors:
        path, rest = _owner(bare(name), paths)
        if path is not None and rest not in WHOLE:
            found[path] = None
    if found:
        config.target_modules = list(found)
        config.exclude_modules = None
        for option in ("layers_to_transform", "layers_pattern"):
            if hasattr(config, option):
                setattr(config, option, None)
    return bool(found)


def repattern(config: Any, model: nn.Module) -> tuple[str, ...]:
    """Say keys of rank and alpha patterns in the model's names; those that mean no module."""
    names = [name for name, _ in model.named_modules()]
    paths = _by_bare(names)
    lost = []
    for option in PATTERNS:
        pattern = getattr(config, option, None) or {}
        if not isinstance(pattern, dict):
            continue  # for PEFT to refuse
        if not all(isinstance(value, int | float) for value in pattern.values()):
            continue  # AdaLoRA's: masks by the names of tensors
        keys = {key: _key(key, names, paths) for key in pattern}
        lost += [f"{option} {key!r}" for key, own in keys.items() if own is None]
        setattr(config, option, {keys[key] or key: value for key, value in pattern.items()})
    return tuple(lost)


def _key(key: str, names: Iterable[str], paths: dict[str, str]) -> str | None:
    """The key itself where PEFT would find a module by it, else the one module that is meant."""
    try:
        fits = re.compile(rf"(.*\.)?({key})$").match
    except re.error:
        return None
    return key if any(map(fits, names)) else paths.get(bare(key.removeprefix("^")))


def _by_bare(names: Iterable[str]) -> dict[str, str]:
    """Module paths by their bare names, those that share one left out."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(bare(name), []).append(name)
    return {short: paths[0] for short, paths in found.items() if len(paths) == 1}


def _owner(name: str, paths: dict[str, str]) -> tuple[str | None, str]:
    """The longest module path that `name` begins with, and the rest of it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = paths.get(".".join(parts[:length]))
        if path is not None:
            return path, ".".join(parts[length:])
    return None, name
