"""Putting an adapter into a model of which only names and shapes are known, with all checks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qmerge.adapters import unit
from qmerge.adapters.injection import LIVE_HINT, Injection
from qmerge.adapters.kinds import settles
from qmerge.adapters.landing import OTHER_MODEL_HINT, Landing, land
from qmerge.adapters.probe import Rows, no_rows, probe
from qmerge.adapters.retarget import repattern, retarget
from qmerge.adapters.source import Adapter
from qmerge.errors import AdapterError, Fault
from qmerge.names import join, module_of, under

STALE = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
"""What libraries say to each other's developers, and not to a reader of the plan."""
TAKEN = "the modules are those that its tensors are named after"


def inject(
    model: Any,
    adapter: Adapter,
    *,
    weight: float = 1.0,
    selected: Callable[[str], bool] | None = None,
    allow_noop: bool = False,
    base: Rows = no_rows,
) -> Injection:
    """Inject an adapter into a copy of a model on the meta device, and check all of it.

    `weight` is a factor on its update. `selected` says by plain module name which adapted modules
    to merge; the others stay the base's. `base` shows whether whole values differ from
    its own. What is wrong with the adapter's tensors stands in
    `faults`; an AdapterError is raised where the adapter cannot be injected at all.
    """
    if adapter.refusal:
        raise AdapterError(
            f"{adapter.path}: a {adapter.kind} adapter cannot be merged: {adapter.refusal}",
            hint=LIVE_HINT,
        )
    peft_model, said = _wrap(model, adapter)
    landing = land(peft_model, adapter)
    tuner = peft_model.base_model
    if not landing.faults:
        peft_model.load_state_dict(dict(landing.shared), strict=False, assign=True)
    adapted = dict(unit.adapted_modules(tuner.model))
    places = dict.fromkeys([*adapted, *(module_of(name) for name in landing.overrides)])
    left_out = tuple(p for p in places if selected is not None and not selected(p))
    kept = {n: t for n, t in landing.overrides.items() if module_of(n) not in left_out}
    landing = replace(landing, overrides=kept)
    touched = _touched(adapted, landing, left_out)
    injection = Injection(
        adapter=adapter,
        faults=(*landing.faults, *_weight_faults(adapter, adapted, left_out, weight)),
        notes=(*adapter.notes, *_notes(adapter, landing, said)),
        touched=touched,
        left_out=left_out,
        adapted=tuple(adapted),
        unties=_unties(tuner, touched, landing),
        weight=weight,
        landing=landing,
        tuner=tuner,
    )
    if injection.faults:
        return injection
    return replace(injection, faults=probe(injection, allow_noop=allow_noop, base=base))


def _wrap(model: Any, adapter: Adapter) -> tuple[Any, tuple[str, ...]]:
    """PEFT's model around a skeleton, adapter parameters on meta, and what PEFT had to say."""
    from peft.tuners.tuners_utils import NoMatchingPeftModuleError

    config = adapter.peft_config()
    lost = repattern(config, model)
    notes = tuple(f"{each} of {adapter.path} fits no module of this model" for each in lost)
    try:
        wrapped, said = _put(copy.deepcopy(model), config, adapter)
    except NoMatchingPeftModuleError as error:
        if not retarget(config, model, adapter.tensors):
            raise _misplaced(model, adapter, error) from error
        notes += (f"the targets of {adapter.path} are of another library generation: {TAKEN}",)
        try:
            wrapped, said = _put(copy.deepcopy(model), config, adapter)
        except Exception as again:
            raise _misplaced(model, adapter, again) from again
    except Exception as error:
        raise _misplaced(model, adapter, error) from error
    return wrapped.eval(), (*notes, *said)


def _put(model: Any, config: Any, adapter: Adapter) -> tuple[Any, tuple[str, ...]]:
    from peft import PeftModel
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    hollow = settles(adapter.config)
    if hollow:
        unit.hollow(model)
    wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    with warnings.catch_warnings(record=True) as caught, unit.only_dense_layers():
        warnings.simplefilter("always")
        wrapped = wrapper(model, config, unit.ADAPTER, low_cpu_mem_usage=not hollow)
    if hollow:
        unit.back_to_meta(model)
    said = (str(w.message) for w in caught if not issubclass(w.category, STALE))
    return wrapped, tuple(dict.fromkeys(said))


def _misplaced(model: Any, adapter: Adapter, error: Exception) -> AdapterError:
    return AdapterError(
        f"{adapter.path}: PEFT cannot put this adapter ({', '.join(adapter.targets)}) into "
        f"{type(model).__name__}: {error}",
        hint=OTHER_MODEL_HINT,
    )


def _weight_faults(
    adapter: Adapter, adapted: Mapping[str, nn.Module], left_out: tuple[str, ...], weight: float
) -> tuple[Fault, ...]:
    """A weight on something that is no update to weigh."""
    if weight == 1:
        return ()
    stiff = [p for p, m in adapted.items() if p not in left_out and not unit.can_scale(m)]
    if not stiff:
        return ()
    return (
        Fault(
            where=str(adapter.path),
            message=f"a weight of {weight:g} means nothing for {adapter.kind} on {stiff[0]}",
            hint="leave the weight out, or leave that module out with --except",
        ),
    )


def _touched(
    adapted: Mapping[str, nn.Module], landing: Landing, left_out: tuple[str, ...]
) -> frozenset[str]:
    names = set(landing.overrides)
    for path, module in adapted.items():
        if path in left_out:
            continue
        names.update(join(path, name) for name in unit.changed_parameters(module))
    return frozenset(names)


def _unties(tuner: Any, touched: frozenset[str], landing: Landing) -> bool:
    """Whether the adapter makes parameters differ that the model ties."""
    tied: dict[int, set[str]] = {}
    for slot in unit.base_slots(tuner.model):
        tied.setdefault(id(slot.parameter), set()).add(slot.name)
    config = tuner.peft_config[unit.ADAPTER]
    follows = bool(getattr(config, "ensure_weight_tying", False)) or any(
        getattr(module, "tied_adapter", None) is not None for module in tuner.model.modules()
    )
    places = [path for path, _ in unit.adapted_modules(tuner.model)]
    for names in (names for names in tied.values() if len(names) > 1):
        adapted = {n for n in names & touched if any(under(n, path) for path in places)}
        if adapted and not (follows and adapted == names):
            return True
        whole = [landing.overrides[name] for name in names if name in landing.overrides]
        if len(whole) not in (0, len(names)):
            return True
        if any(not torch.equal(whole[0], other) for other in whole[1:]):
            return True
    return False


def _notes(adapter: Adapter, landing: Landing, said: tuple[str, ...]) -> tuple[str, ...]:
    """What the plan should tell: renamed tensors, replaced parameters, PEFT's own warnings."""
    notes = list(said)
    if adapter.base_reason:
        start = adapter.config.get("init_lora_weights")
        of = adapter.kind if start is None else f"init_lora_weights {start!r}"
        notes.append(f"{of}: {adapter.base_reason}")
    if landing.spelling.unused:
        notes.append(
            f"{len(landing.spelling.unused)} copies of untouched base modules are not used"
        )
    if landing.overrides:
        notes.append(f"replaces as a whole: {', '.join(sorted(landing.overrides))}")
    return tuple(notes)
