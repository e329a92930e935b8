"""Hidden states of every arm and corpus, spilled to disk in two generations.

A layer reads one generation and writes the other; the journal names the one that is whole, so a
kill in the middle of writing loses nothing. Only a batch of windows is ever in memory. Files are
written over in place, which spares the system freeing and finding pages for each layer anew, and
summed up by CRC-32: it is accidents that must not pass.

W: windows, S: tokens of a window, H: hidden width.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import StorageError
from qmerge.storage.shards import in_pieces, sync_folder, translated

BYTES_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The shape of one arm's hidden states on one corpus."""

    windows: int
    length: int
    width: int

    @property
    def nbytes(self) -> int:
        return 4 * self.windows * self.length * self.width


class Streams:
    """Float32 hidden states by key ("trained.shakespeare"), two files each."""

    def __init__(
        self,
        folder: Path,
        streams: Mapping[str, Stream],
        *,
        resumable: bool = True,
    ) -> None:
        """What is not `resumable` is written without checksums, and cannot be committed."""
        self.folder = folder
        self.generation = 0
        self._resumable = resumable
        self._streams = dict(streams)
        # Numbers, because the name of a corpus need not be one of a file.
        self._numbers = {key: number for number, key in enumerate(self._streams)}
        self._sums: dict[str, int] = {}
        self._written: dict[str, int] = {}
        with translated(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def stream(self, key: str) -> Stream:
        return self._streams[key]

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Windows [start, stop) of the whole generation as [w, S, H]."""
        return self._read(key, self.generation, start, stop)

    def fresh(self, key: str, start: int, stop: int) -> torch.Tensor:
        """The same of the generation that is being written, once it has them."""
        return self._read(key, self.generation ^ 1, start, stop)

    def _read(self, key: str, generation: int, start: int, stop: int) -> torch.Tensor:
        stream = self._streams[key]
        hidden = torch.empty(stop - start, stream.length, stream.width)
        view = _bytes_of(hidden)
        path = self._path(key, generation)
        with translated(path), path.open("rb") as file:
            file.seek(4 * start * stream.length * stream.width)
            if file.readinto(view) != len(view):
                raise StorageError(
                    f"{path}: hidden states are cut short",
                    hint="run again with --restart",
                )
        return hidden

    def append(self, key: str, hidden_WSH: torch.Tensor) -> None:
        """Add windows, in order, to the generation that is being written."""
        path = self._path(key, self.generation ^ 1)
        written = self._written.get(key, 0)
        data = _bytes_of(hidden_WSH.float().contiguous().cpu())
        with translated(path), path.open("r+b" if path.exists() else "xb") as file:
            file.seek(written)
            for piece in in_pieces(data):
                file.write(piece)
        if self._resumable:
            self._sums[key] = zlib.crc32(data, self._sums.get(key, 0))
        self._written[key] = written + len(data)

    def commit(self) -> dict[str, str]:
        """Force the new generation to disk; its checksums by key. Call `turn` once journalled."""
        assert self._resumable, "nothing to go on from"
        for key, stream in self._streams.items():
            assert self._written.get(key) == stream.nbytes, key
            path = self._path(key, self.generation ^ 1)
            with translated(path), path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(self.folder)
        return {key: f"{crc:08x}" for key, crc in self._sums.items()}

    def turn(self) -> None:
        """Make the generation just committed the one that is read."""
        self.generation ^= 1
        self._sums.clear()
        self._written.clear()

    def check(self, sums: Mapping[str, str]) -> None:
        """Compare the whole generation with journalled sums; `StorageError` names a bad file."""
        for key, expected in sums.items():
            path, crc = self._path(key, self.generation), 0
            try:
                with path.open("rb") as file:
                    while chunk := file.read(BYTES_AT_ONCE):
                        crc = zlib.crc32(chunk, crc)
            except OSError as error:
                raise StorageError(f"{path}: {error}", hint="run again with --restart") from error
            if f"{crc:08x}" != expected:
                raise StorageError(
                    f"{path}: hidden states differ from what the journal recorded",
                    hint="run again with --restart",
                )

    def _path(self, key: str, generation: int) -> Path:
        return self.folder / f"{self._numbers[key]:03}.{generation}.f32"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


def batches(windows: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover `windows`, `at_once` each."""
    for start in range(0, windows, at_once):
        yield start, min(start + at_once, windows)
