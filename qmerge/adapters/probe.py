"""Proof on a small sample that an adapter does something, and that its merge does the same.

One adapted module at a time gets random base weights, smallest first, until one shows an effect.
So a kind that nobody has looked at yet cannot pass in silence.

X: a few random inputs.
"""

from __future__ import annotations

import torch
from torch import nn

from qmerge.adapters import unit
from qmerge.adapters.injection import LIVE_HINT, Injection
from qmerge.errors import AdapterError, Fault

SEED = 0
ROWS = 4
SCALE = 0.02
LARGEST = 1 << 26
"""Base weights of a module beyond which a sample costs too much; it is trusted instead."""
TOLERANCE = 1e-3
"""Largest difference between live and merged, in units of the output's largest value. Measured on
every mergeable kind: below 2e-5 in float32."""
FACTORS = ("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")
NOOP_HINT = "merge a checkpoint that was trained, or give --allow-noop"


def probe(injection: Injection, *, allow_noop: bool) -> tuple[Fault, ...]:
    """Faults of an adapter that does nothing, or whose merge differs from what it does live."""
    adapted = dict(unit.adapted_modules(injection.tuner.model))
    chosen = {path: adapted[path] for path in adapted if path not in injection.left_out}
    tuners = {path: _size(module) for path, module in chosen.items() if unit.is_tuner(module)}
    whole = len(tuners) < len(chosen) or (bool(injection.landing.overrides) and not tuners)
    if not chosen and not whole:
        return (_fault(injection, "nothing of it is selected", "widen --only or --except"),)
    for path in sorted(tuners, key=tuners.__getitem__):
        if _is_zero(injection, path):
            continue
        fault, changed = (None, True) if tuners[path] > LARGEST else _try(injection, path)
        if fault:
            return (fault,)
        if changed:
            return ()
    if whole or allow_noop:
        return ()
    return (_fault(injection, "its update is zero: merging changes nothing", NOOP_HINT),)


def _fault(injection: Injection, message: str, hint: str | None) -> Fault:
    return Fault(where=str(injection.adapter.path), message=message, hint=hint)


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
