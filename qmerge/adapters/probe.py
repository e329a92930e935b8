"""Proof on a small sample that an adapter does something, and that its merge does the same.

One adapted module at a time gets random base weights, smallest first, until one shows an effect.
So a kind that nobody has looked at yet cannot pass in silence. What stands in place of base values
is held against those.

X: a few random inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from qmerge.adapters import unit
from qmerge.adapters.injection import LIVE_HINT, Injection
from qmerge.errors import AdapterError, Fault
from qmerge.names import join

Rows = Callable[[str, int, int], torch.Tensor | None]
"""Rows of a base parameter in float32, by plain name; None where nobody knows them."""
SEED = 0
ROWS = 4
SCALE = 0.02
LARGEST = 1 << 26
"""Base weights of a module beyond which a sample costs too much; it is trusted instead."""
TOLERANCE = 1e-3
"""Largest difference between live and merged, in units of the output's largest value. Measured on
every mergeable kind: below 2e-5 in float32."""
FACTORS = ("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")
AT_ONCE = 1024
"""Rows that are compared at a time."""
REPLACING = frozenset(("ln_tuning_layers", "modules_to_save", "trainable_tokens_delta"))
"""Where PEFT keeps values that stand in place of the base's."""
INNER = frozenset((*REPLACING, "base_layer", "default", "token_adapter"))
NOOP = "its update is zero: merging changes nothing"
NOOP_HINT = "merge a checkpoint that was trained, or give --allow-noop"


def no_rows(_name: str, _start: int, _stop: int) -> None:
    """`Rows` of a base that is not at hand."""


def probe(injection: Injection, *, allow_noop: bool, base: Rows) -> tuple[Fault, ...]:
    """Faults of an adapter that does nothing, or whose merge differs from what it does live."""
    adapted = dict(unit.adapted_modules(injection.tuner.model))
    chosen = {path: adapted[path] for path in adapted if path not in injection.left_out}
    replacing = [p for p, m in chosen.items() if unit.is_wrapper(m) or _replaces(injection, p)]
    tuners = {path: _size(module) for path, module in chosen.items() if path not in replacing}
    if not chosen and not injection.landing.overrides:
        return (_fault(injection, "nothing of it is selected", "widen --only or --except"),)
    for path in sorted(tuners, key=tuners.__getitem__):
        if _is_zero(injection, path):
            continue
        fault, changed = (None, True) if tuners[path] > LARGEST else _try(injection, path)
        if fault:
            return (fault,)
        if changed:
            return ()
    if allow_noop or not same_values(_brought(injection, replacing), base):
        return ()
    return (_fault(injection, NOOP, NOOP_HINT),)


def _fault(injection: Injection, message: str, hint: str | None) -> Fault:
    return Fault(where=str(injection.adapter.path), message=message, hint=hint)


def _replaces(injection: Injection, path: str) -> bool:
    """Whether all that an adapted module has stands in place of base values."""
    names = unit.below(injection.landing.placed, path).values()
    return bool(names) and all(REPLACING.intersection(name.split(".")) for name in names)


def _brought(injection: Injection, paths: Iterable[str]) -> Iterator[tuple[str, int, torch.Tensor]]:
    """What stands in place of base values: parameter, first row, rows."""
    adapted = dict(unit.adapted_modules(injection.tuner.model))
    placed = injection.landing.placed
    yield from ((name, 0, tensor) for name, tensor in injection.landing.overrides.items())
    for path in paths:
        for name in unit.below(placed, path).values():
            parts = name.split(".")
            if "trainable_tokens_delta" not in parts:
                yield ".".join(part for part in parts if part not in INNER), 0, placed[name]
                continue
            for row, token in enumerate(unit.trained_tokens(adapted[path]) or ()):
                yield join(path, "weight"), token, placed[name][row : row + 1]


def same_values(brought: Iterable[tuple[str, int, torch.Tensor]], base: Rows) -> bool:
    """Whether all of (parameter, first row, rows) are what the base has there."""
    for name, first, tensor in brought:
        for start in range(0, len(tensor), AT_ONCE):
            part = tensor[start : start + AT_ONCE].float()
            own = base(name, first + start, first + start + len(part))
            if own is None or not torch.equal(own.cpu(), part):
                return False
    return True


def _size(module: nn.Module) -> int:
    return sum(slot.parameter.numel() for slot in unit.base_slots(module))


def _is_zero(injection: Injection, path: str) -> bool:
    """Whether a plain LoRA layer has an all-zero factor, without making its base."""
    tensors = unit.below(injection.landing.placed, path)
    if not all(name.startswith(FACTORS) and not name.endswith(".bias") for name in tensors):
        return False
    return any(not injection.landing.placed[full].any() for full in tensors.values())


def _try(injection: Injection, path: str) -> tuple[Fault | None, bool]:
    """Merge one module over random base weights: (what is wrong, whether it changed anything)."""
    generator = torch.Generator().manual_seed(SEED)
    module = injection.live(path)
    base = {
        slot.name: torch.randn(slot.parameter.shape, generator=generator) * SCALE
        for slot in unit.base_slots(module)
    }
    injection.fill(module, base)
    X = _inputs(unit.base_of(module.get_submodule(unit.HELD)), generator)
    with torch.no_grad():
        before = None if X is None else module(X)
        try:
            merged = injection.merge(module)
        except AdapterError as error:
            return _fault(injection, error.message, error.hint), False
        after = None if X is None else module(X)
    difference = 0.0 if before is None or after is None else _difference(before, after)
    if difference > TOLERANCE:
        text = f"PEFT's merge of {path} differs from the live adapter by {difference:.1%}"
        return _fault(injection, text, LIVE_HINT), False
    return None, any(not torch.equal(base[name], merged[name]) for name in base)


def _difference(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-6))


def _inputs(base: nn.Module, generator: torch.Generator) -> torch.Tensor | None:
    """Random inputs for the kinds of modules whose call is known, else None."""
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (ROWS,), generator=generator)
    width = getattr(base, "in_features", None) or getattr(base, "nx", None)
    return None if width is None else torch.randn(ROWS, width, generator=generator)
