"""Forwards of one layer that pause before its linears.

GPTQ needs a linear's input made by the quantized linears before it. A forward that waits at a
linear until that is quantized, and then goes on with it, has to be run only once; meanwhile
others run as far, each holding no more than a layer keeps at that place. One whose linears stay as
they are need not wait: it is told to go on where it holds less behind a linear than before it.

W: windows, S: tokens of a window, H: hidden width, I: in features of the linear.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils._pytree import tree_leaves

from qmerge.model.layer import Call, Hidden, forward


class Forward(greenlet):
    """A micro-batch [W, S, H] on its way through a layer whose pauses are `watched`.

    `begin` runs it. It waits before the linears in `stops`, which may shrink meanwhile. `at` is the
    one that it waits before, `inputs` [W, S, I] what that is about to read, and `stream` the
    residual stream that its output will be added to, if any.
    """

    def __init__(self, begin: Callable[[], Hidden], stops: Collection[str]) -> None:
        super().__init__()
        self.at: str | None = None
        self.inputs: torch.Tensor | None = None
        self.streams: dict[str, torch.Tensor] = {}
        self._begin = begin
        self._stops = stops
        self._output: Hidden | None = None

    def run(self) -> None:
        self._output = self._begin()
        self.streams.clear()

    @property
    def stream(self) -> torch.Tensor | None:
        return self.streams.get(self.at) if self.at else None

    def reach(self, name: str) -> bool:
        """Go on to the next stop unless waiting at one; whether that is `name`."""
        if self.at not in self._stops and not self.dead:
            self.go_on()
        return self.at == name

    def finish(self) -> Hidden:
        """Go on to the end, past any stop; what the layer puts out, told once."""
        while not self.dead:
            self.go_on()
        output, self._output = self._output, None
        assert output is not None
        return output

    def drop(self) -> None:
        """End it where it waits."""
        if not self.dead:
            self.throw()

    def passes(self, name: str, inputs: torch.Tensor) -> None:
        """Called inside the forward, before a watched linear."""
        if name in self._stops:
            self.at, self.inputs = name, inputs
            assert self.parent is not None
            self.parent.switch()

    def go_on(self) -> None:
        """Go on to the next stop or to the end."""
        self.at = self.inputs = None
        # Entered at every switch: a mode that a forward entered by itself would outlast its pause.
        with torch.inference_mode():
            self.switch()


@contextmanager
def watched(
    layer: nn.Module, before: Mapping[str, nn.Module], places: Mapping[str, str]
) -> Iterator[None]:
    """While this lasts, every `Forward` of the layer pauses `before` its linears.

    `places` names the modules whose input is the residual stream that a linear's output is added
    to, by linear (`residual_places`).
    """

    def pause(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            current = getcurrent()
            if isinstance(current, Forward):
                current.passes(name, inputs[0])

        return hook

    def note(names: list[str]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            current = getcurrent()
            if isinstance(current, Forward):
                current.streams.update(dict.fromkeys(names, inputs[0]))

        return hook

    handles = []
    for place in dict.fromkeys(places.values()):
        names = [name for name, own in places.items() if own == place]
        module = layer.get_submodule(place) if place else layer
        handles.append(module.register_forward_pre_hook(note(names)))
    handles += [module.register_forward_pre_hook(pause(name)) for name, module in before.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def held_bytes(
    layer: nn.Module, hidden_WSH: Hidden, call: Call, before: Mapping[str, nn.Module]
) -> dict[str, int]:
    """What a forward holds before each of the linears, in their order, and in the end (""), without
    weights and what layers are called with.

    On the meta device nothing is computed for it.
    """
    shared = _storages([call.args, dict(call.kwargs)])
    waiting = Forward(lambda: forward(layer, hidden_WSH, call), before)
    found: dict[str, int] = {}
    with watched(layer, before, {}):
        waiting.go_on()
        while not waiting.dead:
            named = _named(waiting.gr_frame)
            held, at = sum(size for key, size in named.items() if key not in shared), waiting.at
            assert at is not None
            found[at] = max(held, found.get(at, 0))  # a layer may run one more than once
            waiting.go_on()
    return found | {"": sum(_storages([waiting.finish()]).values())}


class Held(NamedTuple):
    """Bytes of forwards that wait before a linear, at most: of one alone, and of one and another
    beside it that goes on where it gets `lighter`."""

    alone: int
    together: int

    def of(self, streams: int) -> int:
        return self.alone if streams == 1 else self.together


def most_held(held: Mapping[str, int]) -> Held:
    """The most that forwards hold at any place, from `held_bytes`."""
    steps = [*pairwise(held.values())]
    return Held(
        alone=max((here for here, _ in steps), default=0),
        together=max((here + min(here, after) for here, after in steps), default=0),
    )


def lighter(held: Mapping[str, int]) -> frozenset[str]:
    """The linears behind which a forward holds less than before them."""
    steps = pairwise(held.items())
    return frozenset(name for (name, here), (_, after) in steps if after < here)


def _named(frame: FrameType | None) -> dict[int, int]:
    """Storages of the tensors that a frame and those that called it have names for."""
    found: dict[int, int] = {}
    while frame is not None:
        found |= _storages([*frame.f_locals.values()])
        frame = frame.f_back
    return found


def _storages(values: Any) -> dict[int, int]:
    """Bytes of what tensors other than parameters are stored in, by where that is."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return {
        (storage := tensor.untyped_storage())._cdata: storage.nbytes()
        for tensor in tensors
        if not isinstance(tensor, nn.Parameter)
    }
