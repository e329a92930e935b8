"""Several adapters into one, as PEFT's `add_weighted_adapter` makes it, without the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters import unit
from qmerge.adapters.inject import inject
from qmerge.adapters.injection import Injection
from qmerge.adapters.kinds import SPLIT_INITS, base_init, refusal
from qmerge.adapters.landing import base_names
from qmerge.adapters.source import Adapter
from qmerge.errors import AdapterError, PlanError, RecipeError
from qmerge.recipe import Combination
from qmerge.storage.headers import TensorInfo

LOST_OPTIONS = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "use_dora",
)
"""LoRA options whose trained values PEFT's combination would leave behind."""
COMBINED = "combined"
STABILIZED = (
    "the combination keeps the scale that each rank-stabilized adapter was trained with; PEFT's own"
    " multiplies it by the root of the rank once more"
)
PROGRESSIVE_HINT = "leave out --combine to merge them one after the other"


def combine(
    model: Any,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: Combination,
    *,
    density: float | None = None,
    seed: int = 0,
    allow_noop: bool = False,
) -> Adapter:
    """One LoRA adapter made of several for a model on the meta device.

    `density` is the share of values that ties, dare and magnitude_prune keep; `seed` decides which
    ones dare keeps. Equal to `add_weighted_adapter` after `torch.manual_seed(seed)`, save that
    rank-stabilized adapters keep their scale, which PEFT multiplies once more. Raises PlanError
    with every fault of the single adapters, AdapterError for adapters that PEFT cannot combine
    without loss, RecipeError where the method needs a density.
    """
    _check(adapters, method, density)
    injections = [
        inject(model, adapter, weight=weight, allow_noop=allow_noop)
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    faults = tuple(fault for injection in injections for fault in injection.faults)
    if faults:
        raise PlanError(faults)
    hollow = copy.deepcopy(model)
    unit.hollow(hollow)
    names = [f"adapter{i}" for i in range(len(adapters))]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        peft_model, whole = _load(hollow, injections, names)
        torch.manual_seed(seed)
        try:
            peft_model.base_model.add_weighted_adapter(
                names, list(weights), COMBINED, method, density=density
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise AdapterError(
                f"{_paths(adapters)}: PEFT cannot combine them by {method}: {error}",
                hint=PROGRESSIVE_HINT,
            ) from error
        _check_kept(peft_model.base_model.model, adapters)
        return _taken_out(peft_model, adapters, whole)


def _check(adapters: Sequence[Adapter], method: Combination, density: float | None) -> None:
    if density is None and method.startswith(("ties", "dare", "magnitude_prune")):
        raise RecipeError(
            f"--combine {method} needs a density",
            hint="give --density between 0 and 1, such as 0.5",
        )
    for adapter in adapters:
        reason = refusal(adapter.config)
        init = base_init(adapter.config)
        if adapter.kind != "LORA":
            reason = f"PEFT combines LoRA adapters, and this one is {adapter.kind}"
        elif init and init[0] in SPLIT_INITS:
            reason = init[1]
        else:
            lost = [name for name in LOST_OPTIONS if adapter.config.get(name)]
            lost += ["bias"] if adapter.config.get("bias", "none") != "none" else []
            reason = reason or (f"{lost[0]} would be lost" if lost else None)
        if reason:
            raise AdapterError(
                f"{adapter.path}: cannot be combined: {reason}", hint=PROGRESSIVE_HINT
            )


def _load(
    model: Any, injections: Sequence[Injection], names: Sequence[str]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """PEFT's model with all adapters in it in float32, and the base parameters they bring whole."""
    from peft import PeftModel, set_peft_model_state_dict

    adapters = [injection.adapter for injection in injections]
    peft_model = PeftModel(model, adapters[0].peft_config(), names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        peft_model.add_adapter(name, adapter.peft_config())
    base = base_names(peft_model)
    whole: dict[str, torch.Tensor] = {}
    for name, injection in zip(names, injections, strict=True):
        stored = injection.adapter.read()
        tensors = {to: stored[own] for own, to in injection.landing.spelling.names.items()}
        for target in [target for target in tensors if target in base]:
            tensor = tensors.pop(target)
            if not torch.equal(whole.setdefault(target, tensor), tensor):
                raise AdapterError(
                    f"{_paths(adapters)}: they bring different values of {base[target]}",
                    hint=PROGRESSIVE_HINT,
                )
        set_peft_model_state_dict(peft_model, tensors, adapter_name=name)
    return peft_model, whole


def _check_kept(model: Any, adapters: Sequence[Adapter]) -> None:
    """PEFT takes all options but the targets from the first adapter; no module may get lost."""
    for path, layer in unit.adapted_modules(model):
        if COMBINED not in {*layer.lora_A, *layer.lora_embedding_A}:  # type: ignore[misc]
            raise AdapterError(
                f"{_paths(adapters)}: PEFT's combination leaves out {path}", hint=PROGRESSIVE_HINT
            )


def _taken_out(
    peft_model: Any, adapters: Sequence[Adapter], whole: Mapping[str, torch.Tensor]
) -> Adapter:
    """The combination as an adapter of its own, each module at the rank that PEFT gave it."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(
        peft_model, adapter_name=COMBINED, save_embedding_layers=False
    )
    config = peft_model.peft_config[COMBINED].to_dict()
    ranks = {}
    for path, layer in unit.adapted_modules(peft_model.base_model.model):
        A = layer.lora_A if COMBINED in layer.lora_A else layer.lora_embedding_A  # type: ignore[operator]
        factor = A[COMBINED]  # type: ignore[index]
        ranks[path] = int(getattr(factor, "weight", factor).shape[0])
    config |= {
        "peft_type": "LORA",
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    held = {**{name: tensor.detach().clone() for name, tensor in state.items()}, **whole}
    where = Path(_paths(adapters))
    return Adapter(
        path=where,
        kind="LORA",
        config=config,
        tensors={
            name: TensorInfo(
                name=name, dtype=t.dtype, shape=tuple(t.shape), file=where, nbytes=t.nbytes
            )
            for name, t in held.items()
        },
        refusal=None,
        notes=tuple(dict.fromkeys(_notes(adapters))),
        held=held,
    )


def _notes(adapters: Sequence[Adapter]) -> Iterator[str]:
    for adapter in adapters:
        yield from adapter.notes
        if adapter.config.get("use_rslora"):
            yield STABILIZED


def _paths(adapters: Sequence[Adapter]) -> str:
    return " + ".join(str(adapter.path) for adapter in adapters)
