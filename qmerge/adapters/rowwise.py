"""Plain LoRA, merged some rows of a weight at a time.

Each row of what LoRA adds, s · B A, is of one row of B. So some rows of a weight, with those of B,
are a LoRA layer themselves, and PEFT merges that one like any other: neither the weight nor its
update has to be there as a whole.

R: rows; I: in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MergeRows = Callable[[int, torch.Tensor], torch.Tensor]
"""Given the first of some rows and the rows [R, I], which it may change, returns them merged."""


def merger_of(module: Any, adapter: str) -> MergeRows | None:
    """PEFT's merge of a loaded tuner layer, for some rows of its weight; None where a row of the
    result takes more than that row: whatever is not plain LoRA on a linear."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or module.fan_in_fan_out or module.lora_variant:
        return None
    base, factor = module.get_base_layer(), module.lora_B[adapter]
    if factor.bias is not None:
        return None
    whole_OK = factor.weight.data

    def merge(start: int, rows_RI: torch.Tensor) -> torch.Tensor:
        own_RK = whole_OK[start : start + len(rows_RI)]
        factor.weight = nn.Parameter(own_RK, requires_grad=False)
        base.weight = nn.Parameter(rows_RI, requires_grad=False)
        module.merge()
        module.merged_adapters.clear()
        merged: torch.Tensor = base.weight.data
        return merged

    return merge
