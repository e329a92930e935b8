"""One adapted submodule: where its base weights go, and how PEFT lays its layers on them.

PEFT builds a tuner layer by looking at the base layer (some starts decompose its weight, DoRA takes
its norm), so a layer that was made on the meta device is made again by PEFT once its base weights
are there. What follows is what `PeftModel.from_pretrained` would have had, one submodule at a time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from qmerge.errors import AdapterError
from qmerge.names import join, under

HELD = "held"
GPTQ_LIBRARY = "gptqmodel"
SEED = 0
LAID = "_qmerge_laid"
PATH = "_qmerge_path"
"""Where a live module keeps its path in the whole model."""
CARRIED = (
    "shira_indices",
    "unilora_indices_A",
    "unilora_indices_B",
    "unilora_scales_A",
    "unilora_scales_B",
)
"""What PEFT settles for the whole model, or reads from the file, outside a layer's own making."""
ADAPTER = "default"
"""The name PEFT files a single adapter under."""


@contextmanager
def only_dense_layers() -> Iterator[None]:
    """Keep PEFT from looking for GPTQ layers, of which a decoded model has none.

    It looks by importing gptqmodel where that is installed, which takes ten seconds or more, prints
    a banner to stdout and sets loggers and the environment to its liking.
    """
    from peft.import_utils import is_gptqmodel_available

    def forget() -> None:
        clear = getattr(is_gptqmodel_available, "cache_clear", None)
        if clear is not None:
            clear()

    before = sys.modules.get(GPTQ_LIBRARY)
    sys.modules[GPTQ_LIBRARY] = None  # type: ignore[assignment]
    forget()
    try:
        yield
    finally:
        if before is None:
            del sys.modules[GPTQ_LIBRARY]
        else:
            sys.modules[GPTQ_LIBRARY] = before
        forget()


class Held(nn.Module):
    """A submodule that is itself adapted, one level down, so that PEFT can replace it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.held(*args, **kwargs)


def is_tuner(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def is_wrapper(module: nn.Module) -> bool:
    """Whether it stands for a module that was trained as a whole, or by some of its rows."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, AuxiliaryTrainingWrapper)


def base_of(module: nn.Module) -> nn.Module:
    """The model's own module under any tuner layers and wrappers."""
    while is_tuner(module) or is_wrapper(module):
        module = module.base_layer if is_tuner(module) else module.original_module  # type: ignore[assignment]
    return module


def adapted_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Outermost tuner layers and wrappers below `module`, by plain path."""
    if is_tuner(module) or is_wrapper(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from adapted_modules(child, path if isinstance(module, Held) else join(path, name))


class Slot(NamedTuple):
    """A place for a base parameter."""

    name: str
    """Plain name."""
    owner: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.owner._parameters[self.attribute]
        assert parameter is not None
        return parameter

    def put(self, tensor: torch.Tensor) -> None:
        if self.attribute in self.owner._buffers:
            self.owner._buffers[self.attribute] = tensor
        else:
            self.owner._parameters[self.attribute] = nn.Parameter(tensor, requires_grad=False)


def base_slots(module: nn.Module, path: str = "") -> Iterator[Slot]:
    """Every base parameter below `module`, tied ones once for each name."""
    module = base_of(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Slot(join(path, name), module, name)
    for name, child in module.named_children():
        yield from base_slots(child, path if isinstance(module, Held) else join(path, name))


def buffer_slots(module: nn.Module, path: str = "") -> Iterator[Slot]:
    """Every buffer below `module` that a checkpoint holds, such as what corrects a router."""
    module = base_of(module)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield Slot(join(path, name), module, name)
    for name, child in module.named_children():
        yield from buffer_slots(child, path if isinstance(module, Held) else join(path, name))


def plain_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a module that is not adapted, by name."""
    buffers = {slot.name: slot.owner._buffers[slot.attribute] for slot in buffer_slots(module)}
    parameters = {name: parameter.data for name, parameter in module.named_parameters()}
    return parameters | {name: tensor for name, tensor in buffers.items() if tensor is not None}


def changed_parameters(module: nn.Module) -> set[str]:
    """Names of the base parameters that an adapted module may change, relative to it."""
    names = {slot.name for slot in base_slots(module)}
    parameters = set()
    layer = module
    while hasattr(layer, "lora_A"):
        parameters.add(getattr(layer, "parameter_name", "weight"))
        parameters |= {"bias"} if any(layer.lora_bias.values()) else set()  # type: ignore[operator]
        layer = layer.base_layer  # type: ignore[assignment]
    return parameters if parameters and parameters <= names else names


def brings_rows(module: nn.Module, name: str, start: int) -> bool:
    """Whether an adapted module has its own values for the rows of a parameter from `start` on."""
    rows = next((s.parameter.shape[0] for s in base_slots(module) if s.name == name), start)
    trained = trained_tokens(module)
    if trained is None:
        return is_wrapper(module)
    return set(range(start, rows)) <= set(trained)


def trained_tokens(module: nn.Module) -> tuple[int, ...] | None:
    """The tokens whose rows an adapted embedding has of its own, None for one that has all."""
    trained = getattr(getattr(module, "token_adapter", module), "token_indices", None)
    return None if trained is None else tuple(trained[ADAPTER])


def parent_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds `path`, and the attribute; the root itself must be a `Held`."""
    local = join(HELD, path) if isinstance(root, Held) else path
    parent, _, name = local.rpartition(".")
    return root.get_submodule(parent), name


def copy_out(root: nn.Module, path: str) -> nn.Module:
    """A copy of the adapted submodule at `path`, inside a `Held` where it is itself adapted."""
    module = root.get_submodule(path)
    wrapped = is_tuner(module) or is_wrapper(module)
    copied = copy.deepcopy(module)
    return Held(copied) if wrapped else copied


def hollow(model: nn.Module) -> None:
    """Give every parameter a device and no memory: one zero, seen from everywhere."""
    kept: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                kept.setdefault(id(parameter), nn.Parameter(zero, requires_grad=False))
                module._parameters[name] = kept[id(parameter)]


def back_to_meta(model: nn.Module) -> None:
    """Undo `hollow`, so that a copy costs nothing and what is filled can be told."""
    kept: dict[int, nn.Parameter] = {}
    for slot in list(base_slots(model)):
        held = slot.parameter
        meta = kept.setdefault(id(held), nn.Parameter(held.to("meta"), requires_grad=False))
        slot.owner._parameters[slot.attribute] = meta


def put(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    whole: Mapping[str, torch.Tensor],
    *,
    taken: bool,
) -> None:
    """Place base tensors, by plain name relative to the module, or in their place the `whole`
    values that training saved, by full name.

    PEFT works on base weights in place: what an adapter changes is copied, unless `tensors` are
    `taken` over; `whole` never is. Raises AdapterError for a name that the module does not have.
    """
    path = module.__dict__[PATH]
    saved = {
        name: whole[full].to(torch.float32, copy=taken) for name, full in below(whole, path).items()
    }
    slots = {slot.name: slot for slot in (*base_slots(module), *buffer_slots(module))}
    adapted = {id(slot.owner) for _, top in adapted_modules(module) for slot in base_slots(top)}
    for name, tensor in {**tensors, **saved}.items():
        if name not in slots:
            raise AdapterError(f"{path} has no parameter {name!r}")
        kept = not taken and id(slots[name].owner) in adapted
        slots[name].put(tensor.clone() if kept else tensor)


def filled(module: nn.Module) -> bool:
    """Whether every base parameter below `module` has its values."""
    return not any(slot.parameter.is_meta for slot in base_slots(module))


def lay(tuner: Any, root: nn.Module, path: str, key: str) -> nn.Module:
    """Let PEFT make the tuner layer at `path` of `root` again, on its real base layer.

    `key` is the module's name in the whole model, which rank patterns and the like match.
    """
    parent, name = parent_of(root, path)
    former = getattr(parent, name)
    base = base_of(former)
    setattr(parent, name, base)
    forked = torch.random.fork_rng(range(torch.cuda.device_count()))
    with forked, torch.no_grad(), only_dense_layers():
        # Some starts draw at random (`pissa_niter_4`); live and merged must draw the same.
        torch.manual_seed(SEED)
        try:
            tuner._create_and_replace(
                tuner.peft_config[ADAPTER], ADAPTER, base, name, parent, current_key=key
            )
        except Exception as error:  # PEFT trusts its configuration file
            raise AdapterError(f"PEFT cannot make its layer at {key}: {error}") from error
    made: nn.Module = getattr(parent, name)
    _carry(former, made)
    made.__dict__[LAID] = True
    return made


def is_laid(module: nn.Module) -> bool:
    """Whether PEFT has made this tuner layer on its real base layer."""
    return bool(module.__dict__.get(LAID, False))


def _carry(former: Any, made: Any) -> None:
    for name in CARRIED:
        settled = getattr(former, name, None)
        if settled is not None and ADAPTER in settled:
            getattr(made, name)[ADAPTER] = settled[ADAPTER]


def load(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy adapter tensors into a module.

    Those still on meta, or of another rank than the module was made with (AdaLoRA prunes ranks),
    get a place of their own in float32.
    """
    state = module.state_dict(keep_vars=True)
    present = {}
    for name, tensor in tensors.items():
        if not state[name].is_meta and state[name].shape == tensor.shape:
            present[name] = tensor
            continue
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        if attribute in owner._parameters:
            owner._parameters[attribute] = nn.Parameter(_upcast(tensor), requires_grad=False)
        else:
            owner._buffers[attribute] = _upcast(tensor)
    module.load_state_dict(present, strict=False)


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def can_scale(module: nn.Module) -> bool:
    """Whether PEFT can weigh this adapted module's update."""
    return is_tuner(module) and hasattr(module, "scale_layer")


def scale(module: nn.Module, weight: float) -> None:
    """Weigh the update of a tuner layer, and of those nested in it, as PEFT does."""
    layer = module
    while is_tuner(layer):
        layer.scale_layer(weight)  # type: ignore[operator]
        layer = layer.base_layer  # type: ignore[assignment]


def merge_out(tuner: Any, root: nn.Module) -> dict[str, torch.Tensor]:
    """Run PEFT's own merge on `root` in place and return its plain parameters.

    The tuner is copied shallowly with `root` for its model, because a merge is a walk over that
    model.
    """
    shell = copy.copy(tuner)
    shell._modules = dict(tuner._modules)
    shell.model = root if isinstance(root, Held) else Held(root)
    with torch.no_grad():
        shell._unload_and_optionally_merge(merge=True, progressbar=False)
        _unwrap(root)
    plain = root.held if isinstance(root, Held) else root
    return plain_tensors(plain)


def _unwrap(root: nn.Module) -> None:
    """Take out wrappers that a tuner's own unloading leaves in place (LN tuning does)."""
    for path, module in list(adapted_modules(root)):
        parent, name = parent_of(root, path)
        new = module.unload_and_optionally_merge_module(  # type: ignore[operator]
            merge=True, safe_merge=False, adapter_names=None
        )
        setattr(parent, name, new)


def drop(root: nn.Module, paths: Iterable[str]) -> None:
    """Put the plain modules back at those of `paths` that are adapted."""
    adapted = dict(adapted_modules(root))
    for path in adapted.keys() & set(paths):
        parent, name = parent_of(root, path)
        setattr(parent, name, base_of(adapted[path]))


def below(keys: Iterable[str], path: str) -> dict[str, str]:
    """Full names under `path`, by their relative names."""
    found = {key: under(key, path) if key != path else "" for key in keys}
    return {relative: key for key, relative in found.items() if relative is not None}
