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
    skeleton: Skeleton,
    change: Change | None,
    unit: Unit,
    weights: Mapping[str, torch.Tensor],
    *,
    taken: bool = False,
) -> nn.Module:
    """The decoder layer as training saw it: `weights` (names relative to the unit) with the
    adapter running on top. Weights that are `taken` over may be changed by a merge."""
    if change is None:
        layer = skeleton.layer(unit.index)
        fill(layer, weights)
        return layer
    layer = change.live(unit.path)
    change.fill(layer, _as_kept(skeleton, unit, weights), taken=taken)
    return layer.requires_grad_(False).eval()


def merge_layer(change: Change | None, live: nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's own merge of a live layer, which is consumed: float32, relative names."""
    if change is None:
        return dict(live.state_dict())
    return {name: tensor.contiguous() for name, tensor in change.merge(live).items()}


def _as_kept(
    skeleton: Skeleton, unit: Unit, weights: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Transposed weights in the order of memory that transformers keeps them in, so that PEFT's
    sums over them come out equal to the last bit."""
    if not skeleton.turned:
        return weights
    turned = {name for name in weights if join(unit.path, name) in skeleton.turned}
    return {n: t.T.contiguous().T if n in turned else t for n, t in weights.items()}


def merge_outer(
    change: Change, unit: Unit, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Merge what the adapter does outside the layers (embeddings, norms, head).

    Only the tensors that change are returned, by full parameter name.
    """
    changed: dict[str, torch.Tensor] = {}
    touched = [name for name in unit.parameters if name in change.touched]
    for path in dict.fromkeys(_place(change, name) for name in touched):
        live = change.live(path)
        own = {r: t for name, t in weights.items() if (r := under(name, path)) is not None}
        change.fill(live, own)
        merged = change.merge(live)
        changed |= {f"{path}.{name}": tensor for name, tensor in merged.items()}
    assert changed.keys() >= set(touched), "a change that nobody merged"
    return changed


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


def outer_weights(change: Change | None, units: Iterable[Unit], source: Weights) -> Weights:
    """A checkpoint whose parameters outside the layers carry the adapter, in float32."""
    changed: dict[str, torch.Tensor] = {}
    if change is not None:
        for unit in units:
            touched = any(name in change.touched for name in unit.parameters)
            if unit.kind != "layer" and touched:
                changed |= merge_outer(change, unit, source.unit(unit))
    return replace(source, changed=changed) if changed else source
