"""A device that is not there: tensors that say that they lie on it, and compute on the CPU.

What mixes tensors of both places is refused as CUDA refuses it, so code is seen to run on a GPU
where there is none. How fast it is there, and in which bits, is not pretended.

`pretend` changes torch for good: call it in a process of its own.
"""

# mypy: disable-error-code="assignment, misc, no-untyped-call, override"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "pretended"
aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._to_copy.default}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class There(torch.Tensor):
    """A tensor on the pretended device; `held` has its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(KIND, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()


class Module(backend_registration._DummyBackendModule):
    """What `torch.autocast` asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Placing(TorchDispatchMode):
    """Tensors are made there where that is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def pretend() -> torch.device:
    """Have torch know the device from here on."""
    backend_registration._setup_privateuseone_for_python_backend(KIND, backend_module=Module())
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        found = made(data, **options)  # torch's own asks no mode
        return found if device is None else found.to(device)

    torch.tensor = tensor
    torch.inference_mode = torch.no_grad  # its tensors cannot be wrapped
    Placing().__enter__()
    return torch.device(KIND, 0)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    _refuse_mixed(func, args, tensors, there)
    place = kwargs.get("device")
    if place is not None:
        wrapped = torch.device(place).type == KIND
        kwargs = kwargs | {"device": torch.device("cpu") if wrapped else place}
    else:
        wrapped = isinstance(args[0], There) if func is aten.copy_.default else bool(there)
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
    found = func(*args, **kwargs)
    by_held = {id(x.held): x for x in there}

    def back(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in by_held:  # what was written to in place
            return by_held[id(x)]
        return There(x) if wrapped else x

    return tree_map(back, found)


def _refuse_mixed(
    func: Any, args: Any, tensors: Sequence[torch.Tensor], there: Sequence[torch.Tensor]
) -> None:
    here = [x for x in tensors if not isinstance(x, There) and x.dim() and x.device.type == "cpu"]
    indexed = func in INDEXING and isinstance(args[0], There)
    if here and there and not indexed and func not in CROSSING:
        raise RuntimeError(f"{func}: tensors of two devices")
