"""Put the adapter on one unit of the base: live for the `trained` arm, merged for the release.

Without an adapter a live layer is the plain one, and merging it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from qmerge.adapters import Change
from qmerge.model.layer import fill
from qmerge.model.skeleton import Skeleton
from qmerge.model.weights import Weights
from qmerge.names import Unit, join, module_of, under


def live_layer(
    skeleton: Skeleton, change: Change | None, unit: Unit, weights: Mapping[str, torch.Tensor]
) -> nn.Module:
    """The decoder layer as training saw it: `weights` (names relative to the unit) with the
    adapter running on top."""
    if change is None:
        layer = skeleton.layer(unit.index)
        fill(layer, weights)
        return layer
    layer = change.live(unit.path)
    change.fill(layer, _as_kept(skeleton, unit.path, weights))
    return layer.requires_grad_(False).eval()


def merge_layer(change: Change | None, live: nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's own merge of a live layer, which is consumed: float32, relative names."""
    if change is None:
        return dict(live.state_dict())
    return {name: tensor.contiguous() for name, tensor in change.merge(live).items()}


def _as_kept(
    skeleton: Skeleton, path: str, weights: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Transposed weights in the order of memory that transformers keeps them in, so that PEFT's
    sums over them come out equal to the last bit."""
    if not skeleton.turned:
        return weights
    turned = {name for name in weights if join(path, name) in skeleton.turned}
    return {n: t.T.contiguous().T if n in turned else t for n, t in weights.items()}


def merge_module(
    skeleton: Skeleton, change: Change, unit: Unit, parameter: str, source: Weights
) -> dict[str, torch.Tensor]:
    """Merge what has to be merged with a parameter that the adapter changes, and nothing more of
    its unit: float32, by full parameter name."""
    path = _place(change, parameter)
    names = {r: name for name in unit.parameters if (r := under(name, path)) is not None}
    dense = {relative: source.tensor(name) for relative, name in names.items()}
    live = change.live(path)
    change.fill(live, _as_kept(skeleton, path, dense), taken=not source.changed)
    del dense  # some kinds merge into new tensors: the module alone has the old ones
    merged = {join(path, name): t.contiguous() for name, t in change.merge(live).items()}
    assert parameter in merged, "a change that nobody merged"
    return merged


def _place(change: Change, parameter: str) -> str:
    """The module that a parameter is merged with: the one that owns it, or all that is trained as
    one around that, as a projector is."""
    around = [path for path in change.adapted if under(parameter, path) is not None]
    return min(around, key=len, default=module_of(parameter))


def live_outer(skeleton: Skeleton, change: Change, path: str, source: Weights) -> nn.Module:
    """An embedding or a head as training saw it, with the adapter running on top."""
    aliases = skeleton.tied()
    live = change.live(path)
    names = [name for name, _ in skeleton.model.get_submodule(path).named_parameters()]
    full = {name: join(path, name) for name in names}
    change.fill(live, {name: source.tensor(aliases.get(at, at)) for name, at in full.items()})
    return live


def outer_weights(
    skeleton: Skeleton, change: Change | None, units: Iterable[Unit], source: Weights
) -> Weights:
    """A checkpoint whose parameters outside the layers carry the adapter, in float32."""
    changed: dict[str, torch.Tensor] = {}
    if change is not None:
        for unit in (unit for unit in units if unit.kind != "layer"):
            for name in unit.parameters:
                if name in change.touched and name not in changed:
                    changed |= merge_module(skeleton, change, unit, name, source)
    return replace(source, changed=changed) if changed else source
