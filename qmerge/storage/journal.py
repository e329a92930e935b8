"""What a run has finished, one line each, so that a killed run goes on after its last whole line.

A line is a JSON object `{"digest": …, "event": …}`. The digest is the SHA-256 of the digest before
it and the event's text, so a line that was changed, moved or taken out shows.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qmerge.errors import StorageError
from qmerge.storage.shards import sync_folder, translated

Event = Mapping[str, Any]
RESTART_HINT = "give --restart to throw away what was done and begin anew"


class Journal:
    """An append-only journal, held by one process at a time.

    An event returned by `events` is on the disk. The last line, if it is not whole, was being
    written when the run was killed: it is dropped on opening.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle = handle
        self._events: list[Event] = []
        self._digest = ""
        self._end = 0  # bytes of whole lines

    @classmethod
    def open(cls, path: str | Path, *, restart: bool = False) -> Self:
        """Take the lock and read what is there, or with `restart` empty it.

        Raises StorageError if another process holds the journal, if a line before the last is
        damaged, or if the file cannot be read or written.
        """
        file = Path(path)
        with translated(file):
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        journal = cls(file, handle)
        try:
            with translated(file):
                journal._lock()
                if not restart:
                    journal._load()
                os.ftruncate(handle, journal._end)
                os.fsync(handle)
            sync_folder(file.parent)
        except BaseException:
            journal.close()
            raise
        return journal

    def append(self, event: Event) -> None:
        """Add `event` (JSON values only) and return when it is on the disk."""
        text = _canonical(event)
        digest = _chain(self._digest, text)
        line = f'{{"digest": "{digest}", "event": {text}}}\n'.encode()
        try:
            with translated(self.path):
                os.ftruncate(self._handle, self._end)  # whatever an interrupted append left behind
                _write_all(self._handle, line, self._end)
                os.fsync(self._handle)
        except StorageError:
            with suppress(OSError):
                os.ftruncate(self._handle, self._end)
            raise
        self._digest = digest
        self._end += len(line)
        self._events.append(json.loads(text))

    def events(self) -> tuple[Event, ...]:
        """All events, oldest first, as JSON gives them back (lists for tuples)."""
        return tuple(self._events)

    def close(self) -> None:
        """Give up the lock; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        _take(self._handle, self.path, fcntl.LOCK_EX)
        # Between opening and locking, the other process may have published or removed the folder.
        held = os.fstat(self._handle)
        if not self.path.exists() or not os.path.samestat(held, self.path.stat()):
            raise StorageError(
                f"{self.path}: was moved or removed by another process",
                hint="give the command again",
            )

    def _load(self) -> None:
        with os.fdopen(os.dup(self._handle), "rb") as file:
            lines = file.readlines()
        for number, line in enumerate(lines, start=1):
            parsed = _parse(line, self._digest)
            if parsed is None and number == len(lines):
                return
            if parsed is None:
                raise StorageError(f"{self.path}: line {number} is damaged", hint=RESTART_HINT)
            self._digest, event = parsed
            self._events.append(event)
            self._end += len(line)


def glance(path: Path) -> list[Event]:
    """The events of a journal up to what is no whole line; nothing is written.

    Raises StorageError if another process holds it, or if it cannot be read.
    """
    events: list[Event] = []
    digest = ""
    with translated(path), path.open("rb") as file:
        _take(file.fileno(), path, fcntl.LOCK_SH)
        for line in file:
            parsed = _parse(line, digest)
            if parsed is None:
                break
            digest, event = parsed
            events.append(event)
    return events


def _take(handle: int, path: Path, lock: int) -> None:
    """The system lets go of the lock when the process ends, however it ends."""
    try:
        fcntl.flock(handle, lock | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StorageError(
            f"{path}: another process is at work in this folder",
            hint="wait for it to end, or give another --out",
        ) from error


def _canonical(event: Any) -> str:
    """The text that is digested, and that reads back as it is: keys are strings, in their order."""
    return json.dumps(json.loads(json.dumps(event)))


def _chain(previous: str, text: str) -> str:
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def _parse(line: bytes, previous: str) -> tuple[str, Event] | None:
    """Digest and event of a whole line that follows `previous`, else None."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
        digest, event = entry["digest"], entry["event"]
        whole = digest == _chain(previous, _canonical(event))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (digest, event) if whole and isinstance(event, dict) else None


def _write_all(handle: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
