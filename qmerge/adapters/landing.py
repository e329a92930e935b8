"""Where each tensor of an adapter file lands in the injected model, and what is wrong with it.

PEFT translates file names to model names itself; its result is captured before anything is loaded,
so that every tensor can be accounted for: landed on an adapter parameter, replacing a base
parameter as a whole, or left over.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qmerge.adapters import unit
from qmerge.adapters.source import Adapter
from qmerge.adapters.spelling import Spelling, understand
from qmerge.errors import AdapterError, Fault
from qmerge.names import listed

ROOT = "base_model.model."
"""Where PEFT keeps the model inside its own."""
OTHER_MODEL_HINT = "was this adapter trained on another model? compare both with `qmerge inspect`"
PARTIAL_HINT = "save the adapter again; a sharded run must gather its parameters first"
BROKEN_HINT = "training diverged or the file is damaged; use an earlier checkpoint"
NAMED_AT_ONCE = 5


@dataclass(frozen=True, kw_only=True)
class Landing:
    """Where the tensors of an adapter file end up."""

    placed: Mapping[str, torch.Tensor]
    """Adapter parameters by name in the injected model, without PEFT's root; aliases included."""
    shared: Mapping[str, torch.Tensor]
    """What all tuner layers share, by name in PEFT's model."""
    overrides: Mapping[str, torch.Tensor]
    """Whole base parameters that the adapter brings along, by plain name."""
    spelling: Spelling
    faults: tuple[Fault, ...]


def land(peft_model: Any, adapter: Adapter) -> Landing:
    """Read an adapter's tensors and account for each in the model it was injected into.

    `peft_model` is PEFT's model on the meta device; nothing is loaded into it. Raises AdapterError
    where PEFT cannot translate the file's names at all.
    """
    path = str(adapter.path)
    tensors = adapter.read()
    base = base_names(peft_model)
    expected = _expected(peft_model)
    complete, _ = _translate(copy.deepcopy(peft_model), expected, adapter)
    spelling = understand(tensors, {**expected, **dict.fromkeys(base)})
    named = {target: tensors[name] for name, target in spelling.names.items()}
    final, lost = _translate(peft_model, named, adapter)
    state = peft_model.state_dict(keep_vars=True)
    landed = {name: tensor for name, tensor in final.items() if name in state}
    wrong = wrong_values(landed, state, path)
    missing = sorted(lost or complete.keys() - landed.keys())
    homeless = sorted(final.keys() - state.keys())
    faults = (
        *of_kind(path, contradictions(spelling, tensors), DOUBLED),
        *of_kind(path, homeless, LEFT_OVER),
        *of_kind(path, missing, OTHER_MODEL if homeless or wrong else MISSING),
        *wrong,
        *not_finite(named, path),
    )
    aliased = _with_aliases(landed, state)
    inside = {n: t for n, t in aliased.items() if n.startswith(ROOT)}
    return Landing(
        placed={n.removeprefix(ROOT): t for n, t in inside.items() if n not in base},
        shared={n: t for n, t in landed.items() if not n.startswith(ROOT)},
        overrides={base[n]: t for n, t in inside.items() if n in base},
        spelling=spelling,
        faults=faults,
    )


DOUBLED = ("has two values of the same weight", PARTIAL_HINT)
LEFT_OVER = ("holds tensors that have no place in this model", OTHER_MODEL_HINT)
MISSING = ("lacks tensors that this model needs", PARTIAL_HINT)
OTHER_MODEL = (MISSING[0], OTHER_MODEL_HINT)
"""Where there is more that does not fit."""
MISSHAPEN = ("holds tensors of another shape than this model's", OTHER_MODEL_HINT)
EMPTY = ("holds empty tensors, as a sharded run saves them", PARTIAL_HINT)
NOT_FINITE = ("holds values that are not finite", BROKEN_HINT)
NOT_FLOAT = ("holds whole numbers where weights belong", PARTIAL_HINT)


def of_kind(path: str, names: Iterable[str], kind: tuple[str, str]) -> list[Fault]:
    """One fault that names the first few tensors, or none."""
    found = listed((name.removeprefix(ROOT) for name in names), NAMED_AT_ONCE)
    return [Fault(where=path, message=f"{kind[0]}: {found}", hint=kind[1])] if found else []


def contradictions(spelling: Spelling, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Pairs of names for the same weight with different values; PEFT saves some weights twice."""
    return [f"{a} = {b}" for a, b in spelling.doubled if not torch.equal(tensors[a], tensors[b])]


def _expected(peft_model: Any) -> dict[str, torch.Tensor]:
    """What this PEFT would save of this adapter, under its names; the values are zeros."""
    from peft import get_peft_model_state_dict

    # Not meta: some kinds select among values when they save.
    state = {
        name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        for name, tensor in peft_model.state_dict().items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(get_peft_model_state_dict(peft_model, state, save_embedding_layers=False))


def base_names(peft_model: Any) -> dict[str, str]:
    """Base parameters: name in PEFT's model to plain name."""
    model = peft_model.base_model.model
    plain = {(id(slot.owner), slot.attribute): slot.name for slot in unit.base_slots(model)}
    return {
        f"{path}.{attribute}": plain[id(module), attribute]
        for path, module in peft_model.named_modules()
        for attribute in module._parameters
        if (id(module), attribute) in plain
    }


def _translate(
    peft_model: Any, named: Mapping[str, torch.Tensor], adapter: Adapter
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """PEFT's own translation of file names, captured where it would load the result.

    The second part names what a wholly trained module lacks, which PEFT cannot go on without.
    """
    from peft import set_peft_model_state_dict

    captured: dict[str, torch.Tensor] = {}

    def capture(state: dict[str, torch.Tensor], **_: Any) -> Any:
        captured.update(state)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    peft_model.load_state_dict = capture
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_peft_model_state_dict(peft_model, dict(named), adapter_name=unit.ADAPTER)
    except Exception as error:
        lost = sorted(_expected(peft_model).keys() - named.keys())
        if isinstance(error, KeyError) and lost:
            return {}, lost
        said = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise AdapterError(
            f"{adapter.path}: PEFT cannot place this adapter's tensors in the model: {said}",
            hint=OTHER_MODEL_HINT,
        ) from error
    finally:
        del peft_model.load_state_dict
    return captured, []


def wrong_values(
    landed: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], path: str
) -> list[Fault]:
    """Shapes and number kinds that cannot be right."""
    empty, shapes, kinds = [], [], []
    for name, tensor in landed.items():
        place = state[name]
        short = name.removeprefix(ROOT)
        if not tensor.numel() and place.numel():
            empty.append(short)
        elif tensor.shape != place.shape:
            shapes.append(f"{short} is {list(tensor.shape)}, the model has {list(place.shape)}")
        elif place.is_floating_point() and not tensor.is_floating_point():
            kinds.append(short)
    return [
        fault
        for names, kind in (
            (empty, EMPTY),
            (shapes, MISSHAPEN),
            (kinds, NOT_FLOAT),
        )
        for fault in of_kind(path, names, kind)
    ]


def not_finite(tensors: Mapping[str, torch.Tensor], path: str) -> list[Fault]:
    """Judged as they are saved: PEFT itself makes infinities of some (VB-LoRA's logits)."""
    found = (name for name, t in tensors.items() if not bool(torch.isfinite(t).all()))
    return of_kind(path, found, NOT_FINITE)


def _with_aliases(
    landed: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`landed` under every name that its place has: tied and shared parameters have several."""
    owner = {id(state[name]): tensor for name, tensor in landed.items()}
    shared = {name: owner[id(place)] for name, place in state.items() if id(place) in owner}
    return {**shared, **landed}
