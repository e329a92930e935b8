"""What every reader hands out: the model's dense tensors, whatever they are stored as.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats.checks import DENSE_DTYPES
from qmerge.formats.integer import ALL, IntegerWeight, PackedWeight
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.headers import TensorInfo

L = TypeVar("L")
NOTHING: Mapping[str, Any] = MappingProxyType({})

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


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """One tensor of the model, by the name that a dense checkpoint gives it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """What the tensor is stored in where it is dense, else the 16-bit dtype it stands for."""
    quantized: bool
    sources: tuple[str, ...]
    """The stored tensors it is decoded from."""
    bits: int | None = None
    """Bits of a code; None where it is not quantized."""


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


class Reader(Generic[L]):
    """What readers share: tensors stored as they are, and errors about names.

    A format adds `_grid` where its weights lie on an integer grid, else `_decode`. `layouts` is
    what it has to know for that of each quantized weight.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        weights: Iterable[StoredWeight],
        summary: FormatSummary,
        layouts: Mapping[str, L] = NOTHING,
    ) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.weights: Mapping[str, StoredWeight] = {
            weight.name: weight for weight in sorted(weights, key=lambda weight: weight.name)
        }
        self.summary = summary
        self.layouts = layouts

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


class Wrapper(Reader[None]):
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
