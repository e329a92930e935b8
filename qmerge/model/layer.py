"""One decoder layer: fill it with weights, run it, find its linear sites.

S: tokens of a window, H: hidden width, W: windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from qmerge.errors import ModelError

Hidden = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Call:
    """What the model itself passes to a decoder layer beside the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    added: torch.Tensor | None = None
    """What the model adds to the hidden states before this layer, sparse in all but the width."""
    axes: tuple[int | None, ...] = ()
    """Along which axis each tensor of a call of one window has to be as many as are run; None for
    what they share, and nothing at all where the layer itself lets all of them broadcast."""

    def over(self, windows: int) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """What so many windows that are run together are called with."""
        if not self.axes:
            return self.args, self.kwargs
        leaves, form = tree_flatten((self.args, dict(self.kwargs)))
        wide = [
            leaf if axis is None else _widened(leaf, axis, windows)
            for leaf, axis in zip(leaves, self.axes, strict=True)
        ]
        args, kwargs = tree_unflatten(wide, form)
        return args, kwargs

    def part(self, _start: int, _stop: int) -> Call:
        """The call for some windows of a text: for text alone they are all called alike."""
        return self


@dataclass(frozen=True, kw_only=True)
class WindowCalls(Call):
    """The calls of windows that differ in more than their tokens, to be joined as they are run."""

    windows: tuple[Call, ...]

    def part(self, start: int, stop: int) -> Call:
        chosen = self.windows[start:stop]
        own = [tree_flatten((call.args, dict(call.kwargs))) for call in chosen]
        joined = [
            values[0] if axis is None else torch.cat(values, axis)
            for values, axis in zip(
                zip(*(leaves for leaves, _ in own), strict=True), self.axes, strict=True
            )
        ]
        args, kwargs = tree_unflatten(joined, own[0][1])
        return Call(args=args, kwargs=kwargs, added=_joined([call.added for call in chosen]))


def _widened(leaf: torch.Tensor, axis: int, windows: int) -> torch.Tensor:
    """What one window is called with, for so many: over again where the axis has others beside the
    windows in it, such as BLOOM's heads."""
    if leaf.shape[axis] == 1:
        return leaf.expand(*leaf.shape[:axis], windows, *leaf.shape[axis + 1 :])
    return torch.cat([leaf] * windows, axis)


def _joined(added: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """What is added to several windows joined, zeros for those that nothing is added to."""
    some = next((each for each in added if each is not None), None)
    if some is None:
        return None
    nothing = torch.zeros_like(some)
    return torch.cat([nothing if each is None else each for each in added])


def window_axes(one: Call, two: Call) -> tuple[int | None, ...]:
    """Where the tensors of a call have the windows, from the calls of one window and of two."""
    pairs = (tree_leaves((call.args, dict(call.kwargs))) for call in (one, two))
    return tuple(
        next((axis for axis, size in enumerate(first.shape) if size != second.shape[axis]), None)
        if isinstance(first, torch.Tensor)
        else None
        for first, second in zip(*pairs, strict=True)
    )


def called_bytes(calls: Sequence[Call]) -> int:
    """Bytes of what layers are called with; what several share counts once."""
    each = [own for call in calls for own in getattr(call, "windows", (call,))]
    leaves = tree_leaves([(call.args, dict(call.kwargs), call.added) for call in each])
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
    parts = [_stored(tensor) for tensor in tensors.values()]
    return sum(part.nbytes for own in parts for part in own)


def _stored(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return (tensor,)


def move(calls: Sequence[Call], device: torch.device) -> tuple[Call, ...]:
    """Calls with their tensors on a device; what several layers share stays shared."""
    seen: dict[int, torch.Tensor] = {}

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in seen:
            seen[id(value)] = value.to(device)
        return seen[id(value)]

    def moved(call: Call) -> Call:
        if isinstance(call, WindowCalls):
            return replace(call, windows=tuple(moved(window) for window in call.windows))
        args, kwargs = tree_map(place, (call.args, dict(call.kwargs)))
        return replace(call, args=args, kwargs=kwargs, added=place(call.added))

    return tuple(moved(call) for call in calls)


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put real tensors in place of a module's meta parameters, by relative name.

    Raises `ModelError` when one is left empty, so that no forward ever runs on nothing.
    """
    module.load_state_dict(dict(tensors), strict=False, assign=True)
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise ModelError(f"no weights for {', '.join(empty[:4])}")
    module.requires_grad_(False)


def run(layer: nn.Module, hidden_WSH: Hidden, call: Call) -> Hidden:
    """One forward of one layer."""
    with torch.inference_mode():
        return forward(layer, hidden_WSH, call)


def forward(layer: nn.Module, hidden_WSH: Hidden, call: Call) -> Hidden:
    """As `run`, in the autograd mode of the caller; a layer that returns a tuple puts the hidden
    states first."""
    if call.added is not None:
        hidden_WSH = hidden_WSH + call.added.to_dense()
    args, kwargs = call.over(len(hidden_WSH))
    output = layer(hidden_WSH, *args, **kwargs)
    result = output[0] if isinstance(output, tuple) else output
    assert isinstance(result, torch.Tensor)
    return result


@contextmanager
def before_linears(
    layer: nn.Module, names: Mapping[str, nn.Module], action: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Call `action(name, input)` right before each of the named linears runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: action(name, inputs[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in names.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}


def sibling_groups(
    layer: nn.Module, hidden_1SH: Hidden, call: Call, names: Mapping[str, nn.Module]
) -> tuple[tuple[str, ...], ...]:
    """Linears in the order they run, those that read the very same tensor together.

    Such siblings (q/k/v, gate/up) share a Hessian, and servers fuse them. Found by running one
    window; linears that did not run are groups of their own at the end.
    """
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def note(name: str, inputs: torch.Tensor) -> None:
        for tensor, members in seen:
            if tensor is inputs or (
                # Experts that no token chose all read nothing, at no address.
                inputs.numel()
                and tensor.data_ptr() == inputs.data_ptr()
                and tensor.shape == inputs.shape
            ):
                members.append(name)
                return
        # Holding the tensor keeps its address from being used again for another one.
        seen.append((inputs, [name]))

    with before_linears(layer, names, note):
        run(layer, hidden_1SH, call)
    ran = {name for _, members in seen for name in members}
    idle = [(name,) for name in names if name not in ran]
    return (*(tuple(members) for _, members in seen), *idle)
