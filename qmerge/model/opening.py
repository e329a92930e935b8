"""A checkpoint's folder as a model: its skeleton, and its weights under the skeleton's names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qmerge.errors import Fault, ModelError, PlanError
from qmerge.formats import Format, open_format
from qmerge.formats.padded import PaddedReader, Padding
from qmerge.formats.stacked import Stack, StackedReader
from qmerge.model.experts import Fusion
from qmerge.model.skeleton import (
    TIED,
    Skeleton,
    build_skeleton,
    load_config,
    map_names,
    rebuilt,
)
from qmerge.model.weights import Weights
from qmerge.names import WEIGHT, NameMap, join, listed, module_of, under
from qmerge.storage.checkpoint import Checkpoint

BIAS = ".bias"
ROWS = 1024
"""Rows that are decoded at a time."""
OWN_HEAD = (
    "the configuration ties the head to the embedding, and the checkpoint holds two that differ: as"
    " in transformers each is taken as it is stored, and tie_word_embeddings becomes false"
)
PACKED_HEAD = (
    "the configuration ties the head to the embedding, and the checkpoint holds a packed head: as"
    " in transformers the embedding is taken for both"
)
IGNORED = (
    "not read, and not in what is written, because transformers loads them for no such model: {}"
)
LEAVES_PACKED_HEADS = ("gptq", "awq")
"""Methods whose packed head transformers leaves out where the configuration ties it; gptqmodel 7.6
writes none, and opens none."""
LISTED = 4
"""Names that a message lists before it says how many more there are."""


def open_model(folder: Path, *, trust_remote_code: bool = False) -> tuple[Skeleton, Weights]:
    """Open a checkpoint and match every tensor of it with a parameter, names and shapes.

    A head that is stored beside the embedding that it is tied to, and differs from it, is its own,
    whatever the configuration says: so transformers loads it, and `told` says so. Raises
    `PlanError` with all that does not match, `CheckpointError` or `ModelError` before that.
    """
    checkpoint = Checkpoint.open(folder, config_required=True)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(config, trust_remote_code=trust_remote_code)
    form, names = _open(checkpoint, skeleton)
    pairs = names.twice.values()
    if any(_differ(form, *pair) for pair in pairs if not _is_left_out(form, pair[1])):
        skeleton = rebuilt(skeleton, {TIED: False})
        names = map_names(skeleton, form.weights)
    return skeleton, _matched(checkpoint, form, skeleton, names)


def told(skeleton: Skeleton, weights: Weights) -> tuple[str, ...]:
    """What is otherwise in a model, as it was opened, than its folder says."""
    ignored = weights.names.ignored
    notes = [IGNORED.format(listed(ignored, LISTED))] if ignored else []
    left = [_is_left_out(weights.format, second) for _, second in weights.names.twice.values()]
    if TIED in skeleton.restated:
        notes.append(OWN_HEAD)
    elif any(left):
        notes.append(PACKED_HEAD)
    return tuple(notes)


def _is_left_out(form: Format, head: str) -> bool:
    """Whether the format's runtime does not load a head that is stored beside the embedding it is
    tied to."""
    return form.weights[head].quantized and form.summary.method in LEAVES_PACKED_HEADS


def _differ(form: Format, one: str, other: str) -> bool:
    """Whether two tensors do not hold the same; what is packed is never another one's copy."""
    first, second = form.weights[one], form.weights[other]
    if first.quantized or second.quantized or first.shape != second.shape:
        return True
    total = first.shape[0]
    slices = [(start, min(start + ROWS, total)) for start in range(0, total, ROWS)]
    return any(not torch.equal(form.rows(one, *at), form.rows(other, *at)) for at in slices)


def open_weights(checkpoint: Checkpoint, skeleton: Skeleton) -> Weights:
    """The weights of a checkpoint for a skeleton that is already there."""
    form, names = _open(checkpoint, skeleton)
    return _matched(checkpoint, form, skeleton, names)


def open_original(checkpoint: Checkpoint, skeleton: Skeleton, base: Weights) -> Weights:
    """The original of a base; where the base was padded with zeros, laid out as the base is.

    A head that the base has of its own is the original's embedding where the original has none.
    Where the zeros lie is seen in one weight of the base for each size that differs. ModelError
    for a wider base whose zeros do not account for the difference.
    """
    form, names = _open(checkpoint, skeleton)
    names = _with_tied(names, skeleton)
    wide = {
        stored: base.shape(parameter)
        for parameter, stored in names.stored.items()
        if _is_wider(base.shape(parameter), form.weights[stored].shape)
    }
    kept: dict[Padding, torch.Tensor] = {}
    for dim in (0, 1):
        for parameter, stored in names.stored.items():
            if len(wide.get(stored, ())) != 2:
                continue
            pair = (form.weights[stored].shape[dim], wide[stored][dim])
            if pair[0] != pair[1] and pair not in kept:
                kept[pair] = _kept(base, parameter, dim, pair)
    if kept:
        form = PaddedReader(checkpoint, form, wide, kept)
    return _matched(checkpoint, form, skeleton, names, sibling="base")


def _open(checkpoint: Checkpoint, skeleton: Skeleton) -> tuple[Format, NameMap]:
    """A checkpoint with the experts that it holds fused taken apart, where the skeleton's are, and
    its names."""
    form = open_format(checkpoint)
    names = map_names(skeleton, form.weights)
    stacks: dict[str, Stack] = {}
    for fusion in skeleton.fusions:
        source = names.fused.get(fusion.parameter)
        if source is not None and not form.weights[source].quantized:
            stack = _stack(skeleton, fusion, source, form.weights[source].shape)
            stacks |= {source: stack} if stack is not None else {}
    if not stacks:
        return form, names
    apart = StackedReader(form, stacks)
    return apart, map_names(skeleton, apart.weights)


def _stack(skeleton: Skeleton, fusion: Fusion, source: str, shape: tuple[int, ...]) -> Stack | None:
    """What a fused tensor is made of, by the names that its parts would have beside it; None where
    they are no rows of single experts.

    Asked of the converter itself, by the numbers of the rows in place of their values. As in
    transformers, a tensor that is not of the parameter's shape may hold each expert transposed.
    """
    experts, rows, width = skeleton.fused.get_parameter(fusion.parameter).shape
    turned = shape == (experts, width, rows) != (experts, rows, width)
    if not turned and shape != (experts, rows, width):
        return None
    split = fusion.split(torch.arange(experts * rows).view(experts, rows, 1))
    names = sorted(split, key=lambda name: int(split[name][0, 0]))
    order_R1 = torch.cat([split[name] for name in names])
    if not torch.equal(order_R1.flatten(), torch.arange(experts * rows)):
        return None
    inside, beside = module_of(fusion.parameter), module_of(source)
    stored = [join(beside, under(name, inside) or name) for name in names]
    each = len(names) // experts
    return Stack(
        experts=tuple(tuple(stored[at : at + each]) for at in range(0, len(stored), each)),
        rows=tuple(split[name].shape[0] for name in names[:each]),
        turned=turned,
    )


def fused_only(skeleton: Skeleton, weights: Weights) -> dict[str, Stack]:
    """What transformers opens fused alone, and the checkpoint holds as single experts: the tensors
    that are made of those, by the names they would have beside them."""
    found: dict[str, Stack] = {}
    for fusion in skeleton.fusions:
        first, inside = fusion.parts[0], module_of(fusion.parameter)
        beside = weights.names.to_write(first).removesuffix(under(first, inside) or first)
        source = beside + (under(fusion.parameter, inside) or fusion.parameter)
        if fusion.borrowed and source not in weights.stacks:
            shape = tuple(skeleton.fused.get_parameter(fusion.parameter).shape)
            stack = _stack(skeleton, fusion, source, shape)
            found |= {source: stack} if stack is not None else {}
    return found


def _is_wider(found: tuple[int, ...], narrow: tuple[int, ...]) -> bool:
    pairs = list(zip(found, narrow, strict=False))
    return len(found) == len(narrow) and found != narrow and all(a >= b for a, b in pairs)


def _kept(base: Weights, parameter: str, dim: int, pair: Padding) -> torch.Tensor:
    """The rows (dim 0) or columns of a weight of the base that are not wholly zero."""
    found = torch.zeros(pair[1], dtype=torch.bool)
    rows = base.shape(parameter)[0]
    for start in range(0, rows, ROWS):
        part = base.rows(parameter, start, min(start + ROWS, rows)) != 0
        if dim == 0:
            found[start : start + ROWS] = part.any(dim=1)
        else:
            found |= part.any(dim=0)
    kept = found.nonzero().flatten()
    if len(kept) != pair[0]:
        what = "rows" if dim == 0 else "columns"
        raise ModelError(
            f"{parameter}: the base has {pair[1]} {what} where the original has {pair[0]}, and"
            f" {pair[1] - len(kept)} of them are zero: no padding that can be undone",
            hint="give the very model that the base was made of",
        )
    return kept


def _matched(
    checkpoint: Checkpoint,
    form: Format,
    skeleton: Skeleton,
    names: NameMap,
    *,
    sibling: str | None = None,
) -> Weights:
    """Weights whose names and shapes are the skeleton's; PlanError with all that does not match.

    The skeleton is that of the checkpoint's own configuration, or of its `sibling`'s.
    """
    weights = Weights(
        format=form,
        names=names,
        checkpoint=checkpoint,
        turned=skeleton.turned,
        stacks=form.stacks if isinstance(form, StackedReader) else {},
    )
    shapes = {
        stored: (weights.shape(parameter), tuple(tensor.shape))
        for parameter, tensor in skeleton.parameters().items()
        if (stored := names.stored.get(parameter)) is not None
    }
    wrong = [
        f"{name} is {list(found)}, the {sibling or 'configuration'} says {list(expected)}"
        for name, (found, expected) in shapes.items()
        if found != expected
    ]
    unknown = [name for name in names.unknown if not _adds_nothing(form, name)]
    unknown += names.fused.values()
    where = str(checkpoint.path)
    other = f"give the very model that the {sibling} was made of" if sibling else None
    complaints = (
        ("tensors that the model does not know", unknown, "the folder holds another model"),
        ("no tensor for", names.missing, "copy the missing files of the checkpoint again"),
        ("shapes differ:", wrong, "config.json and the weights are not of the same model"),
    )
    faults = [
        Fault(where=where, message=f"{what} {listed(items, LISTED)}", hint=other or hint)
        for what, items, hint in complaints
        if items
    ]
    if faults:
        raise PlanError(faults)
    return weights


def _with_tied(names: NameMap, skeleton: Skeleton) -> NameMap:
    """A checkpoint without a head, for a skeleton that has one though its configuration ties it:
    the embedding is the head."""
    if TIED not in skeleton.restated or not names.missing:
        return names
    owners = rebuilt(skeleton, {TIED: True}).tied()
    found = {
        name: names.stored[owners[name]]
        for name in names.missing
        if owners.get(name) in names.stored
    }
    missing = tuple(name for name in names.missing if name not in found)
    return replace(names, stored={**names.stored, **found}, missing=missing)


def _adds_nothing(form: Format, name: str) -> bool:
    """Whether it is a bias of zeros beside a packed weight: AutoGPTQ wrote one for every linear,
    also where the model has none, and transformers leaves them out."""
    weight = form.weights.get(name.removesuffix(BIAS) + WEIGHT)
    packed = name.endswith(BIAS) and weight is not None and weight.quantized
    return packed and not bool(form.dense(name).any())
