"""The same model with a head of its own, or with another number of tokens, as training left it.

The base and the original are read for the new shapes: a head that was tied has the values of the
embedding, and a token that a checkpoint does not know has the mean of those it knows, which is
where transformers starts one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qmerge.model.opening import open_weights
from qmerge.model.skeleton import TIED, Skeleton, load_config, rebuilt, text_config
from qmerge.model.weights import Weights
from qmerge.storage.checkpoint import Checkpoint

VOCABULARY = "vocab_size"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A skeleton, and how a checkpoint of the model it was made from is read for it."""

    skeleton: Skeleton
    owners: Mapping[str, str] = field(default_factory=dict)
    """Parameters that were tied to another one, which a checkpoint may hold for both."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Parameters with another number of rows."""

    def fit(self, weights: Weights) -> Weights:
        """`weights` under the names and with the rows of this skeleton."""
        stored = dict(weights.names.stored)
        added = {name: owner for name, owner in self.owners.items() if name not in stored}
        stored |= {name: stored[owner] for name, owner in added.items()}
        written = {**weights.names.written, **{name: name for name in added}}
        names = replace(weights.names, stored=stored, written=written)
        return replace(weights, names=names, resized={**weights.resized, **self.rows})


def reshape(skeleton: Skeleton, *, untied: bool = False, vocabulary: int | None = None) -> Shape:
    """`skeleton` with a head of its own, or with embeddings for `vocabulary` tokens, or both."""
    restated: dict[str, Any] = {}
    if untied and skeleton.tied():
        restated[TIED] = False
    if vocabulary is not None and vocabulary != vocabulary_of(skeleton):
        restated[VOCABULARY] = vocabulary
    if not restated:
        return Shape(skeleton=skeleton)
    made = rebuilt(skeleton, restated)
    before, own = skeleton.parameters(), made.tied()
    owners = {name: owner for name, owner in skeleton.tied().items() if name not in own}
    return Shape(
        skeleton=made,
        owners=owners,
        rows={
            name: tensor.shape[0]
            for name, tensor in made.parameters().items()
            if tensor.shape != before[owners.get(name, name)].shape
        },
    )


def vocabulary_of(skeleton: Skeleton) -> int:
    """Rows of the input embedding."""
    return int(skeleton.model.get_input_embeddings().weight.shape[0])


def restate(config: Mapping[str, Any], skeleton: Skeleton) -> dict[str, Any]:
    """A base's `config.json` as it is true of `skeleton`."""
    stated = copy.deepcopy(dict(config))
    text = stated.get("text_config")
    nested = text if isinstance(text, dict) else None
    for key, value in skeleton.restated.items():
        if nested is not None and (key == VOCABULARY or key in nested):
            nested[key] = value
        if nested is None or key == TIED or key in stated:
            stated[key] = value
    return stated


def open_sibling(
    checkpoint: Checkpoint, skeleton: Skeleton, wanted: Skeleton, *, trust_remote_code: bool = False
) -> Weights:
    """The weights of an earlier release of `skeleton`'s model for the skeleton `wanted`.

    It keeps a head that is its own; tokens that it does not know yet have the mean.
    """
    config = load_config(checkpoint.path, trust_remote_code=trust_remote_code)
    own = reshape(
        skeleton,
        untied=not getattr(config, TIED, True),
        vocabulary=int(text_config(config).vocab_size),
    ).skeleton
    weights, known, tied = open_weights(checkpoint, own), own.parameters(), own.tied()
    asked = wanted.parameters()
    return Shape(
        skeleton=wanted,
        owners={name: tied[name] for name in asked if name in tied},
        rows={
            name: tensor.shape[0]
            for name, tensor in asked.items()
            if tensor.shape > known[tied.get(name, name)].shape
        },
    ).fit(weights)
