"""bitsandbytes checkpoints: nf4 and fp4, with and without double quantization, and int8.

Shapes: O out features, I in features, N = O·I elements in row-major order. 4-bit: X uint8 with two
codes per byte, the first in the high nibble; X.absmax per block; X.quant_map fp32 [16]; the state
(block size, dtype, shape) as UTF-8 JSON in a uint8 tensor. With double quantization X.absmax is
itself uint8 codes into X.nested_quant_map [256], in blocks with X.nested_absmax.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats.base import (
    FormatSummary,
    Reader,
    StoredWeight,
    common_dtype,
    dense_weights,
    tally,
)
from qmerge.formats.checks import (
    DENSE_DTYPES,
    expect_dtype,
    expect_finite,
    expect_shape,
    nothing_quantized,
)
from qmerge.formats.integer import by_rows
from qmerge.formats.packing import look_up
from qmerge.formats.settings import Settings
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.headers import TensorInfo

STATE = ".quant_state.bitsandbytes__"
STATE_LIMIT = 1 << 16
KINDS = ("nf4", "fp4")

# bitsandbytes multiplies int8 codes by this constant instead of dividing by 127.
INT8_STEP = 7.874015718698502e-3

# What `weight_format` says of rows in their natural order; older releases had tiled ones.
ROW_FORMAT = 0


@dataclass(frozen=True, kw_only=True)
class BlockState:
    """What the state of one 4-bit weight says."""

    kind: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_blocksize: int | None
    """None without double quantization."""
    nested_offset: float

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.elements // self.blocksize)


class BitsandbytesReader(Reader[BlockState]):
    """nf4, fp4 and int8 weights, each decoded as bitsandbytes itself does."""

    methods: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    @classmethod
    def open(cls, checkpoint: Checkpoint, settings: Settings) -> Self:
        """Reads the headers, the states of 4-bit weights and `weight_format` of int8 ones."""
        tensors = checkpoint.tensors
        states = {
            name.rpartition(STATE)[0]: _read_state(checkpoint, name)
            for name in tensors
            if STATE in name
        }
        rows = {name: _int8_sources(checkpoint, name) for name in tensors if name.endswith(".SCB")}
        if not states and not rows:
            raise nothing_quantized(checkpoint, settings.file, "bitsandbytes")
        blocks = [_weight_4bit(checkpoint, name, state) for name, state in states.items()]
        claimed = {name for weight in blocks for name in weight.sources}
        claimed.update(name for sources in rows.values() for name in sources)
        others = [name for name in tensors if name not in claimed]
        weights = dense_weights(checkpoint, others, settings.method)
        dtype = common_dtype(weights)
        weights += blocks
        weights += [_weight_int8(checkpoint, sources, dtype) for sources in rows.values()]
        kind = next(iter(states.values())).kind if states else "int8"
        return cls(
            checkpoint,
            layouts=states,
            name=f"bitsandbytes-{kind}",
            weights=weights,
            summary=_summary(kind, settings, list(states.values()), weights),
        )

    def _decode(self, weight: StoredWeight, rows: slice, dtype: torch.dtype) -> Tensor:
        state = self.layouts.get(weight.name)
        if state is not None:
            return self._decode_4bit(weight.name, state, rows, dtype)
        codes, scale = (self.checkpoint.read(name)[rows] for name in weight.sources[:2])
        scale = expect_finite(weight.sources[1], scale).float().view(-1, 1)

        def fill(rows: slice, out: Tensor) -> None:
            out.copy_(codes[rows]).mul_(scale[rows]).mul_(INT8_STEP)

        return by_rows(tuple(codes.shape), dtype, fill)

    def _decode_4bit(self, name: str, state: BlockState, rows: slice, dtype: torch.dtype) -> Tensor:
        """The blocks that the rows lie in; a block may run over the end of a row."""
        first, stop, _ = rows.indices(state.shape[0])
        width = state.elements // state.shape[0]
        blocks = slice(first * width // state.blocksize, -(-stop * width // state.blocksize))
        before = first * width - blocks.start * state.blocksize
        shape = (stop - first, *state.shape[1:])
        absmax = self._vector(f"{name}.absmax")[blocks]
        if state.nested_blocksize is not None:
            absmax = _unnest(
                absmax,
                self._vector(f"{name}.nested_quant_map").float(),
                self._vector(f"{name}.nested_absmax").float(),
                state,
                blocks.start,
            )
        absmax = expect_finite(f"{name}.absmax", absmax.float())
        code = self._vector(f"{name}.quant_map").float()
        half = state.blocksize // 2
        packed = self._vector(name).view(torch.uint8)[blocks.start * half : blocks.stop * half]
        flat = decode_blocks(packed, absmax, code, state, dtype)
        return flat[before : before + stop * width - first * width].view(shape)

    def _vector(self, name: str) -> Tensor:
        """Parts are vectors, whatever shape they were stored in."""
        return self.checkpoint.read(name).flatten()


def decode_blocks(
    packed: Tensor, absmax: Tensor, code: Tensor, state: BlockState, dtype: torch.dtype
) -> Tensor:
    """code[nibble] · absmax of its block: in fp32, rounded to the state's dtype as at training
    and inference, then to `dtype`; a vector, its last block filled up.

    `packed` is a uint8 vector, two codes a byte with the first in the high nibble.
    """
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)
    half = state.blocksize // 2

    def fill(blocks: slice, out: Tensor) -> None:
        codes = packed[blocks.start * half : blocks.stop * half]
        look_up(codes, pairs, out.view(-1)[: 2 * len(codes)])
        out.mul_(absmax[blocks].unsqueeze(1))
        if state.dtype not in (torch.float32, dtype):
            out.copy_(out.to(state.dtype))

    return by_rows((len(absmax), state.blocksize), dtype, fill).view(-1)


def _unnest(codes: Tensor, code: Tensor, absmax: Tensor, state: BlockState, first: int) -> Tensor:
    """Block maxima from their own 8-bit codes: code[c] · absmax of the block, plus the offset.

    `codes` begin with those of block `first`."""
    assert state.nested_blocksize is not None
    block = torch.arange(first, first + len(codes)) // state.nested_blocksize
    return code[codes.int()] * absmax[block] + state.nested_offset


def _read_state(checkpoint: Checkpoint, name: str) -> BlockState:
    """The JSON in the tensor `name`; CheckpointError where it is damaged or of an unknown kind."""
    if checkpoint.tensors[name].nbytes > STATE_LIMIT:
        raise CheckpointError(f"{name}: too long for a quantization state of bitsandbytes")
    try:
        found: dict[str, Any] = json.loads(bytes(checkpoint.read(name).tolist()))
        nested = found.get("nested_blocksize")
        state = BlockState(
            kind=str(found["quant_type"]),
            blocksize=int(found["blocksize"]),
            dtype=getattr(torch, str(found["dtype"])),
            shape=tuple(int(size) for size in found["shape"]),
            nested_blocksize=None if nested is None else int(nested),
            nested_offset=float(found.get("nested_offset", 0.0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{name}: not a quantization state of bitsandbytes", hint="the file is damaged"
        ) from error
    if (
        state.kind not in KINDS
        or state.dtype not in DENSE_DTYPES
        or state.blocksize < 2
        or state.blocksize % 2
    ):
        raise CheckpointError(
            f"{name}: {state.kind} in blocks of {state.blocksize} for {state.dtype}",
            hint=f"qmerge reads {' and '.join(KINDS)} for 16 and 32 bits",
        )
    return state


def _weight_4bit(checkpoint: Checkpoint, name: str, state: BlockState) -> StoredWeight:
    """The logical weight, once all its parts are there and fit the state."""
    sizes = {
        name: -(-state.elements // 2),
        f"{name}.absmax": state.blocks,
        f"{name}.quant_map": 16,
    }
    if state.nested_blocksize is not None:
        sizes[f"{name}.nested_absmax"] = -(-state.blocks // state.nested_blocksize)
        sizes[f"{name}.nested_quant_map"] = 256
    for part, size in sizes.items():
        info = _part(checkpoint, part, f"{name}{STATE}{state.kind}")
        width = info.dtype.itemsize if part == name else 1
        if part != name:
            codes = part == f"{name}.absmax" and state.nested_blocksize is not None
            expect_dtype(info, (torch.uint8,) if codes else DENSE_DTYPES, "part of a 4-bit weight")
        of = f"{state.kind} of {list(state.shape)} in blocks of {state.blocksize}"
        expect_shape(part, (math.prod(info.shape) * width,), (size,), of)
    return StoredWeight(
        name=name,
        shape=state.shape,
        dtype=state.dtype,
        quantized=True,
        sources=(*sizes, f"{name}{STATE}{state.kind}"),
        bits=4,
    )


def _int8_sources(checkpoint: Checkpoint, scale: str) -> tuple[str, ...]:
    """The stored tensors of the int8 weight that the row scales `scale` belong to."""
    module = scale.removesuffix(".SCB")
    _part(checkpoint, f"{module}.weight", scale)
    layout = f"{module}.weight_format"
    if layout not in checkpoint.tensors:
        return f"{module}.weight", scale
    if checkpoint.read(layout).flatten().tolist() != [ROW_FORMAT]:
        raise CheckpointError(
            f"{layout}: int8 in a tiled layout of an old GPU kernel",
            hint="save the model again with a current bitsandbytes",
        )
    return f"{module}.weight", scale, layout


def _weight_int8(
    checkpoint: Checkpoint, sources: tuple[str, ...], dtype: torch.dtype
) -> StoredWeight:
    name, scale = sources[:2]
    info = checkpoint.tensors[name]
    if info.dtype != torch.int8 or len(info.shape) != 2:
        raise CheckpointError(
            f"{name}: {info.dtype} {list(info.shape)}, where {scale} makes it an int8 matrix",
            hint="the file is damaged, or only a part of it was converted",
        )
    expect_dtype(checkpoint.tensors[scale], DENSE_DTYPES, "scale")
    expect_shape(scale, checkpoint.tensors[scale].shape, info.shape[:1], f"the shape of {name}")
    return StoredWeight(
        name=name, shape=info.shape, dtype=dtype, quantized=True, sources=sources, bits=8
    )


def _part(checkpoint: Checkpoint, name: str, because: str) -> TensorInfo:
    if name not in checkpoint.tensors:
        raise CheckpointError(
            f"{name} is missing, and {because} is there",
            hint="the download is incomplete: compare the files with the model's page",
        )
    return checkpoint.tensors[name]


def _summary(
    kind: str, settings: Settings, states: Sequence[BlockState], weights: Sequence[StoredWeight]
) -> FormatSummary:
    sizes = {state.blocksize for state in states}
    return FormatSummary(
        method="bitsandbytes",
        checkpoint_format=kind,
        settings_file=settings.file,
        bits=4 if states else 8,
        block_size=(sizes.pop() if len(sizes) == 1 else -1) if states else None,
        double_quantization=any(s.nested_blocksize is not None for s in states) if states else None,
        **tally(weights),
    )
