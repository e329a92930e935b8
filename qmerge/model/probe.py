"""Proof that a model can be walked: on random weights, streamed equals plain forward.

S: tokens of a window, W: windows, R: rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qmerge.errors import ModelError
from qmerge.model.experts import opened
from qmerge.model.frame import ROWS_AT_ONCE, Frame, GivenWeights
from qmerge.model.layer import Call, fill, linears, run, sibling_groups
from qmerge.model.skeleton import Skeleton, build_skeleton, first_line, text_config
from qmerge.names import under

LAYERS, TOKENS, VOCABULARY = 2, 12, 512
"""How large a model is tried, where it needs no more layers to have one of every kind."""
TOLERANCE = 1e-4
"""How far logits may differ, as a share of the largest."""
STATE_HINT = "this architecture keeps state between its layers that qmerge does not carry"
TOKENS_HINT = (
    "this architecture gives its layers more of the tokens than the hidden states, which qmerge"
    " does not carry"
)


def probe(skeleton: Skeleton) -> frozenset[tuple[str, ...]]:
    """Run a small model of the same class layer by layer and as a whole; `ModelError` where that
    fails or differs.

    Comes back with the linears that read the same input, by their names in a layer.
    """
    small, name = _small(skeleton), type(skeleton.model).__name__
    generator = torch.Generator().manual_seed(0)
    vocabulary = text_config(small.model.config).vocab_size
    ids = torch.randint(0, vocabulary, (2, TOKENS), generator=generator)
    state = _random_state(small, generator)
    siblings, hint = set(), STATE_HINT
    try:
        expected = _plain_logits(small, state, ids)
        frame = Frame(small, GivenWeights(small.turn("", state)))
        hidden, called = frame.enter(ids)
        calls = frame.calls(TOKENS)
        hint = TOKENS_HINT if _differ(called, calls, len(ids)) else STATE_HINT
        for index, call in enumerate(calls):
            layer = _filled(small, index, state)
            siblings |= {*sibling_groups(layer, hidden, call, linears(layer))}
            hidden = run(layer, hidden, call)
        rows = frame.leave(hidden).flatten(0, 1)
        parts = [
            frame.logits(rows, start, frame.head_rows(start, start + ROWS_AT_ONCE))
            for start in range(0, frame.vocabulary, ROWS_AT_ONCE)
        ]
    except ModelError:
        raise
    except Exception as error:
        message = f"{name} cannot be run layer by layer: {first_line(error)}"
        raise ModelError(message, hint=hint) from error
    difference = (torch.cat(parts, dim=-1).view_as(expected) - expected).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        message = f"{name} run layer by layer differs from its own forward by {difference:.2g}"
        raise ModelError(message, hint=hint)
    return frozenset(siblings)


def _small(skeleton: Skeleton) -> Skeleton:
    """The same class with few layers, among them one of every kind, and a small vocabulary."""
    config = copy.deepcopy(skeleton.model.config)
    text = text_config(config)
    layers = max(LAYERS, _layers_of_every_kind(skeleton))
    kinds = getattr(text, "layer_types", None)
    if kinds:
        layers = max(layers, 1 + max(kinds.index(kind) for kind in set(kinds)))
        with suppress(AttributeError):  # where the configuration works them out by itself
            text.layer_types = kinds[: min(layers, len(kinds))]
    text.num_hidden_layers = min(layers, skeleton.layer_count)
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    try:
        return build_skeleton(config, model_class=type(skeleton.model))
    except ModelError as error:
        raise ModelError(
            f"{type(skeleton.model).__name__} cannot be made with {text.num_hidden_layers} layers,"
            f" to prove that it can be walked: {first_line(error.__cause__ or error)}",
            hint="this architecture has layers that need others, which qmerge does not walk",
        ) from error


def _plain_logits(
    skeleton: Skeleton, state: Mapping[str, torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """What transformers' own forward makes of the tokens."""
    model = copy.deepcopy(skeleton.fused)
    model.load_state_dict(dict(state), strict=False, assign=True)
    model.tie_weights()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _filled(skeleton: Skeleton, index: int, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """One layer with its weights of a state of the model that transformers builds."""
    layer, path = skeleton.layer(index), skeleton.layer_path(index)
    own = {name: t for full, t in state.items() if (name := under(full, path)) is not None}
    fill(layer, skeleton.turn(path, opened(skeleton.fusions, path, own)))
    return layer


def _differ(of_text: Sequence[Call], of_zeros: Sequence[Call], windows: int) -> bool:
    """Whether layers are called with something else for another text of the same length: the calls
    of so many windows against what those of one are made into for them."""
    text = tree_leaves([(call.args, dict(call.kwargs)) for call in of_text])
    zeros = tree_leaves([call.over(windows) for call in of_zeros])
    return any(
        isinstance(one, torch.Tensor) and not bool(torch.isclose(one, other).all())
        for one, other in zip(text, zeros, strict=True)
    )


def _random_state(skeleton: Skeleton, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Values for all that text passes through, loud enough for the logits to differ."""
    tower, aliases = skeleton.tower(), skeleton.tied()
    return {
        name: _random(meta.shape, generator)
        for name, meta in skeleton.fused.state_dict().items()
        if name not in tower and name not in aliases
    }


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Those of stacked experts overlap in memory, each a row further than the one before: hundreds
    of experts differ and take the memory of one."""
    if len(shape) == 3:
        experts, rows, columns = shape
        shared = torch.randn(experts + rows, columns, generator=generator)
        return shared.div_(columns**0.5).unfold(0, rows, 1)[:experts].transpose(1, 2)
    noise = torch.randn(shape, generator=generator)
    return noise.div_(shape[-1] ** 0.5) if len(shape) > 1 else noise.mul_(0.1).add_(1)


def _layers_of_every_kind(skeleton: Skeleton) -> int:
    """The first so many layers that have one of each make among them: dense and with experts."""
    seen: dict[frozenset[tuple[str, torch.Size]], int] = {}
    for index in range(skeleton.layer_count):
        layer = skeleton.fused.get_submodule(skeleton.layer_path(index))
        make = frozenset((name, tensor.shape) for name, tensor in layer.state_dict().items())
        seen.setdefault(make, index + 1)
    return max(seen.values())
