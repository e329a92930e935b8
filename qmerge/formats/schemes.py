"""Which settings of a compressed-tensors checkpoint hold for which linear: its config groups."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmerge.errors import CheckpointError
from qmerge.formats.settings import Settings

PACKED = "pack-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")

# Rotations and sparsity change what the stored weight means.
FOREIGN = ("transform_config", "sparsity_config")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One of the `config_groups`: how the weights of its targets are stored."""

    targets: tuple[str, ...]
    form: str
    bits: int
    integer: bool
    symmetric: bool
    group_size: int
    """Columns per scale; −1 for a scale per row or for all."""
    block: tuple[int, int] | None

    @property
    def of_class(self) -> bool:
        """Whether it is for a class of modules, as `Linear`, and not for some by name."""
        return any(target[:1].isupper() for target in self.targets)


def read_schemes(settings: Settings) -> tuple[Scheme, ...]:
    """The config groups; CheckpointError for a form that cannot be decoded weight by weight."""
    for key in FOREIGN:
        found = settings.values.get(key)
        if isinstance(found, Mapping) and found and found.get("format") != "dense":
            raise CheckpointError(
                f"{settings.file}: compressed-tensors with a {key}",
                hint="qmerge reads neither rotated nor sparse weights",
            )
    groups = settings.values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{settings.file}: compressed-tensors without config_groups")
    found = [_scheme(name, group, settings) for name, group in groups.items()]
    schemes = tuple(scheme for scheme in found if scheme is not None)
    if not schemes:
        raise CheckpointError(f"{settings.file}: config_groups quantize no weights")
    return schemes


def _scheme(name: str, group: Any, settings: Settings) -> Scheme | None:
    """One group; None where it leaves weights alone."""
    where = f"{settings.file}: config_groups.{name}"
    if not isinstance(group, Mapping):
        raise CheckpointError(f"{where} is not a table of settings")
    weights, targets = group.get("weights"), group.get("targets") or []
    if weights is None:
        return None
    if not isinstance(targets, list | tuple):
        raise CheckpointError(f"{where}.targets is no list")
    form = str(group.get("format") or settings.values.get("format") or PACKED)
    if not isinstance(weights, Mapping) or form not in (PACKED, *PLAIN):
        raise CheckpointError(
            f"{where}: the form {form!r}, which qmerge does not read",
            hint=f"it reads {', '.join((PACKED, *PLAIN))}",
        )
    try:
        bits = int(weights.get("num_bits", 8))
        group_size = int(weights.get("group_size") or -1)
        block = _pair(weights.get("block_structure"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}.weights: sizes that are no whole numbers") from error
    integer = str(weights.get("type", "int")).lower() == "int"
    if not 1 <= bits <= 8 or (not integer and bits != 8) or (group_size < 1 and group_size != -1):
        raise CheckpointError(
            f"{where}: {bits} bits of type {weights.get('type')} in groups of {group_size}",
            hint="qmerge reads integers of 1 to 8 bits and FP8",
        )
    return Scheme(
        targets=tuple(map(str, targets)),
        form=form,
        bits=bits,
        integer=integer,
        symmetric=bool(weights.get("symmetric", True)),
        group_size=group_size,
        block=block,
    )


def _pair(found: Any) -> tuple[int, int] | None:
    """A block's height and width: two numbers, or `128x128` in old settings."""
    if found is None:
        return None
    high, wide = found.split("x") if isinstance(found, str) else found
    return int(high), int(wide)


def scheme_of(module: str, schemes: Sequence[Scheme]) -> Scheme:
    """The group a module belongs to: targets that name it come before those that name its class."""
    for scheme in schemes:
        if any(_names(target, module) for target in scheme.targets):
            return scheme
    for scheme in schemes:
        # Which class a module has only the model knows; what is quantized is a linear.
        if scheme.of_class:
            return scheme
    raise CheckpointError(
        f"{module}: quantized, and no target in config_groups names it",
        hint="config.json is of another checkpoint",
    )


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error as error:
        raise CheckpointError(
            f"config_groups has the target {target!r}, which is no regular expression"
        ) from error
