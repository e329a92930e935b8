"""Checkpoints of a few tensors, and slow, plain references for what is read from them.

Shapes: O out features, I in features, G groups along I.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qmerge.formats.integer import IntegerWeight
from qmerge.storage.checkpoint import Checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None,
    **side_files: Mapping[str, Any],
) -> Checkpoint:
    """A model folder with one dense tensor beside `tensors`; `settings` go into config.json."""
    config = {"model_type": "llama"}
    if settings is not None:
        config["quantization_config"] = dict(settings)  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, values in side_files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    norm = {NORM: torch.arange(8, dtype=torch.bfloat16)}
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in (norm | dict(tensors)).items()},
        folder / "model.safetensors",
    )
    return Checkpoint.open(folder)


def under(module: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`parts` by suffix, under the name of a module."""
    return {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}


def grid(
    *,
    rows: int = 32,
    columns: int = 64,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    shuffled: bool = False,
    lowest_zero: int = 0,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> IntegerWeight:
    """Any weight on an integer grid; every code and zero point may occur in it."""
    random = torch.Generator().manual_seed(seed)
    width = columns if group_size == -1 else group_size
    groups = -(-columns // width)
    top = 1 << bits
    g_idx = torch.arange(columns, dtype=torch.int32) // width
    zeros = torch.randint(lowest_zero, top, (rows, groups), generator=random, dtype=torch.int32)
    return IntegerWeight(
        codes_OI=torch.randint(0, top, (rows, columns), generator=random, dtype=torch.uint8),
        scales_OG=(torch.rand(rows, groups, generator=random) * 0.1 + 0.01).to(dtype),
        zeros_OG=torch.full_like(zeros, top // 2) if symmetric else zeros,
        g_idx_I=g_idx[torch.randperm(columns, generator=random)] if shuffled else None,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )


def naive_dense(weight: IntegerWeight) -> Tensor:
    """scale · (code − zero), one element at a time in the interpreter's float64, then fp32."""
    rows, columns = weight.codes_OI.shape
    width = columns if weight.group_size == -1 else weight.group_size
    out = torch.empty(rows, columns, dtype=torch.float64)
    for o in range(rows):
        for i in range(columns):
            g = i // width if weight.g_idx_I is None else int(weight.g_idx_I[i])
            code, zero = int(weight.codes_OI[o, i]), int(weight.zeros_OG[o, g])
            out[o, i] = float(weight.scales_OG[o, g]) * (code - zero)
    return out.float()


def same_grid(found: IntegerWeight | None, wanted: IntegerWeight) -> bool:
    """Equal to the last bit; a group index that says nothing may be left out."""
    assert found is not None
    return (
        torch.equal(found.codes_OI, wanted.codes_OI)
        and torch.equal(found.scales_OG, wanted.scales_OG)
        and found.scales_OG.dtype == wanted.scales_OG.dtype
        and torch.equal(found.zeros_OG, wanted.zeros_OG)
        and torch.equal(found.group_of_column, wanted.group_of_column)
        and found.bits == wanted.bits
        and found.symmetric == wanted.symmetric
    )
