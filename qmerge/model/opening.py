"""A checkpoint's folder as a model: its skeleton, and its weights under the skeleton's names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qmerge.errors import Fault, PlanError
from qmerge.formats import open_format
from qmerge.model.skeleton import Skeleton, build_skeleton, load_config, map_names
from qmerge.model.weights import Weights
from qmerge.storage.checkpoint import Checkpoint

LISTED = 4
"""Names that a message lists before it says how many more there are."""


def open_model(folder: Path, *, trust_remote_code: bool = False) -> tuple[Skeleton, Weights]:
    """Open a checkpoint and match every tensor of it with a parameter, names and shapes.

    Raises `PlanError` with all that does not match, `CheckpointError` or `ModelError` before that.
    """
    checkpoint = Checkpoint.open(folder, config_required=True)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(config, trust_remote_code=trust_remote_code)
    return skeleton, open_weights(checkpoint, skeleton)


def open_weights(checkpoint: Checkpoint, skeleton: Skeleton) -> Weights:
    """The weights of a checkpoint for a skeleton that is already there."""
    form = open_format(checkpoint)
    names = map_names(skeleton, form.weights)
    shapes = {
        stored: (tuple(form.weights[stored].shape), tuple(tensor.shape))
        for parameter, tensor in skeleton.parameters().items()
        if (stored := names.stored.get(parameter)) is not None
    }
    wrong = [
        f"{name} is {list(found)}, the configuration says {list(expected)}"
        for name, (found, expected) in shapes.items()
        if found != expected
    ]
    where = str(checkpoint.path)
    complaints = (
        ("tensors that the model does not know", names.unknown, "the folder holds another model"),
        ("no tensor for", names.missing, "copy the missing files of the checkpoint again"),
        ("shapes differ:", wrong, "config.json and the weights are not of the same model"),
    )
    faults = [
        Fault(where=where, message=f"{what} {listed(items)}", hint=hint)
        for what, items, hint in complaints
        if items
    ]
    if faults:
        raise PlanError(faults)
    return Weights(format=form, names=names, checkpoint=checkpoint)


def listed(items: Sequence[str]) -> str:
    """A few items, and how many more there are."""
    rest = len(items) - LISTED
    return ", ".join(items[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
