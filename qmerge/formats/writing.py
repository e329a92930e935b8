"""The formats a release can be written in, chosen by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from qmerge.formats import gptq
from qmerge.formats.integer import IntegerWeight, group_count
from qmerge.formats.packing import words_for
from qmerge.recipe import ActOrder, OutputFormat


def pack(weight: IntegerWeight, form: OutputFormat) -> dict[str, Tensor]:
    """The stored tensors of one linear by suffix, as in `qweight` for `X.qweight`."""
    if form == "compressed-tensors":
        from qmerge.formats import compressed_tensors

        return compressed_tensors.pack_compressed(weight)
    return gptq.pack_gptq(weight, version=2 if form == "gptq_v2" else 1)


def quantization_config(
    form: OutputFormat,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    order: ActOrder,
    damping: float,
    writer: str,
    quantized: Mapping[str, tuple[int, int]],
    kept: Iterable[str],
    outside: Iterable[str] = (),
    head: Collection[str] = ("lm_head",),
) -> dict[str, Any]:
    """The `quantization_config` that readers of the format need.

    `quantized` and `kept` name the linears that are packed, each with its bits and group size, and
    those of the decoder layers that stay dense; `outside` are those elsewhere, as in a vision
    tower, and `head` are the names of the output embedding.
    """
    packs_head = not quantized.keys().isdisjoint(head)
    if form == "compressed-tensors":
        from qmerge.formats import compressed_tensors

        return compressed_tensors.quantization_config(
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            order=order,
            quantized=quantized,
            kept=[*kept, *outside, *(() if packs_head else head)],
        )
    config = gptq.quantization_config(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        desc_act=order == "full",
        version=2 if form == "gptq_v2" else 1,
        damping=damping,
        writer=writer,
        quantized=quantized,
        kept=kept,
        head=head,
    )
    elsewhere: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in sorted(outside)}
    return config | ({"dynamic": {**config.get("dynamic", {}), **elsewhere}} if elsewhere else {})


def packed_bytes(shape: tuple[int, ...], bits: int, group_size: int) -> int:
    """Bytes of a packed linear [O, I] in GPTQ's layout: codes and zero points in whole 32-bit
    words, 16-bit steps, group indices."""
    out_features, in_features = shape
    groups = group_count(in_features, group_size)
    codes = 4 * words_for(in_features, bits) * out_features
    zeros = 4 * words_for(out_features, bits) * groups
    return codes + zeros + 2 * out_features * groups + 4 * in_features
