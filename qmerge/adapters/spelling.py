"""One name for what library generations and wrappers spell differently.

Two names are the same where they agree after the segments that only wrappers put in are left out:
FSDP and DeepSpeed (`module.`), `torch.compile` (`_orig_mod.`), PEFT itself (`base_model.model.`,
the adapter's name), and the language model inside a model of several kinds of input, which moved
between `language_model.model.` and `model.language_model.` with transformers' generations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WRAPPERS = frozenset(
    (
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_fsdp_wrapped_module",
        "_orig_mod",
        "base_model",
        "default",
        "language_model",
        "model",
        "module",
        "modules_to_save",
        "thinker",
    )
)
BASE_COPY = "original_module"
"""Old PEFT saved the untouched base module beside the trained one under this name."""


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How the names in a file were understood."""

    renamed: Mapping[str, str]
    """File name to the name that this PEFT uses; only those that differ."""
    unused: tuple[str, ...]
    """Copies of base modules that an old PEFT saved; they carry no training."""
    names: Mapping[str, str]
    """Every other file name to the name to load it under (itself where nothing better is known)."""
    doubled: tuple[tuple[str, str], ...]
    """Pairs of file names that mean the same tensor."""


def bare(name: str) -> str:
    """`name` without the segments that only wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def understand(found: Iterable[str], expected: Iterable[str]) -> Spelling:
    """Match names in a file to the names that PEFT expects for this model.

    An exact match wins; else the one expected name that is equal without wrappers. A name without
    a partner keeps its spelling, for PEFT's own conversions to deal with.
    """
    known = set(expected)
    by_bare: dict[str, list[str]] = {}
    for name in known:
        by_bare.setdefault(bare(name), []).append(name)
    names: dict[str, str] = {}
    unused = []
    for name in found:
        partners = by_bare.get(bare(name), [])
        if BASE_COPY in name.split("."):
            unused.append(name)
        else:
            names[name] = name if name in known or len(partners) != 1 else partners[0]
    owners: dict[str, str] = {}
    doubled = []
    for name, target in names.items():
        first = owners.setdefault(target, name)
        if first != name:
            doubled.append((first, name))
    return Spelling(
        renamed={name: target for name, target in names.items() if name != target},
        unused=tuple(unused),
        names=names,
        doubled=tuple(doubled),
    )
