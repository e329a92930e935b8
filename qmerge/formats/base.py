"""What every reader hands out: the model's dense tensors, whatever they are stored as.

Shapes: O out features, I in features, G groups along I.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.headers import TensorInfo

# Elements decoded at a time, so that the passes over them stay in cache.
CHUNK = 1 << 19

ALL = slice(None)

# What quantized tensors are called. One that no weight claimed means that the settings and the
# files disagree, and a tensor dropped in silence is a wrong model.
QUANTIZED_ENDINGS = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_g_idx",
    ".weight_global_scale",
    "_scale_inv",
    ".SCB",
    ".weight_format",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)

# How a runtime quantizes what flows between layers. The weights do not depend on it.
ACTIVATION_ENDINGS = (
    ".activation_scale",
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".output_zero_point",
    ".q_scale",
    ".k_scale",
    ".v_scale",
)

DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WORD_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, kw_only=True)
class IntegerGrid:
    """Where the codes of a weight lie: W[o, i] = scale[o, g(i)] · (code[o, i] − zero[o, g(i)])."""

    scales_OG: Tensor
    """In the dtype they are stored in."""
    zeros_OG: Tensor
    """int32, the true zero point on the scale of the codes."""
    g_idx_I: Tensor | None
    """int32 group of each column; None where column i lies in group i // group_size."""
    bits: int
    group_size: int
    """Columns per group; −1 is one group over the whole input."""
    symmetric: bool

    def columns(self, width: int) -> Tensor:
        """The group of each of `width` columns as int64, whether it is written down or not."""
        if self.g_idx_I is not None:
            return self.g_idx_I.long()
        return torch.arange(width) // (width if self.group_size == -1 else self.group_size)

    def decode(
        self, shape: tuple[int, int], codes: Callable[[slice], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The weight of `shape` whose codes are asked for some rows at a time: computed in fp32,
        and rounded once if `dtype` is narrower.

        In fp32 it is exact for scales of 16 bits: code − zero has at most 9.
        """
        width = shape[1]
        scales, zeros = self.scales_OG.float(), self.zeros_OG.float()
        groups = scales.shape[1]
        if self.g_idx_I is None and (groups == 1 or groups * self.group_size == width):
            scales, zeros = scales.unsqueeze(2), zeros.unsqueeze(2)

            def fill(rows: slice, out: Tensor) -> None:
                part = out.copy_(codes(rows)).view(-1, groups, width // groups)
                part.sub_(zeros[rows]).mul_(scales[rows])
        else:
            columns = self.columns(width)

            def fill(rows: slice, out: Tensor) -> None:
                offsets, steps = (of[rows].index_select(1, columns) for of in (zeros, scales))
                out.copy_(codes(rows)).sub_(offsets).mul_(steps)

        return by_rows(shape, dtype, fill)


@dataclass(frozen=True, kw_only=True)
class IntegerWeight(IntegerGrid):
    """A weight on an integer grid."""

    codes_OI: Tensor
    """uint8, 0 to 2^bits − 1."""

    @property
    def group_of_column(self) -> Tensor:
        """The group of each column as int64, whether it is written down or not."""
        return self.columns(self.codes_OI.shape[1])

    def rows(self, start: int, stop: int) -> IntegerWeight:
        """Some of the rows, on the same groups."""
        part = slice(start, stop)
        return replace(
            self,
            codes_OI=self.codes_OI[part],
            scales_OG=self.scales_OG[part],
            zeros_OG=self.zeros_OG[part],
        )

    def to(self, device: torch.device | str) -> IntegerWeight:
        """The same on a device."""
        tensors = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]."""
        high, wide = self.codes_OI.shape
        return self.decode((high, wide), lambda rows: self.codes_OI[rows], dtype)


@dataclass(frozen=True, kw_only=True)
class PackedWeight(IntegerGrid):
    """The same, unpacked some rows at a time: what lies between stays in cache."""

    shape: tuple[int, int]
    codes: Callable[[slice], Tensor]
    """Some rows of the codes, uint8."""

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]."""
        return self.decode(self.shape, self.codes, dtype)

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Some of the rows."""
        return replace(
            self,
            shape=(stop - start, self.shape[1]),
            codes=lambda part: self.codes(slice(start + part.start, start + part.stop)),
            scales_OG=self.scales_OG[start:stop],
            zeros_OG=self.zeros_OG[start:stop],
        )

    def unpacked(self) -> IntegerWeight:
        grid = {each.name: getattr(self, each.name) for each in fields(IntegerGrid)}
        return IntegerWeight(codes_OI=self.codes(ALL), **grid)


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """One tensor of the model, by the name that a dense checkpoint gives it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the stored tensor where it is dense, else the 16-bit dtype it stands for."""
    quantized: bool
    sources: tuple[str, ...]
    """The stored tensors it is decoded from."""
    bits: int | None = None
    """Of a code; None where it is not quantized."""


@dataclass(frozen=True, kw_only=True)
class FormatSummary:
    """How a checkpoint is stored, as its own settings say; None where a term does not apply."""

    method: str
    """`none`, or the `quant_method` of the settings."""
    checkpoint_format: str
    settings_file: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    desc_act: bool | None = None
    block_size: int | None = None
    """Elements per block of bitsandbytes; −1 where blocks differ."""
    double_quantization: bool | None = None
    quantizer: str | None = None
    """Who wrote it, as the settings say."""
    overrides: tuple[str, ...] = ()
    """Settings that hold for some layers only."""
    dtype: torch.dtype
    """The dtype of most tensors that are not quantized."""
    quantized: int = 0
    dense: int = 0
    """Tensors of the model stored quantized, and stored as they are."""
    lm_head: bool = False
    """The output head is quantized."""


class Format(Protocol):
    """An opened checkpoint, whatever its format: logical weights over stored tensors."""

    @property
    def name(self) -> str: ...

    @property
    def weights(self) -> Mapping[str, StoredWeight]: ...

    @property
    def summary(self) -> FormatSummary: ...

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """[O, I] as `nn.Linear` keeps it, decoded as the format's own runtime decodes it.

        A tensor of its own, which may be written into. `dtype` rounds the fp32 weight once, and
        sooner done here than by the caller: the whole weight is never there in fp32.
        """
        ...

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows `start` to `stop`, without decoding the rest where the format allows it."""
        ...

    def pieces(self, name: str, rows: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """All rows, so many at a time, opened once."""
        ...

    def integer(self, name: str) -> IntegerWeight | None:
        """The grid a quantized weight lies on, or None where there is none."""
        ...


class Reader:
    """What readers share: tensors stored as they are, and errors about names.

    A format adds `_grid` where its weights lie on an integer grid, else `_decode`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        weights: Iterable[StoredWeight],
        summary: FormatSummary,
    ) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.weights: Mapping[str, StoredWeight] = {
            weight.name: weight for weight in sorted(weights, key=lambda weight: weight.name)
        }
        self.summary = summary

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = self._find(name)
        if weight.quantized:
            return self._decode(weight, ALL, dtype)
        return self.checkpoint.read(name).to(dtype, copy=True)

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = self._find(name)
        if weight.quantized:
            return self._decode(weight, slice(start, stop), dtype)
        return self.checkpoint.read_rows(name, start, stop).to(dtype, copy=True)

    def pieces(self, name: str, rows: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        weight = self._find(name)
        grid = self._grid(weight, ALL) if weight.quantized else None
        for start in range(0, weight.shape[0], rows):
            stop = min(start + rows, weight.shape[0])
            yield (
                grid.rows(start, stop).dense(dtype) if grid else self.rows(name, start, stop, dtype)
            )

    def integer(self, name: str) -> IntegerWeight | None:
        weight = self._find(name)
        grid = self._grid(weight, ALL) if weight.quantized else None
        return None if grid is None else grid.unpacked()

    def _grid(self, weight: StoredWeight, rows: slice) -> PackedWeight | None:
        return None

    def _decode(self, weight: StoredWeight, rows: slice, dtype: torch.dtype) -> Tensor:
        grid = self._grid(weight, rows)
        assert grid is not None, f"{self.name} decodes {weight.name} in no way"
        return grid.dense(dtype)

    def _find(self, name: str) -> StoredWeight:
        if name not in self.weights:
            raise CheckpointError(
                f"{self.checkpoint.path}: no tensor {name}",
                hint="is this the checkpoint of the same model?",
            )
        return self.weights[name]


class Wrapper(Reader):
    """A reader on top of another, which reads what this one does not decode itself."""

    inner: Format

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        own = self._find(name).quantized
        return super().dense(name, dtype) if own else self.inner.dense(name, dtype)

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        own = self._find(name).quantized
        read = super().rows if own else self.inner.rows
        return read(name, start, stop, dtype)

    def pieces(self, name: str, rows: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """What this one decodes itself it decodes as a whole."""
        if self._find(name).quantized:
            return iter(torch.split(self.dense(name, dtype), rows))
        return self.inner.pieces(name, rows, dtype)


def by_rows(
    shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[slice, Tensor], None]
) -> Tensor:
    """A new tensor, made some rows at a time.

    `fill` is given the rows and an fp32 tensor to put them in, small enough to stay in cache.
    """
    out = torch.empty(shape, dtype=dtype)
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    buffer = torch.empty(min(step, shape[0]), *shape[1:])
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        part = out[rows] if dtype == torch.float32 else buffer[: rows.stop - start]
        fill(rows, part)
        if dtype != torch.float32:
            out[rows] = part
    return out


def dense_weights(checkpoint: Checkpoint, names: Iterable[str], method: str) -> list[StoredWeight]:
    """The tensors `names` that are stored as they are.

    CheckpointError for one that belongs to a quantized weight which nothing claimed.
    """
    weights = []
    for name in names:
        if name.endswith(ACTIVATION_ENDINGS):
            continue
        info = checkpoint.tensors[name]
        _refuse_leftover(name, info.dtype, method)
        weights.append(
            StoredWeight(
                name=name, shape=info.shape, dtype=info.dtype, quantized=False, sources=(name,)
            )
        )
    return weights


def _refuse_leftover(name: str, dtype: torch.dtype, method: str) -> None:
    settings = (
        "the settings name no quantization" if method == "none" else f"the settings say {method}"
    )
    if name.endswith(QUANTIZED_ENDINGS):
        raise CheckpointError(
            f"{name}: a tensor of a quantized weight that is incomplete, and {settings}",
            hint="a file is missing or config.json's quantization_config is of another checkpoint",
        )
    if name.endswith(".weight") and dtype not in DENSE_DTYPES:
        raise CheckpointError(
            f"{name}: stored as {dtype} without the scales that decode it, and {settings}",
            hint="quantization_config in config.json must say how the weights are quantized",
        )


def common_dtype(weights: Iterable[StoredWeight]) -> torch.dtype:
    """The dtype of most dense tensors; fp16 where all are quantized."""
    found = Counter(
        weight.dtype for weight in weights if not weight.quantized and weight.dtype in DENSE_DTYPES
    )
    return found.most_common(1)[0][0] if found else torch.float16


def tally(weights: Collection[StoredWeight]) -> dict[str, Any]:
    """What every summary counts, as arguments for it."""
    quantized = [weight.name for weight in weights if weight.quantized]
    return {
        "dtype": common_dtype(weights),
        "quantized": len(quantized),
        "dense": len(weights) - len(quantized),
        "lm_head": any(name.endswith("lm_head.weight") for name in quantized),
    }


def nothing_quantized(checkpoint: Checkpoint, file: str | None, method: str) -> CheckpointError:
    """The settings speak of quantization and no tensor is quantized: a half-made release."""
    return CheckpointError(
        f"{checkpoint.path}: {file} says {method}, but no tensor is quantized",
        hint="remove the settings if the model is dense; else look for the quantized files",
    )


def expect_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], why: str) -> None:
    """CheckpointError naming the tensor unless its shape is `wanted`."""
    if tuple(found) != tuple(wanted):
        raise CheckpointError(
            f"{name}: shape {list(found)}, where {why} makes it {list(wanted)}",
            hint="the settings are of another checkpoint, or the file is damaged",
        )


def expect_dtype(info: TensorInfo, wanted: Collection[torch.dtype], what: str) -> None:
    """CheckpointError naming the tensor unless its dtype is one of `wanted`."""
    if info.dtype not in wanted:
        raise CheckpointError(
            f"{info.name}: stored as {info.dtype}, which no {what} is",
            hint="the file is damaged or was written by an incompatible program",
        )


def real_group_index(
    name: str, g_idx_I: Tensor | None, group_size: int, groups: int
) -> Tensor | None:
    """The group of each column, or None where it says what the group size says.

    An index of one and the same value beside several groups is one that was never filled in;
    servers that look at it only under act-order read such files right, and so do we.
    CheckpointError where it names a group that is not there.
    """
    if g_idx_I is None:
        return None
    width = len(g_idx_I)
    g_idx_I = g_idx_I.to(torch.int32)
    columns = width if group_size == -1 else group_size
    trivial = torch.arange(width, dtype=torch.int32) // columns
    if torch.equal(g_idx_I, trivial) or bool((g_idx_I == g_idx_I[0]).all()):
        return None
    if int(g_idx_I.min()) < 0 or int(g_idx_I.max()) >= groups:
        raise CheckpointError(
            f"{name}: names a group outside 0 to {groups - 1}",
            hint="the file is damaged or was written by an incompatible program",
        )
    return g_idx_I


def expect_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor; CheckpointError naming it where it holds a NaN or an infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{name}: holds values that are not finite",
            hint="the quantizer that wrote this checkpoint failed on this layer",
        )
    return tensor


def modules_with(
    tensors: Mapping[str, TensorInfo], suffixes: Collection[str]
) -> tuple[dict[str, dict[str, TensorInfo]], list[str]]:
    """Modules that have the first suffix with all their parts, and the names left over.

    Parts without the first one stay among the names left over, where they are refused by name.
    """
    found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    others = []
    first, *_ = suffixes
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in suffixes and f"{module}.{first}" in tensors:
            found[module][suffix] = info
        else:
            others.append(name)
    return dict(found), others


def required(module: str, parts: Mapping[str, TensorInfo], suffix: str) -> TensorInfo:
    """The part, or CheckpointError naming the tensor that is missing."""
    if suffix not in parts:
        raise CheckpointError(
            f"{module}.{suffix} is missing, and {', '.join(sorted(parts))} are there",
            hint="the download is incomplete: compare the files with the model's page",
        )
    return parts[suffix]
