"""GPTQ checkpoints: `gptq` (v1, AutoGPTQ's) and `gptq_v2`, read and written.

Shapes: O out features, I in features, G groups along I, b bits. Stored per linear: qweight int32
[I·b/32, O] packed along I, qzeros int32 [G, O·b/32] packed along O, scales [G, O], g_idx int32 [I].

v1 stores each zero point less one. Where a zero point is 0 that wraps, and programs differ in how
far: AutoGPTQ subtracts within each field; gptqmodel subtracts from whole words, so that the borrow
runs into the next field. A file must be read the way it was written.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

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
    DENSE_DTYPES,
    WORD_DTYPES,
    expect_dtype,
    expect_finite,
    expect_group_size,
    expect_shape,
    nothing_quantized,
    required,
)
from qmerge.formats.integer import IntegerWeight, PackedWeight, group_count, real_group_index
from qmerge.formats.packing import pack, unpack, words_for
from qmerge.formats.settings import Settings, modern
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.headers import TensorInfo

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")

SERVED_AS = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba",
    "in_proj_a": "in_proj_ba",
}
"""What vLLM looks for in `dynamic` where it runs several linears as one."""
EXPERT = re.compile(r"(.+\.experts)(\.\d+\.\w+)?")
"""A linear of an expert, or a block of them that is one module; vLLM looks for the block."""

V1Zeros = Literal["field", "word"]


@dataclass(frozen=True, kw_only=True)
class PackedLinear:
    """One quantized linear as the settings and the headers describe it."""

    module: str
    bits: int
    group_size: int
    symmetric: bool
    out_features: int
    in_features: int
    groups: int
    has_g_idx: bool
    v1_zeros: V1Zeros | None
    """How v1 subtracted the one; None in v2, which stores zero points as they are."""

    def stored(self, suffix: str) -> str:
        return f"{self.module}.{suffix}"


@dataclass(frozen=True, kw_only=True)
class Override:
    """An entry of `dynamic`: settings for the modules that a regular expression matches."""

    pattern: re.Pattern[str]
    values: Mapping[str, Any] | None
    """None keeps the modules out of quantization."""


class GptqReader(Reader[PackedLinear]):
    """GPTQ with 2, 3, 4 or 8 bits, any group size, with or without act-order."""

    methods: ClassVar[tuple[str, ...]] = ("gptq",)

    @classmethod
    def open(cls, checkpoint: Checkpoint, settings: Settings) -> Self:
        """Headers only. `meta.quantizer` says how v1 zero points were stored."""
        name = _known_format(settings)
        zeros = _v1_zeros(settings) if VERSIONS[name] == 1 else None
        overrides = _overrides(settings)
        modules, others = modules_with(checkpoint.tensors, SUFFIXES)
        linears = {
            f"{module}.weight": _describe(module, parts, settings, overrides, zeros)
            for module, parts in modules.items()
        }
        if not linears:
            raise nothing_quantized(checkpoint, settings.file, "gptq")
        weights = dense_weights(checkpoint, others, settings.method)
        dtype = common_dtype(weights)
        weights += [_weight(key, linear, dtype) for key, linear in linears.items()]
        return cls(
            checkpoint,
            layouts=linears,
            name=name,
            weights=weights,
            summary=_summary(name, settings, overrides, weights),
        )

    def _grid(self, weight: StoredWeight, rows: slice) -> PackedWeight:
        linear, read = self.layouts[weight.name], self.checkpoint.read
        words = read(linear.stored("qweight"))[:, rows]
        name = linear.stored("scales")
        scales_GO = expect_finite(name, read(name)[:, rows])
        g_idx = read(linear.stored("g_idx")) if linear.has_g_idx else None
        return PackedWeight(
            shape=(words.shape[1], linear.in_features),
            codes=lambda part: unpack(words[:, part], linear.bits, linear.in_features, dim=0).T,
            scales_OG=scales_GO.T.contiguous(),
            zeros_OG=self._zeros(linear, rows).T.contiguous(),
            g_idx_I=real_group_index(
                linear.stored("g_idx"), g_idx, linear.group_size, linear.groups
            ),
            bits=linear.bits,
            group_size=linear.group_size,
            symmetric=linear.symmetric,
        )

    def _zeros(self, linear: PackedLinear, rows: slice) -> Tensor:
        """Zero points int32 [G, rows], of no more words than hold them."""
        first, stop, _ = rows.indices(linear.out_features)
        qzeros = self.checkpoint.read(linear.stored("qzeros"))
        word_bits = qzeros.element_size() * 8
        # As many codes as there are bits in a word fill whole words, whatever their width.
        skipped = first // word_bits * word_bits
        begin, end = skipped * linear.bits // word_bits, words_for(stop, linear.bits, word_bits)
        words, count = qzeros[:, begin:end], stop - skipped
        if linear.v1_zeros is None:
            zeros = unpack(words, linear.bits, count).to(torch.int32)
        else:
            zeros = true_zeros(words, linear.bits, count, linear.v1_zeros)
        return zeros[:, first - skipped :]


def true_zeros(qzeros_GW: Tensor, bits: int, out_features: int, convention: V1Zeros) -> Tensor:
    """Zero points int32 [G, O] of v1 `qzeros`: what is stored, plus one.

    `word` adds to whole words, as gptqmodel does for 2, 4 and 8 bits; fields of 3 bits straddle
    words and gptqmodel 7 treats them as AutoGPTQ does.
    """
    if convention == "word" and bits != 3:
        word_bits = qzeros_GW.element_size() * 8
        ones = sum(1 << place for place in range(0, word_bits, bits))
        # Two's complement, so that the sum wraps as it does on whole words.
        ones -= (ones >> (word_bits - 1)) << word_bits
        return unpack(qzeros_GW + ones, bits, out_features).to(torch.int32)
    stored = unpack(qzeros_GW, bits, out_features).to(torch.int32)
    return (stored + 1) & ((1 << bits) - 1)


def _v1_zeros(settings: Settings) -> V1Zeros:
    return "word" if "gptqmodel" in (settings.quantizer or "").lower() else "field"


def _known_format(settings: Settings) -> str:
    found = settings.text("checkpoint_format", "gptq")
    if settings.values.get("is_marlin_format"):
        found = "marlin"
    if found not in VERSIONS:
        raise CheckpointError(
            f"{settings.file}: GPTQ in the layout {found!r}, which only its own kernel reads",
            hint=f"qmerge reads {' and '.join(VERSIONS)}: export the model in one of them",
        )
    return found


def _overrides(settings: Settings) -> tuple[Override, ...]:
    dynamic = settings.values.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"{settings.file}: dynamic is not a table of patterns")
    return tuple(_override(key, values, settings) for key, values in dynamic.items())


def _override(key: str, values: Any, settings: Settings) -> Override:
    try:
        pattern = re.compile(key[2:] if key.startswith(("+:", "-:")) else key)
    except re.error as error:
        raise CheckpointError(
            f"{settings.file}: dynamic has the pattern {key!r}, which is no regular expression"
        ) from error
    if key.startswith("-:"):
        return Override(pattern=pattern, values=None)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{settings.file}: dynamic has no settings for {key!r}")
    return Override(pattern=pattern, values=modern(values))


def _describe(
    module: str,
    parts: Mapping[str, TensorInfo],
    settings: Settings,
    overrides: Sequence[Override],
    v1_zeros: V1Zeros | None,
) -> PackedLinear:
    """Settings and shapes of one linear, checked against each other."""
    own = _settings_of(module, settings, overrides)
    bits = own.integer("bits")
    if bits not in BITS:
        raise CheckpointError(
            f"{module}: GPTQ with {bits} bits", hint=f"qmerge reads {', '.join(map(str, BITS))}"
        )
    qweight, scales = parts["qweight"], required(module, parts, "scales")
    qzeros, g_idx = required(module, parts, "qzeros"), parts.get("g_idx")
    if own.values.get("desc_act") and own.integer("group_size", -1) != -1:
        g_idx = required(module, parts, "g_idx")
    _expect_kinds(qweight, qzeros, scales, g_idx)
    word_bits = qweight.dtype.itemsize * 8
    rows, out_features = qweight.shape
    in_features = g_idx.shape[0] if g_idx is not None else rows * word_bits // bits
    group_size = expect_group_size(module, own, in_features, default=-1)
    groups = group_count(in_features, group_size)
    of = f"{bits} bits, group size {group_size}"
    expect_shape(
        f"{module}.qweight",
        qweight.shape,
        (words_for(in_features, bits, word_bits), out_features),
        of,
    )
    expect_shape(f"{module}.scales", scales.shape, (groups, out_features), of)
    expect_shape(
        f"{module}.qzeros",
        qzeros.shape,
        (groups, words_for(out_features, bits, qzeros.dtype.itemsize * 8)),
        of,
    )
    return PackedLinear(
        module=module,
        bits=bits,
        group_size=group_size,
        symmetric=bool(own.values.get("sym", True)),
        out_features=out_features,
        in_features=in_features,
        groups=groups,
        has_g_idx=g_idx is not None,
        v1_zeros=v1_zeros,
    )


def _expect_kinds(
    qweight: TensorInfo, qzeros: TensorInfo, scales: TensorInfo, g_idx: TensorInfo | None
) -> None:
    expect_dtype(qweight, WORD_DTYPES, "packed code")
    expect_dtype(qzeros, WORD_DTYPES, "packed zero point")
    expect_dtype(scales, DENSE_DTYPES, "scale")
    if len(qweight.shape) != 2:
        raise CheckpointError(f"{qweight.name}: shape {list(qweight.shape)} is no matrix")
    if g_idx is None:
        return
    expect_dtype(g_idx, WORD_DTYPES, "group index")
    if len(g_idx.shape) != 1 or not g_idx.shape[0]:
        raise CheckpointError(f"{g_idx.name}: shape {list(g_idx.shape)} is no list of groups")


def _settings_of(module: str, settings: Settings, overrides: Sequence[Override]) -> Settings:
    """The settings of one module: the first override that matches it, over the general ones."""
    for override in overrides:
        if not override.pattern.match(module):
            continue
        if override.values is None:
            raise CheckpointError(
                f"{module}.qweight: the settings keep this module out of quantization",
                hint=f"`dynamic` in {settings.file} is of another checkpoint",
            )
        values = {key: value for key, value in override.values.items() if value is not None}
        return Settings(
            method=settings.method, file=settings.file, values={**settings.values, **values}
        )
    return settings


def _weight(name: str, linear: PackedLinear, dtype: torch.dtype) -> StoredWeight:
    suffixes = SUFFIXES if linear.has_g_idx else SUFFIXES[:3]
    return StoredWeight(
        name=name,
        shape=(linear.out_features, linear.in_features),
        dtype=dtype,
        quantized=True,
        sources=tuple(linear.stored(suffix) for suffix in suffixes),
        bits=linear.bits,
    )


def _summary(
    name: str,
    settings: Settings,
    overrides: Sequence[Override],
    weights: Sequence[StoredWeight],
) -> FormatSummary:
    return FormatSummary(
        method="gptq",
        checkpoint_format=name,
        settings_file=settings.file,
        bits=settings.integer("bits"),
        group_size=settings.integer("group_size", -1),
        symmetric=bool(settings.values.get("sym", True)),
        desc_act=bool(settings.values.get("desc_act", False)),
        quantizer=settings.quantizer,
        overrides=tuple(settings.values.get("dynamic") or ()),
        **tally(weights),
    )


def served_together(group: Iterable[str]) -> list[list[str]]:
    """Which linears of a `group` that reads the same input servers fuse: those of one module, and
    of these, where vLLM's name for the fused linear is known, those under one name."""
    fused: dict[tuple[str, str | None], list[str]] = {}
    for name in group:
        parent, _, own = name.rpartition(".")
        fused.setdefault((parent, SERVED_AS.get(own)), []).append(name)
    return list(fused.values())


def pack_gptq(weight: IntegerWeight, *, version: Literal[1, 2] = 1) -> dict[str, Tensor]:
    """The four stored tensors of one linear, by suffix; scales keep their dtype.

    RecipeError where version 1 is asked to hold a zero point of 0: it is stored less one, and
    programs disagree about how it wraps, so that no file would be read the same by all.
    """
    zeros_GO = weight.zeros_OG.T
    if version == 1:
        if bool((zeros_GO == 0).any()):
            raise RecipeError(
                "the format gptq (v1) cannot hold a zero point of 0",
                hint="write an asymmetric release as gptq_v2 or compressed-tensors",
            )
        zeros_GO = zeros_GO - 1
    return {
        "qweight": pack(weight.codes_OI.T, weight.bits, dim=0),
        "qzeros": pack(zeros_GO, weight.bits),
        "scales": weight.scales_OG.T.contiguous(),
        "g_idx": weight.group_of_column.to(torch.int32),
    }


def quantization_config(
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    desc_act: bool,
    version: Literal[1, 2] = 1,
    damping: float,
    writer: str,
    quantized: Mapping[str, tuple[int, int]],
    kept: Iterable[str] = (),
    head: Collection[str] = ("lm_head",),
) -> dict[str, Any]:
    """The settings for config.json (`quantization_config`) and for quantize_config.json.

    `quantized` and `kept` are the linears that are packed, each with its bits and group size, and
    those of the decoder layers that stay in 16 bits, by module name; one of the former may be the
    `head`. gptqmodel and vLLM learn of what stays, and of bits and groups of their own, from
    `dynamic`, transformers learns what is packed from `modules_in_block_to_quantize`. `writer` is a
    program and its version as in `qmerge:1.0`.

    RecipeError for asymmetric v1, which gptqmodel loads from no writer but itself.
    """
    if version == 1 and not symmetric:
        raise RecipeError(
            "the format gptq (v1) is for symmetric grids: gptqmodel refuses others",
            hint="write an asymmetric release as gptq_v2 or compressed-tensors",
        )
    name = next(name for name, number in VERSIONS.items() if number == version)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": symmetric,
        "lm_head": not quantized.keys().isdisjoint(head),
        "checkpoint_format": name,
        "format": name,
        "pack_dtype": "int32",
        "damp_percent": damping,
        "true_sequential": True,
        "meta": {
            "quantizer": [writer],
            "damp_percent": damping,
            "true_sequential": True,
        },
    }
    kept = sorted(kept)
    if dynamic := _dynamic((bits, group_size), dict.fromkeys(kept) | dict(quantized)):
        config["dynamic"] = dynamic
    if kept:
        config["modules_in_block_to_quantize"] = [sorted(quantized.keys() - {*head})]
    return config


def _dynamic(usual: tuple[int, int], settings: Mapping[str, tuple[int, int] | None]) -> Any:
    """`dynamic` for the modules whose bits and group size are not the usual ones; None are kept
    out. Its patterns fit a module's own name and the one that vLLM has for what it is part of."""
    blocks: dict[str, set[tuple[int, int] | None]] = {}
    for module, own in settings.items():
        if expert := EXPERT.fullmatch(module):
            blocks.setdefault(expert[1], set()).add(own)
    found: dict[str, dict[str, int]] = {}
    for module, own in settings.items():
        if own == usual:
            continue
        expert = EXPERT.fullmatch(module)
        whole = expert is not None and len(blocks[expert[1]]) == 1
        pattern = rf"{re.escape(expert[1])}(\..*)?" if expert and whole else _served(module)
        if own is None:
            found[f"-:^{pattern}$"] = {}
        else:
            found[f"+:^{pattern}$"] = {"bits": own[0], "group_size": own[1]}
    return found


def _served(module: str) -> str:
    path, _, name = module.rpartition(".")
    served = SERVED_AS.get(name)
    return rf"{re.escape(path)}\.({name}|{served})" if path and served else re.escape(module)
