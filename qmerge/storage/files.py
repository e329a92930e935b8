"""Reading plain files that may be anything: bounded, regular, and in our own errors."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from qmerge.errors import CheckpointError, QmergeError, StorageError

# The index of a mixture of experts with 300,000 tensors takes about 30 MB. Parsed JSON takes up to
# 25 times its text, so the limit also bounds memory.
JSON_LIMIT = 64 * 2**20

_POINTER = b"version https://git-lfs.github.com/spec/"

# The machine's doing; every other error speaks of the path that was given.
_MACHINES_FAULT = frozenset(
    (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT)
)


def translate(error: OSError, path: Path) -> QmergeError:
    """The error to raise in place of `error`: CheckpointError unless the machine is at fault."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in _MACHINES_FAULT:
        return StorageError(f"{path}: reading failed: {reason}")
    denied = error.errno in (errno.EACCES, errno.EPERM)
    hint = "get the right to read it, and to enter the folders above it" if denied else None
    return CheckpointError(f"{path}: {reason}", hint=hint)


def regular_status(path: Path) -> os.stat_result:
    """Its status; pipes, devices and folders are refused: reading them may never end.

    Links are followed: that is how the hub's cache keeps its files.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise translate(error, path) from error
    except ValueError as error:  # a NUL byte or a lone surrogate in a name that an index gave
        raise CheckpointError(f"{str(path)!r}: no file can have this name") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return status


def read_bytes(path: Path, *, start: int = 0, length: int) -> bytes:
    """`length` bytes from `start`; a shorter file is a CheckpointError."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
    except OSError as error:
        raise translate(error, path) from error
    if len(data) != length:
        raise CheckpointError(f"{path}: truncated: {len(data)} bytes where {length} should be")
    return data


def expect_fetched(path: Path) -> None:
    """CheckpointError for the few lines that git-lfs leaves in place of a file it did not fetch."""
    size = regular_status(path).st_size
    if read_bytes(path, length=min(size, len(_POINTER))) == _POINTER:
        raise CheckpointError(
            f"{path}: a pointer of git-lfs, not the file itself",
            hint="fetch the files with `git lfs pull`",
        )


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in a file of at most `JSON_LIMIT` bytes; anything else: CheckpointError."""
    size = regular_status(path).st_size
    if size > JSON_LIMIT:
        raise CheckpointError(f"{path}: {size} bytes of JSON, more than the {JSON_LIMIT} allowed")
    return parse_json(read_bytes(path, length=size), path, unique=unique)


def parse_json(data: bytes, path: Path, *, unique: bool) -> dict[str, Any]:
    """The JSON object in `data`; with `unique`, a name given twice is refused."""
    hook = _no_duplicates if unique else None
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, too deep, too many digits
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return value
