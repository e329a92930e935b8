"""Which linears write to a residual stream, and where that stream can be read.

A linear writes to one when its output is added to a tensor that the layer had before: the input of
the layer or of one of its modules. Found by running one window and looking for sums.

W: windows, S: tokens of a window, H: hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qmerge.model.layer import Call, Hidden, run


def residual_places(
    layer: nn.Module, hidden_1SH: Hidden, call: Call, names: Mapping[str, nn.Module]
) -> dict[str, str]:
    """The module whose input is the stream that a linear's output is added to, by linear; "" is the
    layer itself."""
    seen: list[tuple[str, torch.Tensor]] = []
    outputs: dict[str, torch.Tensor] = {}

    def see(place: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor):
                seen.append((place, inputs[0]))

        return note

    def keep(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            outputs.setdefault(name, output)

        return note

    handles = [m.register_forward_pre_hook(see(place)) for place, m in layer.named_modules()]
    handles += [m.register_forward_hook(keep(name)) for name, m in names.items()]
    try:
        last = run(layer, hidden_1SH, call)
    finally:
        for handle in handles:
            handle.remove()
    seen.append(("the output", last))
    found = {}
    for name, output in outputs.items():
        place = _added_to(output, seen)
        if place is not None:
            found[name] = place
    return found


def _added_to(output: torch.Tensor, seen: list[tuple[str, torch.Tensor]]) -> str | None:
    """The first place whose tensor plus `output` is a tensor seen later."""
    for number, (place, before) in enumerate(seen):
        if before.shape != output.shape:
            continue
        total = before + output
        for _, after in seen[number + 1 :]:
            if after.shape == total.shape and torch.equal(after, total):
                return place
    return None
