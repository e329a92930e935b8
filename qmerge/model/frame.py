"""The model without its decoder layers: what happens before, between and after them.

The model's own forward is run with its layers replaced: by recorders, to learn the first hidden
states and what each layer is called with; by a passage, to learn what follows the last layer. So
embedding scales, learned positions, masks, rotary tables, final norms and soft caps are the
model's own, whatever it is.

W: windows, S: tokens of a window, H: hidden width, R: rows, V: vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map

from qmerge.errors import ModelError
from qmerge.model.layer import (
    Call,
    Hidden,
    WindowCalls,
    window_axes,
)
from qmerge.model.skeleton import Skeleton
from qmerge.names import module_of

Inputs = Mapping[str, torch.Tensor]
"""What a model takes beside its tokens, by name; joined over windows along the first axis."""
ROWS_AT_ONCE = 8192
"""Rows of an embedding or head that are held as float32 at one time."""


class OuterWeights(Protocol):
    """Parameters outside the decoder layers, by parameter name."""

    def tensor(self, name: str) -> torch.Tensor: ...
    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...
    def row_count(self, name: str) -> int: ...
    def holds(self, name: str) -> bool: ...


class GivenWeights:
    """Outer weights that are all at hand, by name."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def tensor(self, name: str) -> torch.Tensor:
        return self._state[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._state[name][start:stop]

    def row_count(self, name: str) -> int:
        return self._state[name].shape[0]

    def holds(self, name: str) -> bool:
        return name in self._state


class Frame:
    """One arm's embedding, final norm and head around absent decoder layers."""

    def __init__(self, skeleton: Skeleton, weights: OuterWeights) -> None:
        self._model: Any = copy.deepcopy(skeleton.fused)
        self._layers = [
            self._model.get_submodule(skeleton.layer_path(i)) for i in range(skeleton.layer_count)
        ]
        self._weights = weights
        self._embedding = self._model.get_input_embeddings()
        # It would be looked for among the rows at hand, which are never all there are.
        self._embedding.padding_idx = None
        self._head = self._model.get_output_embeddings()
        aliases = skeleton.tied()
        embedding = _weight_name(self._model, self._embedding)
        self._embedding_name = aliases.get(embedding, embedding)
        head = _weight_name(self._model, self._head)
        self._head_name = head if weights.holds(head) else aliases.get(head, head)
        self.embedding_path, self.head_path = module_of(embedding), module_of(head)
        self._tower = skeleton.tower()
        large = {embedding, head, *aliases, *self._tower}
        inside = f"{skeleton.layers_path}."
        small = {
            name: weights.tensor(name)
            for name in skeleton.parameters()
            if not name.startswith(inside) and name not in large
        }
        self._model.load_state_dict(skeleton.turn("", small), strict=False, assign=True)
        self._model.requires_grad_(False)
        self._returned: int | None = None
        self._sample_layer = skeleton.layer(0).to("meta")

    @property
    def vocabulary(self) -> int:
        return self._weights.row_count(self._head_name)

    def enter(
        self, tokens_WS: torch.Tensor, inputs: Inputs | None = None
    ) -> tuple[Hidden, tuple[Call, ...]]:
        """Hidden states before the first layer [W, S, H], and what each layer is called with.

        `inputs` are what the model takes beside the tokens: images and where they are.
        """
        calls: list[Call] = []
        first: list[Hidden] = []

        def recorder(hidden: Hidden, *args: Any, **kwargs: Any) -> Any:
            # After the first layer nothing but what the model itself adds between its layers.
            added = hidden.to_sparse(2) if inputs and first and bool(hidden.any()) else None
            if not first:
                first.append(hidden)
            calls.append(Call(args=args, kwargs=kwargs, added=added))
            if len(calls) == len(self._layers):
                raise _Recorded
            return self._as_layer_returns(
                hidden.new_zeros(hidden.shape) if inputs else hidden, calls[0]
            )

        for layer in self._layers:
            layer.forward = recorder
        try:
            with self._rows_of(tokens_WS), torch.inference_mode():
                self._model(input_ids=tokens_WS, use_cache=False, **(inputs or {}))
        except _Recorded:
            return first[0], tuple(calls)
        raise ModelError(
            f"{type(self._model).__name__} ran {len(calls)} of its {len(self._layers)} layers",
            hint="qmerge walks models that run each decoder layer once, in order",
        )

    def enter_all(
        self,
        tokens_WS: torch.Tensor,
        inputs: Sequence[Inputs],
        at_once: int,
        keep: Callable[[Hidden], None],
    ) -> tuple[Call, ...]:
        """First hidden states of every window, in order, to `keep`; what each layer is called with.

        Windows with `inputs` of their own, one for each, pass one by one, and the tower is read
        for them and let go.
        """
        if not inputs:
            for start in range(0, len(tokens_WS), at_once):
                keep(self.enter(tokens_WS[start : start + at_once])[0])
            return self.calls(tokens_WS.shape[1])
        entered = []
        with self._seeing():
            for tokens_S, own in zip(tokens_WS, inputs, strict=True):
                hidden, calls = self.enter(tokens_S[None], own)
                keep(hidden)
                entered.append(calls)
            shown = max(range(len(inputs)), key=lambda window: len(inputs[window]))
            twice = {name: torch.cat((value, value)) for name, value in inputs[shown].items()}
            _, two = self.enter(tokens_WS[[shown, shown]], twice)
        return tuple(
            WindowCalls(windows=windows, axes=window_axes(windows[shown], both))
            for windows, both in zip(zip(*entered, strict=True), two, strict=True)
        )

    def calls(self, length: int) -> tuple[Call, ...]:
        """What each layer is called with for windows of `length` tokens, however many there are.

        Taken from one window: masks, positions and rotary tables broadcast over windows of equal
        length, which the probe proves for the architecture, or are made as many where a layer
        (XGLM's) asks for that.
        """
        hidden, calls = self.enter(torch.zeros(1, length, dtype=torch.long))
        if self._broadcasts(hidden, calls[0]):
            return calls
        _, two = self.enter(torch.zeros(2, length, dtype=torch.long))
        pairs = zip(calls, two, strict=True)
        return tuple(replace(one, axes=window_axes(one, both)) for one, both in pairs)

    def leave(self, hidden_WSH: Hidden) -> Hidden:
        """What the head reads: the hidden states after the last layer through the final norm."""
        caught: list[Hidden] = []

        def passage(_hidden: Hidden, *args: Any, **kwargs: Any) -> Any:
            return self._as_layer_returns(hidden_WSH, Call(args=args, kwargs=kwargs))

        def catch(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            caught.append(inputs[0])
            raise _Recorded

        for layer in self._layers:
            layer.forward = passage
        windows, length, _ = hidden_WSH.shape
        tokens = torch.zeros(windows, length, dtype=torch.long)
        self._embedding.weight = nn.Parameter(
            self._weights.rows(self._embedding_name, 0, 1), requires_grad=False
        )
        handle = self._head.register_forward_pre_hook(catch)
        try:
            with torch.inference_mode():
                self._model(input_ids=tokens, use_cache=False)
        except _Recorded:
            return caught[0]
        finally:
            handle.remove()
        raise ModelError(f"{type(self._model).__name__} does not end in its output embedding")

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """The head's weight for tokens [start, stop), fewer at the vocabulary's end: [v, H]."""
        return self._weights.rows(self._head_name, start, min(stop, self.vocabulary))

    def logits(self, rows_RH: Hidden, start: int, weight_VH: torch.Tensor) -> torch.Tensor:
        """Logits [R, v] of one slice of the vocabulary, with the model's own scale and soft cap."""
        stop = start + weight_VH.shape[0]
        bias = getattr(self._head, "bias", None)
        self._head.weight = nn.Parameter(weight_VH, requires_grad=False)
        decoders = {self._model.base_model, self._model.get_decoder()}
        for decoder in decoders:
            decoder.forward = lambda *_a, **_k: _decoder_output(rows_RH[None])
        if bias is not None:
            part = bias[start:stop].to(weight_VH.device)
            self._head.bias = nn.Parameter(part, requires_grad=False)
        try:
            with torch.inference_mode():
                output = self._model(
                    input_ids=torch.zeros(1, rows_RH.shape[0], dtype=torch.long), use_cache=False
                )
        finally:
            for decoder in decoders:
                del decoder.forward
            if bias is not None:
                self._head.bias = bias
        logits: torch.Tensor = output.logits[0]
        return logits

    def _as_layer_returns(self, hidden_WSH: Hidden, call: Call) -> Any:
        """Hidden states in the form that this model's loop expects of a layer: bare or in a tuple,
        with nothing where a layer may return its attention.

        Learnt once by running the layer on the meta device, where nothing is computed. A layer that
        cannot run there (experts ask which tokens they got) is taken as bare; the probe would tell.
        """
        if self._returned is None:
            args, kwargs = tree_map(_to_meta, (call.args, dict(call.kwargs)))
            try:
                output = self._sample_layer(hidden_WSH.to("meta"), *args, **kwargs)
            except NotImplementedError:
                output = hidden_WSH
            self._returned = len(output) if isinstance(output, tuple) else 0
        return (hidden_WSH, *[None] * (self._returned - 1)) if self._returned else hidden_WSH

    def _broadcasts(self, hidden_1SH: Hidden, call: Call) -> bool:
        """Whether a layer runs two windows with the call of one, tried on the meta device."""
        args, kwargs = tree_map(_to_meta, (call.args, dict(call.kwargs)))
        try:
            self._sample_layer(hidden_1SH.to("meta").expand(2, -1, -1), *args, **kwargs)
        except NotImplementedError:
            return True
        except (AssertionError, RuntimeError, ValueError):
            return False
        return True

    @contextmanager
    def _rows_of(self, tokens_WS: torch.Tensor) -> Iterator[None]:
        """An embedding that holds the rows of these tokens, and finds them by the tokens' ids."""
        used = torch.unique(tokens_WS)
        rows = self._gather(self._embedding_name, used)
        self._embedding.weight = nn.Parameter(rows, requires_grad=False)

        def place(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[torch.Tensor]:
            # An id that is not there is put in by the model where an image's features will be.
            return (torch.searchsorted(used, inputs[0].contiguous()).clamp(max=len(used) - 1),)

        handle = self._embedding.register_forward_pre_hook(place)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _seeing(self) -> Iterator[None]:
        """The tower's weights in memory, for as long as there are images to look at."""
        empty = {n: t for n, t in self._model.state_dict().items() if n in self._tower}
        own = {name: self._weights.tensor(name) for name in self._tower}
        self._model.load_state_dict(own, strict=False, assign=True)
        try:
            yield
        finally:
            self._model.load_state_dict(empty, strict=False, assign=True)

    def _gather(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (sorted) of a large tensor, read in slices."""
        parts = []
        for start in range(0, self._weights.row_count(name), ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, self._weights.row_count(name))
            inside = ids[(ids >= start) & (ids < stop)]
            if len(inside):
                parts.append(self._weights.rows(name, start, stop)[inside - start])
        return torch.cat(parts)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


class _Recorded(Exception):
    """Ends a forward whose rest is not needed."""


def _decoder_output(hidden: Hidden) -> Any:
    """What a decoder returns, with nothing in it but the last hidden states."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Bare(BaseModelOutputWithPast):  # type: ignore[misc]
        def __getattr__(self, name: str) -> None:
            # Router logits, cross attentions and such: not asked for, so absent.
            if name.startswith("__"):
                raise AttributeError(name)

    return Bare(last_hidden_state=hidden)


def _weight_name(model: nn.Module, module: nn.Module) -> str:
    names = (name for name, candidate in model.named_modules() if candidate is module)
    return f"{next(names)}.weight"
