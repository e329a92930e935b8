"""Writing what a release is made of: each file whole and on the disk, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import StorageError
from qmerge.storage.headers import DTYPES

INDEX_NAME = "model.safetensors.index.json"
# Bytes read or written at a time: measured on ext4, a write of 4 MiB reaches 0.65 GB/s and one of
# 1 MiB or less 2.5 GB/s.
_CHUNK = 2**20
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A written shard: bytes of the file, its SHA-256, and each tensor's name and bytes."""

    file: str
    sha256: str
    nbytes: int
    tensors: tuple[tuple[str, int], ...]


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> ShardRecord:
    """Write one safetensors file. Equal input gives equal bytes, in whatever order it comes.

    The library writes only through a path; here the header is our own, so that the bytes are hashed
    while they are written. StorageError on failure.
    """
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return _write_tensors(path, flat, lambda name: (flat[name],), hashed=True)


def write_pieces(
    path: Path, shapes: Mapping[str, Tensor], pieces: Callable[[str], Iterable[Tensor]]
) -> ShardRecord:
    """Write one safetensors file of tensors that are never whole in memory.

    `shapes` are tensors on the meta device, `pieces` gives the rows of one in order and in its
    dtype. Nothing is hashed: that takes longer than writing, and `sha256` is empty.
    """
    return _write_tensors(path, shapes, pieces, hashed=False)


def write_index(folder: Path, records: Sequence[ShardRecord]) -> str:
    """Write `model.safetensors.index.json` for these shards; its SHA-256."""
    weight_map: dict[str, str] = {}
    for record in records:
        for name, _ in record.tensors:
            assert name not in weight_map, f"{name} is in {weight_map[name]} and in {record.file}"
            weight_map[name] = record.file
    total = sum(nbytes for record in records for _, nbytes in record.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return write_json(folder / INDEX_NAME, index)


def write_json(path: Path, value: Any) -> str:
    """Write `value` indented, in the order its keys have; the file's SHA-256.

    Infinities are written as transformers writes them in a config (`Infinity`).
    """
    return write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> str:
    """Write `text` in UTF-8; the file's SHA-256."""
    return _write(path, (text.encode("utf-8", errors="backslashreplace"),))


def write_out(path: Path, text: str) -> None:
    """Write `text` where a user said: through links, and into a device or a pipe as it is."""
    if not path.exists() or path.is_file():
        write_text(Path(os.path.realpath(path)), text)
        return
    with translated(path):
        path.write_text(text, encoding="utf-8", errors="backslashreplace")


def copy_file(source: Path, target: Path) -> str:
    """Copy the bytes (not the mode, not a link as a link); their SHA-256."""
    return _write(target, _chunks(source))


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes; StorageError if it cannot be read."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in this folder last through a loss of power."""
    with translated(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
                raise
        finally:
            os.close(handle)


def _write(path: Path, chunks: Iterable[bytes | memoryview], *, hashed: bool = True) -> str:
    """Temporary file beside the target, fsync, rename, fsync of the folder; SHA-256 of the bytes
    where they are `hashed`, else nothing.

    The temporary name is fixed, so that a killed run leaves at most one, and is made anew each
    time (`x`), so that a link planted under it is not followed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    digest = hashlib.sha256()
    with translated(path):
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:
                for chunk in chain.from_iterable(map(in_pieces, chunks)):
                    file.write(chunk)
                    if hashed:
                        digest.update(chunk)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)
    return digest.hexdigest() if hashed else ""


def _write_tensors(
    path: Path,
    shapes: Mapping[str, Tensor],
    pieces: Callable[[str], Iterable[Tensor]],
    *,
    hashed: bool,
) -> ShardRecord:
    # The widest dtype first, so that each tensor begins at a multiple of its item's size.
    ordered = sorted(shapes, key=lambda name: (-shapes[name].element_size(), name))
    header = _header(shapes, ordered)
    parts = (_bytes_of(piece) for name in ordered for piece in pieces(name))
    sha256 = _write(path, chain((header,), parts), hashed=hashed)
    sizes = tuple((name, shapes[name].nbytes) for name in sorted(shapes))
    total = len(header) + sum(nbytes for _, nbytes in sizes)
    return ShardRecord(file=path.name, sha256=sha256, nbytes=total, tensors=sizes)


def _chunks(path: Path) -> Iterator[bytes]:
    with translated(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _header(shapes: Mapping[str, Tensor], ordered: Sequence[str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        tensor = shapes[name]
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    raw: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return raw


def in_pieces(data: bytes | memoryview) -> Iterator[memoryview]:
    """The bytes as pieces of a size that is written fast."""
    view = memoryview(data)
    return (view[start : start + _CHUNK] for start in range(0, len(view), _CHUNK))


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Errors of the system about `path` become a StorageError that names it."""
    try:
        yield
    except OSError as error:
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space and give the same command again"
        reason = error.strerror or type(error).__name__
        raise StorageError(f"{path}: {reason}", hint=hint) from error
