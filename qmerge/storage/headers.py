"""Safetensors headers, checked by hand before the library may map the file.

Format (https://huggingface.co/docs/safetensors): eight bytes of header length, little-endian; a
JSON object of name to dtype, shape and offsets; then the tensors' bytes without gap or overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qmerge.errors import CheckpointError
from qmerge.storage.files import (
    expect_fetched,
    parse_json,
    read_bytes,
    regular_status,
    translate,
)

HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_LENGTH_BYTES = 8
_MAX_RANK = 64
_MAX_DIMENSION = 2**63 - 1

# Packed kinds of less than a byte (F4, F6) are left out: their shapes count values, torch's bytes.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What is known of a stored tensor without reading it. `nbytes` are the bytes it decodes to."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, by name, from its header alone.

    Raises CheckpointError naming the file (and tensor) on anything that breaks the format, or that
    the safetensors library itself refuses.
    """
    size = regular_status(path).st_size
    length = _header_length(path, size)
    header = read_bytes(path, start=_LENGTH_BYTES, length=length)
    entries = parse_json(header, path, unique=True)
    entries.pop("__metadata__", None)  # free text; the library checks its type
    placed = [_parse_entry(path, name, entry) for name, entry in entries.items()]
    _check_layout(path, placed, size - _LENGTH_BYTES - length)
    _check_with_library(path)
    return {info.name: info for _, info in placed}


def _header_length(path: Path, size: int) -> int:
    if size < _LENGTH_BYTES:
        raise CheckpointError(f"{path}: truncated: {size} bytes cannot hold a safetensors header")
    length = int.from_bytes(read_bytes(path, length=_LENGTH_BYTES), "little")
    if length > HEADER_LIMIT:
        expect_fetched(path)
        raise CheckpointError(
            f"{path}: not a safetensors file: a header of {length} bytes is over the format's limit"
        )
    if length > size - _LENGTH_BYTES:
        raise CheckpointError(f"{path}: truncated: header of {length} bytes in a file of {size}")
    return length


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[int, TensorInfo]:
    """Offset of the tensor's first byte among the data, and what the header says of it."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {str(entry['dtype'])[:40]!r}")
    shape = _integers(where, "shape", entry["shape"])
    offsets = _integers(where, "data_offsets", entry["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: invalid data_offsets {list(offsets)}")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: shape {list(shape)} needs {nbytes} bytes, its offsets hold "
            f"{offsets[1] - offsets[0]}"
        )
    info = TensorInfo(name=name, dtype=dtype, shape=shape, file=path, nbytes=nbytes)
    return offsets[0], info


def _integers(where: str, what: str, value: Any) -> tuple[int, ...]:
    """A short list of bounded counts, so that no product of them can grow without limit."""
    if not isinstance(value, list) or len(value) > _MAX_RANK:
        raise CheckpointError(f"{where}: {what} is not a list of at most {_MAX_RANK} integers")
    if any(type(item) is not int or not 0 <= item <= _MAX_DIMENSION for item in value):
        raise CheckpointError(f"{where}: {what} holds something that is not a size")
    return tuple(value)


def _check_layout(path: Path, placed: list[tuple[int, TensorInfo]], data_bytes: int) -> None:
    """The tensors must cover the data exactly: no gap, no overlap, nothing left over."""
    end = 0
    for start, info in sorted(placed, key=lambda item: (item[0], item[1].nbytes)):
        if start != end:
            fault = "overlaps the one before it" if start < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {info.name!r} {fault} (offset {start})")
        end = start + info.nbytes
    if end > data_bytes:
        raise CheckpointError(
            f"{path}: truncated: the header promises {end} bytes of tensors, "
            f"the file holds {data_bytes}",
            hint="the download or copy was cut short; fetch this file again",
        )
    if end < data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - end} bytes after the last tensor")


def _check_with_library(path: Path) -> None:
    """So that nothing the library refuses is found out hours later, at the first read."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except OSError as error:
        raise translate(error, path) from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error
