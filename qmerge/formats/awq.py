"""AWQ checkpoints in the gemm layout, 4 bits.

Shapes: O out features, I in features, G groups along I. Stored per linear: qweight int32 [I, O/8]
and qzeros int32 [G, O/8], both packed along O in the order below; scales [G, O].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats.base import (
    FormatSummary,
    Reader,
    StoredWeight,
    common_dtype,
    dense_weights,
    modules_with,
    tally,
)
from qmerge.formats.checks import (
    DENSE_DTYPES,
    expect_dtype,
    expect_finite,
    expect_group_size,
    expect_shape,
    nothing_quantized,
    required,
)
from qmerge.formats.integer import PackedWeight, group_count
from qmerge.formats.settings import Settings
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.headers import TensorInfo

BITS = 4
PER_WORD = 8
SUFFIXES = ("qweight", "qzeros", "scales")

# Fields of a word, lowest first, hold the outputs 0, 2, 4, 6, 1, 3, 5, 7: a byte holds two that are
# two apart. The first output of each, and the bit where the byte begins.
BYTE_PLACES = ((0, 0), (4, 8), (1, 16), (5, 24))


@dataclass(frozen=True, kw_only=True)
class AwqLinear:
    """One quantized linear."""

    module: str
    out_features: int
    in_features: int
    group_size: int
    symmetric: bool

    def stored(self, suffix: str) -> str:
        return f"{self.module}.{suffix}"


class AwqReader(Reader[AwqLinear]):
    """AWQ as AutoAWQ and gptqmodel write it for the gemm kernel."""

    methods: ClassVar[tuple[str, ...]] = ("awq",)

    @classmethod
    def open(cls, checkpoint: Checkpoint, settings: Settings) -> Self:
        _check(settings)
        modules, others = modules_with(checkpoint.tensors, SUFFIXES)
        linears = {
            f"{module}.weight": _describe(module, parts, settings)
            for module, parts in modules.items()
        }
        if not linears:
            raise nothing_quantized(checkpoint, settings.file, "awq")
        weights = dense_weights(checkpoint, others, settings.method)
        dtype = common_dtype(weights)
        weights += [_weight(name, linear, dtype) for name, linear in linears.items()]
        return cls(
            checkpoint,
            layouts=linears,
            name="awq-gemm",
            weights=weights,
            summary=_summary(settings, weights),
        )

    def _grid(self, weight: StoredWeight, rows: slice) -> PackedWeight:
        linear = self.layouts[weight.name]
        qweight, qzeros, scales_GO = (
            self.checkpoint.read(linear.stored(suffix)) for suffix in SUFFIXES
        )
        first, stop, _ = rows.indices(linear.out_features)
        scales_GO = expect_finite(linear.stored("scales"), scales_GO[:, rows])
        return PackedWeight(
            shape=(stop - first, linear.in_features),
            codes=lambda part: _outputs(qweight, range(first, stop)[part]),
            scales_OG=scales_GO.T.contiguous(),
            zeros_OG=_outputs(qzeros, range(first, stop)).to(torch.int32),
            g_idx_I=None,
            bits=BITS,
            group_size=linear.group_size,
            symmetric=linear.symmetric,
        )


def _outputs(words: Tensor, rows: range) -> Tensor:
    """uint8 codes of some outputs, unpacked with the few that share their words."""
    first = rows.start // PER_WORD
    codes = unpack_gemm(words[:, first : -(-rows.stop // PER_WORD)])
    return codes[rows.start - first * PER_WORD : rows.stop - first * PER_WORD]


def unpack_gemm(words: Tensor) -> Tensor:
    """uint8 [O, N] of int32 words [N, O/8]: one row per output, in their natural order."""
    transposed = np.ascontiguousarray(words.numpy().T)
    high, wide = transposed.shape
    codes = np.empty((high, 2, 2, 2, wide), np.uint8)
    for output, place in BYTE_PLACES:
        pair = (transposed >> place).astype(np.uint8)
        np.bitwise_and(pair, (1 << BITS) - 1, out=codes[:, output // 4, 0, output % 2])
        np.right_shift(pair, BITS, out=codes[:, output // 4, 1, output % 2])
    return torch.from_numpy(codes.reshape(-1, wide))


def _check(settings: Settings) -> None:
    """CheckpointError for another kernel's layout or width."""
    layout = settings.text("version", settings.text("checkpoint_format", "gemm"))
    bits = settings.integer("bits", BITS)
    if layout == "gemm" and bits == BITS and settings.text("backend", "autoawq") != "llm-awq":
        return
    raise CheckpointError(
        f"{settings.file}: AWQ with {bits} bits in the layout {layout!r}",
        hint="qmerge reads AWQ of 4 bits in the layout gemm, the usual one",
    )


def _describe(module: str, parts: Mapping[str, TensorInfo], settings: Settings) -> AwqLinear:
    """Shapes of one linear, checked against the settings."""
    qweight, scales = parts["qweight"], required(module, parts, "scales")
    qzeros = required(module, parts, "qzeros")
    expect_dtype(qweight, (torch.int32,), "packed code")
    expect_dtype(qzeros, (torch.int32,), "packed zero point")
    expect_dtype(scales, DENSE_DTYPES, "scale")
    if len(qweight.shape) != 2:
        raise CheckpointError(f"{qweight.name}: shape {list(qweight.shape)} is no matrix")
    in_features, out_features = qweight.shape[0], qweight.shape[1] * PER_WORD
    group_size = expect_group_size(module, settings, in_features, default=128)
    groups = group_count(in_features, group_size)
    of = f"{BITS} bits, group size {group_size}"
    expect_shape(f"{module}.scales", scales.shape, (groups, out_features), of)
    expect_shape(f"{module}.qzeros", qzeros.shape, (groups, qweight.shape[1]), of)
    return AwqLinear(
        module=module,
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        symmetric=_symmetric(settings),
    )


def _symmetric(settings: Settings) -> bool:
    """AutoAWQ says `zero_point`, gptqmodel says `sym`."""
    if "zero_point" in settings.values:
        return not settings.values["zero_point"]
    return bool(settings.values.get("sym", False))


def _weight(name: str, linear: AwqLinear, dtype: torch.dtype) -> StoredWeight:
    return StoredWeight(
        name=name,
        shape=(linear.out_features, linear.in_features),
        dtype=dtype,
        quantized=True,
        sources=tuple(linear.stored(suffix) for suffix in SUFFIXES),
        bits=BITS,
    )


def _summary(settings: Settings, weights: Sequence[StoredWeight]) -> FormatSummary:
    return FormatSummary(
        method="awq",
        checkpoint_format="gemm",
        settings_file=settings.file,
        bits=BITS,
        group_size=settings.integer("group_size", 128),
        symmetric=_symmetric(settings),
        desc_act=False,
        quantizer=settings.quantizer,
        **tally(weights),
    )
