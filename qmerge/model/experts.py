"""Experts as linears of their own, where transformers keeps them fused.

In memory transformers stacks what the experts of a block have in common in one 3-D parameter.
Checkpoints, servers and quantizers know the linears of each expert. How the one becomes the other
is said by transformers' own conversion mapping and only there; here a block is built from what
the mapping takes the parameters apart into, so that an expert's linear is a linear like any other,
by its name on disk. The probe of a plan proves that such a block computes what the model's does.

T: tokens, H: hidden width, K: experts that a token is sent to, E: experts of a block.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qmerge.names import join, under

PART = re.compile(r"(\d+)\.(\w+)\.weight")
INWARD = ("gate_up_proj", "up_proj")
OUTWARD = "down_proj"
"""What transformers calls the parameters of every experts module that its kernels can run."""
CHOICE = "choice"
"""A module of a block that is called with the experts that tokens chose, before any is run."""
HESSIAN_BYTES = 1 << 31
"""Second moments of what experts read that are gathered at one time."""
NAMED_AFTER = "qwen2_moe"
"""The model type whose names single experts get where transformers knows none of their own: those
that servers and quantizers give them, too."""
ENOUGH = 4
"""An expert is calibrated with its own tokens if they are at least its width divided by this."""


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """A fused parameter, and the weights of single experts that it is made of."""

    parameter: str
    parts: tuple[str, ...]
    """Parameters of the opened model, in transformers' order: by projection, then by expert."""
    shapes: tuple[tuple[int, ...], ...]
    converter: Any
    model: Any
    borrowed: bool = False
    """Whether the parts have names that transformers knows of another model type alone: it opens
    this one fused only."""

    def fuse(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The fused parameter of all its parts."""
        converter = copy.deepcopy(self.converter)
        for name in self.parts:
            target, pattern = converter.rename_source_key(name)
            converter.add_tensor(target, name, pattern, parts[name])
        return _only(converter.convert(self.parameter, model=self.model, config=self.model.config))

    def split(self, fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of the fused parameter."""
        parts = _take_apart(self.converter, self.parameter, fused, self.model)
        return {name: parts[name] for name in self.parts}


def find_fusions(model: Any) -> tuple[Fusion, ...]:
    """The fused parameters of a model on the meta device whose experts can be opened.

    Those are blocks without biases, all of whose parameters consist of two-dimensional weights of
    single experts. Others stay as they are, which leaves their experts dense.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        get_model_conversion_mapping,
    )
    from transformers.core_model_loading import WeightConverter

    own = get_model_conversion_mapping(model, add_legacy=False)
    others = get_checkpoint_conversion_mapping(NAMED_AFTER) or []
    converters = [
        (entry, borrowed)
        for mapping, borrowed in ((own, False), (others, True))
        for entry in mapping
        if isinstance(entry, WeightConverter)
    ]
    found: list[Fusion] = []
    for path, module in model.named_modules():
        if _is_fused(module):
            block = [_fusion(model, path, name, converters) for name in module._parameters]
            found += [fusion for fusion in block if fusion is not None and None not in block]
    return tuple(found)


def _is_fused(module: nn.Module) -> bool:
    """Whether this is an experts module as transformers' kernels know it, plain enough to open."""
    unlike = ("has_bias", "has_post_expert_norm", "is_transposed")
    plain = all(getattr(module, name, True) is False for name in unlike)
    return plain and {OUTWARD, _inward(module)} == {name for name, _ in module.named_parameters()}


def _inward(module: nn.Module) -> str:
    return INWARD[0] if getattr(module, "has_gate", True) else INWARD[1]


def _fusion(
    model: Any, path: str, name: str, converters: Iterable[tuple[Any, bool]]
) -> Fusion | None:
    parameter = join(path, name)
    fused = model.get_parameter(parameter)
    for converter, borrowed in converters:
        parts = _take_apart(converter, parameter, fused, model)
        inside = [PART.fullmatch(under(part, path) or "") for part in parts]
        if parts and all(inside) and all(part.dim() == 2 for part in parts.values()):
            return Fusion(
                parameter=parameter,
                parts=tuple(parts),
                shapes=tuple(tuple(part.shape) for part in parts.values()),
                converter=converter,
                model=model,
                borrowed=borrowed,
            )
    return None


def _take_apart(
    converter: Any, parameter: str, fused: torch.Tensor, model: Any
) -> dict[str, torch.Tensor]:
    """What a converter saves a parameter as, by name; nothing where it is not for it."""
    reverse = converter.reverse_transform()
    first, pattern = reverse.rename_source_key(parameter)
    if pattern is None:
        return {}
    reverse.add_tensor(first, parameter, pattern, fused.detach())
    return dict(reverse.convert(first, model=model, config=model.config))


def _only(converted: Mapping[str, Any]) -> torch.Tensor:
    (value,) = converted.values()
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor


class Expert(nn.Module):
    """The linears of one expert: those that read its tokens side by side, and the one after."""

    def __init__(self, inward: Mapping[str, nn.Linear], outward: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, linear in (*inward.items(), *outward.items()):
            self.add_module(name, linear)
        self._inward = tuple(inward)
        (self._outward,) = outward

    def forward(
        self, tokens_TH: torch.Tensor, gate: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        inner = [self.get_submodule(name)(tokens_TH) for name in self._inward]
        outward: torch.Tensor = self.get_submodule(self._outward)(gate(torch.cat(inner, dim=-1)))
        return outward


class Experts(nn.Module):
    """The experts of one block, each a module under its number.

    Every expert is run, if only on no token, so that whoever listens hears of all of them.
    """

    own: Any
    """The model's own module, for its activation. Not a submodule: its parameters stay empty."""

    def __init__(self, own: nn.Module, experts: Sequence[Expert]) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self.__dict__["own"] = own
        self.least = 0
        """An expert that fewer tokens chose than this is run on every token of the block, and what
        it makes of those that did not choose it is dropped: for calibrating it."""
        self.chosen: list[int] | None = None
        """While calibrating, how many tokens of the whole text chose each expert."""
        self.add_module(CHOICE, nn.Identity())

    @property
    def experts(self) -> list[Expert]:
        return [module for module in self.children() if isinstance(module, Expert)]

    @property
    def width(self) -> int:
        """Features of a token."""
        return next(self.parameters()).shape[1]

    def count(self, index_TK: torch.Tensor) -> list[int]:
        """How many tokens chose each expert."""
        counted: list[int] = index_TK.flatten().bincount(minlength=len(self.experts)).tolist()
        return counted

    def forward(
        self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        gate = self.own._apply_gate if self.own.has_gate else self.own.act_fn
        total_TH = torch.zeros_like(hidden_TH)
        self.get_submodule(CHOICE)(index_TK)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(index_TK == number)
            if self.chosen is not None and self.chosen[number] < self.least:
                made = expert(hidden_TH, gate)[token]
            else:
                made = expert(hidden_TH[token], gate)
            made = made * weights_TK[token, place, None]
            total_TH.index_add_(0, token, made.to(total_TH.dtype))
        return total_TH


def open_experts(model: nn.Module, fusions: Sequence[Fusion]) -> None:
    """Put an `Experts` in place of every experts module whose parameters are all fusions."""
    blocks: dict[str, dict[str, Fusion]] = defaultdict(dict)
    for fusion in fusions:
        path, _, name = fusion.parameter.rpartition(".")
        blocks[path][name] = fusion
    for path, block in blocks.items():
        own = model.get_submodule(path)
        inward, outward = (_linears(block[name], path) for name in (_inward(own), OUTWARD))
        experts = [Expert(inward[number], outward[number]) for number in sorted(inward)]
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).add_module(name, Experts(own, experts))


def _linears(fusion: Fusion, path: str) -> dict[int, dict[str, nn.Linear]]:
    """A fusion's parts as linears on the meta device, by expert and name."""
    found: dict[int, dict[str, nn.Linear]] = defaultdict(dict)
    for part, (out_features, in_features) in zip(fusion.parts, fusion.shapes, strict=True):
        number, name = PART.fullmatch(under(part, path) or "").groups()  # type: ignore[union-attr]
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        found[int(number)][name] = linear
    return found


def opened(fusions: Iterable[Fusion], path: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of a module of the fused model, by relative name, as the opened model has them."""
    parts = dict(tensors)
    for fusion in fusions:
        name = under(fusion.parameter, path)
        if name is not None and name in parts:
            split = fusion.split(parts.pop(name))
            parts |= {under(part, path) or part: tensor for part, tensor in split.items()}
    return parts


def closed(fusions: Iterable[Fusion], path: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `opened`."""
    whole = dict(tensors)
    for fusion in fusions:
        name = under(fusion.parameter, path)
        if name is not None and (under(fusion.parts[0], path) or "") in whole:
            parts = {part: whole.pop(under(part, path) or part) for part in fusion.parts}
            whole[name] = fusion.fuse(parts)
    return whole


@contextmanager
def calibrating(layer: nn.Module, chosen: Mapping[str, list[int]] | None = None) -> Iterator[None]:
    """While a layer is calibrated, experts that too few tokens chose read every token.

    `chosen` says by block how many tokens of the whole text chose each expert; without it that has
    to be set before the first expert is run.
    """
    blocks = dict(blocks_of(layer))
    for path, block in blocks.items():
        block.least = block.width // ENOUGH
        block.chosen = chosen[path] if chosen is not None else None
    try:
        yield
    finally:
        for block in blocks.values():
            block.least, block.chosen = 0, None


def count_choices(
    layer: nn.Module, forwards: Iterable[Callable[[], object]]
) -> dict[str, list[int]]:
    """How many tokens chose each expert of each block in all of some forwards of a layer.

    A layer without experts is not run.
    """
    blocks = dict(blocks_of(layer))
    if not blocks:
        return {}
    chosen = {path: [0] * len(block.experts) for path, block in blocks.items()}

    def hook(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def note(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            counted = blocks[path].count(inputs[0])
            chosen[path] = [a + b for a, b in zip(chosen[path], counted, strict=True)]

        return note

    handles = [
        block.get_submodule(CHOICE).register_forward_pre_hook(hook(path))
        for path, block in blocks.items()
    ]
    try:
        for forward in forwards:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return chosen


def blocks_of(layer: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The opened experts below a layer, by path."""
    for path, module in layer.named_modules():
        if isinstance(module, Experts):
            yield path, module
