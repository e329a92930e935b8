"""compressed-tensors: packed integers read and written, plain int8 and FP8 read.

Shapes: O out features, I in features, G groups along I, b bits. pack-quantized: X.weight_packed
int32 [O, I·b/32] of signed codes plus 2^(b−1), X.weight_scale [O, G], X.weight_shape int64 [2],
X.weight_zero_point int32 [O·b/32, G] packed along O, and up to release 0.18 X.weight_g_idx [I].
int-quantized and float-quantized: X.weight int8 or FP8 [O, I] with X.weight_scale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
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
    WORD_DTYPES,
    expect_dtype,
    expect_finite,
    expect_shape,
    nothing_quantized,
    required,
)
from qmerge.formats.fp8 import FP8_DTYPES, SCALE_DTYPES, decode_scaled, expect_scale_shape
from qmerge.formats.integer import IntegerWeight, PackedWeight, group_count, real_group_index
from qmerge.formats.packing import WORD, pack, unpack, unpack_word_aligned, words_for
from qmerge.formats.schemes import PACKED, Scheme, read_schemes, scheme_of
from qmerge.formats.settings import Settings
from qmerge.recipe import ActOrder
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.headers import TensorInfo

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
PLAIN_SUFFIXES = ("weight_scale", "weight", "weight_zero_point")


@dataclass(frozen=True, kw_only=True)
class CompressedLinear:
    """One quantized linear as the settings and the headers describe it."""

    module: str
    scheme: Scheme
    shape: tuple[int, int]
    parts: Mapping[str, TensorInfo]

    @property
    def groups(self) -> int:
        return group_count(self.shape[1], self.scheme.group_size)

    @property
    def offset(self) -> int:
        """What is added to a signed code to make it count from 0."""
        return 1 << (self.scheme.bits - 1)

    def stored(self, suffix: str) -> str:
        return f"{self.module}.{suffix}"


class CompressedTensorsReader(Reader[CompressedLinear]):
    """pack-quantized, int-quantized, float-quantized, and mixtures of them."""

    methods: ClassVar[tuple[str, ...]] = ("compressed-tensors", "compressed_tensors")

    @classmethod
    def open(cls, checkpoint: Checkpoint, settings: Settings) -> Self:
        """Reads the headers and the `weight_shape` tensors."""
        schemes = read_schemes(settings)
        packed, others = modules_with(checkpoint.tensors, SUFFIXES)
        plain, others = modules_with({n: checkpoint.tensors[n] for n in others}, PLAIN_SUFFIXES)
        found = [
            _describe_packed(module, parts, scheme_of(module, schemes), checkpoint)
            for module, parts in packed.items()
        ]
        found += [
            _describe_plain(module, parts, scheme_of(module, schemes))
            for module, parts in plain.items()
        ]
        if not found:
            raise nothing_quantized(checkpoint, settings.file, settings.method)
        weights = dense_weights(checkpoint, others, settings.method)
        dtype = common_dtype(weights)
        weights += [_weight(linear, dtype) for linear in found]
        form = settings.text("format", schemes[0].form)
        return cls(
            checkpoint,
            layouts={linear.stored("weight"): linear for linear in found},
            name=f"compressed-tensors-{form}",
            weights=weights,
            summary=_summary(form, settings, schemes, found, weights),
        )

    def _grid(self, weight: StoredWeight, rows: slice) -> PackedWeight | None:
        linear = self.layouts[weight.name]
        if not linear.scheme.integer:
            return None
        g_idx = self._optional(linear, "weight_g_idx")
        scales = self._scales(linear).reshape(-1, linear.groups).expand(linear.shape[0], -1)
        first, stop, _ = rows.indices(linear.shape[0])
        return PackedWeight(
            shape=(stop - first, linear.shape[1]),
            codes=self._codes(linear, rows),
            scales_OG=scales[rows],
            zeros_OG=self._zeros(linear)[rows],
            g_idx_I=real_group_index(
                linear.stored("weight_g_idx"), g_idx, linear.scheme.group_size, linear.groups
            ),
            bits=linear.scheme.bits,
            group_size=linear.scheme.group_size,
            symmetric=linear.scheme.symmetric,
        )

    def _decode(self, weight: StoredWeight, rows: slice, dtype: torch.dtype) -> Tensor:
        linear = self.layouts[weight.name]
        if linear.scheme.integer:
            return super()._decode(weight, rows, dtype)
        code, scale = self.checkpoint.read(weight.name), self._scales(linear).to(torch.float32)
        return decode_scaled(code, scale, _block(linear), dtype, rows)

    def _codes(self, linear: CompressedLinear, rows: slice) -> Callable[[slice], Tensor]:
        """Some of these rows as uint8 [., I], counted from 0."""
        bits, width = linear.scheme.bits, linear.shape[1]
        if "weight_packed" not in linear.parts:
            signed = self.checkpoint.read(linear.stored("weight"))[rows]
            # Modulo 256, in which −128 + 128 is 0 as it should be.
            return lambda part: signed[part].view(torch.uint8) + linear.offset
        words = self.checkpoint.read(linear.stored("weight_packed"))[rows]
        dense = words.shape[1] == words_for(width, bits)
        unpacked = unpack if dense else unpack_word_aligned
        return lambda part: unpacked(words[part], bits, width)

    def _scales(self, linear: CompressedLinear) -> Tensor:
        name = linear.stored("weight_scale")
        scales = self.checkpoint.read(name)
        # A dtype of powers of two alone has no arithmetic of its own.
        scales = scales if scales.dtype.itemsize > 1 else scales.to(torch.float32)
        return expect_finite(name, scales)

    def _zeros(self, linear: CompressedLinear) -> Tensor:
        """int32 [O, G], counted from 0 like the codes."""
        stored = self._optional(linear, "weight_zero_point")
        shape = (linear.shape[0], linear.groups)
        if stored is None:
            return torch.full(shape, linear.offset, dtype=torch.int32)
        if stored.dtype != torch.int32 or stored.numel() == 1 or stored.shape == shape:
            signed = stored.to(torch.int32).reshape(-1, linear.groups)
            return signed.expand(shape) + linear.offset
        bits = linear.scheme.bits
        dense = stored.shape[0] == words_for(shape[0], bits)
        zeros = (unpack if dense else unpack_word_aligned)(stored, bits, shape[0], dim=0)
        return zeros.to(torch.int32).contiguous()

    def _optional(self, linear: CompressedLinear, suffix: str) -> Tensor | None:
        return self.checkpoint.read(linear.stored(suffix)) if suffix in linear.parts else None


def _describe_packed(
    module: str, parts: Mapping[str, TensorInfo], scheme: Scheme, checkpoint: Checkpoint
) -> CompressedLinear:
    """Settings and shapes of one packed linear, checked against each other."""
    packed, scale = parts["weight_packed"], required(module, parts, "weight_scale")
    name = required(module, parts, "weight_shape").name
    shape = tuple(int(size) for size in checkpoint.read(name).flatten())
    if len(shape) != 2 or len(packed.shape) != 2 or not scheme.integer:
        raise CheckpointError(
            f"{packed.name}: packed codes of {list(shape)}, where qmerge reads integer matrices"
        )
    if not scheme.symmetric:
        required(module, parts, "weight_zero_point")
    linear = CompressedLinear(module=module, scheme=scheme, shape=shape, parts=parts)
    _expect_kinds(parts)
    _expect_packed(packed, shape[1], shape[0], scheme.bits, along=1)
    _expect_scale(scale, linear)
    zeros = parts.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32:
        _expect_packed(zeros, shape[0], linear.groups, scheme.bits, along=0)
    elif zeros is not None:
        _expect_scale(zeros, linear)
    if "weight_g_idx" in parts:
        expect_shape(
            parts["weight_g_idx"].name, parts["weight_g_idx"].shape, shape[1:], f"{list(shape)}"
        )
    return linear


def _describe_plain(
    module: str, parts: Mapping[str, TensorInfo], scheme: Scheme
) -> CompressedLinear:
    """Settings and shapes of one linear of int8 or FP8, checked against each other."""
    weight, scale = required(module, parts, "weight"), parts["weight_scale"]
    wanted = (torch.int8,) if scheme.integer else FP8_DTYPES
    if weight.dtype not in wanted or len(weight.shape) != 2:
        raise CheckpointError(
            f"{weight.name}: {weight.dtype} {list(weight.shape)}, where the settings say "
            f"{'int8' if scheme.integer else 'FP8'}",
            hint="the model was saved before it was compressed: save it with save_compressed",
        )
    _expect_kinds(parts)
    linear = CompressedLinear(
        module=module, scheme=scheme, shape=(weight.shape[0], weight.shape[1]), parts=parts
    )
    if not scheme.integer:
        if "weight_zero_point" in parts and not scheme.symmetric:
            raise CheckpointError(f"{module}: FP8 with zero points, which qmerge does not read")
        expect_scale_shape(scale.name, scale.shape, linear.shape, _block(linear))
        return linear
    if not scheme.symmetric:
        required(module, parts, "weight_zero_point")
    for part in {"weight_scale", "weight_zero_point"} & set(parts):
        _expect_scale(parts[part], linear)
    return linear


def _expect_kinds(parts: Mapping[str, TensorInfo]) -> None:
    for suffix, info in parts.items():
        if suffix == "weight_scale":
            expect_dtype(info, SCALE_DTYPES, "scale")
        elif suffix == "weight_packed":
            expect_dtype(info, (torch.int32,), "packed code")
        elif suffix != "weight":
            expect_dtype(info, WORD_DTYPES, "zero point, shape or group index")


def _block(linear: CompressedLinear) -> tuple[int, int]:
    """Rows and columns that share a scale of an FP8 weight."""
    size = linear.scheme.group_size
    return linear.scheme.block or (1, linear.shape[1] if size == -1 else size)


def _expect_packed(info: TensorInfo, count: int, other: int, bits: int, *, along: int) -> None:
    """`count` codes packed along dimension `along`, densely or as before release 0.18."""
    for words in (words_for(count, bits), -(-count // (WORD // bits))):
        shape = (words, other) if along == 0 else (other, words)
        if info.shape == shape:
            return
    wanted = (words_for(count, bits), other) if along == 0 else (other, words_for(count, bits))
    expect_shape(info.name, info.shape, wanted, f"{bits} bits")


def _expect_scale(info: TensorInfo, linear: CompressedLinear) -> None:
    """One value per row and group, per row, or for the whole weight."""
    rows = linear.shape[0]
    fitting: list[tuple[int, ...]] = [(rows, linear.groups)]
    if linear.groups == 1:
        fitting += [(rows,), (1,), (), (1, 1)]
    if info.shape not in fitting:
        expect_shape(info.name, info.shape, fitting[0], f"group size {linear.scheme.group_size}")


def _weight(linear: CompressedLinear, dtype: torch.dtype) -> StoredWeight:
    return StoredWeight(
        name=linear.stored("weight"),
        shape=linear.shape,
        dtype=dtype,
        quantized=True,
        sources=tuple(linear.stored(suffix) for suffix in linear.parts),
        bits=linear.scheme.bits,
    )


def _summary(
    form: str,
    settings: Settings,
    schemes: Sequence[Scheme],
    linears: Sequence[CompressedLinear],
    weights: Sequence[StoredWeight],
) -> FormatSummary:
    first, *others = sorted(schemes, key=lambda scheme: not scheme.of_class)
    version = settings.values.get("version")
    return FormatSummary(
        method="compressed-tensors",
        checkpoint_format=form,
        settings_file=settings.file,
        bits=first.bits,
        group_size=first.group_size if first.block is None else None,
        symmetric=first.symmetric,
        desc_act=any("weight_g_idx" in linear.parts for linear in linears),
        quantizer=None if version is None else f"compressed-tensors:{version}",
        overrides=tuple(target for scheme in others for target in scheme.targets),
        **tally(weights),
    )


def pack_compressed(weight: IntegerWeight) -> dict[str, Tensor]:
    """The stored tensors of one linear, by suffix; scales keep their dtype.

    RecipeError for act-order with its own column groups, which the format no longer has.
    """
    if weight.g_idx_I is not None:
        raise RecipeError(
            "compressed-tensors has no column groups of act-order since its release 0.19",
            hint="use the column order group or none, or write the format gptq",
        )
    tensors = {
        "weight_packed": pack(weight.codes_OI, weight.bits),
        "weight_scale": weight.scales_OG.contiguous(),
        "weight_shape": torch.tensor(weight.codes_OI.shape, dtype=torch.int64),
    }
    if not weight.symmetric:
        tensors["weight_zero_point"] = pack(weight.zeros_OG, weight.bits, dim=0)
    return tensors


def quantization_config(
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    order: ActOrder,
    quantized: Mapping[str, tuple[int, int]],
    kept: Iterable[str],
) -> dict[str, Any]:
    """The `quantization_config` of a packed release.

    `quantized` has bits and group size of the linears that are packed, and `kept` every linear that
    stays in 16 bits, the head among them. RecipeError for the column order `full`, as in
    `pack_compressed`.
    """
    if order == "full":
        raise RecipeError(
            "compressed-tensors has no column groups of act-order since its release 0.19",
            hint="use the column order group or none, or write the format gptq",
        )

    def scheme(targets: list[str], bits: int, group_size: int) -> dict[str, Any]:
        weights: dict[str, Any] = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if group_size == -1 else "group",
            "group_size": None if group_size == -1 else group_size,
            "dynamic": False,
        }
        if order == "group":
            weights["actorder"] = "weight"
        return {"targets": targets, "weights": weights, "input_activations": None}

    others: dict[tuple[int, int], list[str]] = defaultdict(list)
    for module, own in sorted(quantized.items()):
        if own != (bits, group_size):
            others[own].append(module)
    groups = [scheme(targets, *own) for own, targets in sorted(others.items())]
    # The first that fits a module is taken, names before classes.
    groups.append(scheme(["Linear"], bits, group_size))
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": each for number, each in enumerate(groups)},
        "ignore": sorted(set(kept)),
    }
