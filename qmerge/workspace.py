"""The folder a run works in, beside the one it will publish, and what is on disk in it.

`OUT.partial` holds the journal, the hidden states and, for each strategy, a release in the making.
Publishing is one rename of the chosen one; leaving in any other way publishes nothing, and the same
command goes on after the last unit that the journal has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qmerge.errors import RecipeError, StorageError
from qmerge.storage.journal import Journal
from qmerge.storage.shards import ShardRecord, sha256_file, sync_folder

RESTART_HINT = "give --restart to throw away what was done and begin anew"


class Workspace:
    """`OUT.partial`, held by one process at a time."""

    def __init__(self, out: Path, journal: Journal) -> None:
        self.out = out
        self.folder = journal.path.parent
        self._journal = journal

    @classmethod
    def open(cls, out: Path, fingerprint: Mapping[str, Any], *, restart: bool) -> Self:
        """Begin, or go on where the same recipe on the same inputs was stopped.

        Raises `RecipeError` naming what differs from the run that was stopped, `StorageError` where
        another process is at work.
        """
        folder = partial(out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror}") from error
        journal = Journal.open(folder / "journal.jsonl", restart=restart)
        workspace = cls(out, journal)
        events = journal.events()
        if not events:
            workspace._clear()
            journal.append({"begin": fingerprint})
        else:
            try:
                _compare(events[0].get("begin", {}), fingerprint, folder)
            except RecipeError:
                journal.close()
                raise
        return workspace

    @property
    def streams(self) -> Path:
        return self.folder / "streams"

    def release(self, strategy: str) -> Path:
        """The release in the making for one strategy."""
        path = self.folder / f"release-{strategy}"
        path.mkdir(exist_ok=True)
        return path

    def finished(self) -> dict[str, Mapping[str, Any]]:
        """What the journal says of each finished unit, by label."""
        return {event["unit"]: event for event in self._journal.events() if "unit" in event}

    def finish(self, label: str, event: Mapping[str, Any]) -> None:
        """Record a unit whose files are all on disk. From here on it is not done again."""
        self._journal.append({"unit": label, **event})

    def check(self, strategy: str, record: ShardRecord) -> None:
        """Whether a journalled shard is still what was written; `StorageError` names it if not."""
        path = self.release(strategy) / record.file
        if not path.is_file() or sha256_file(path) != record.sha256:
            raise StorageError(
                f"{path}: is not what the journal says was written", hint=RESTART_HINT
            )

    def publish(self, strategy: str) -> None:
        """Make the release appear under its name, whole, and clear away the rest."""
        sync_folder(self.release(strategy))
        if self.out.exists():
            raise StorageError(
                f"{self.out}: appeared during the run", hint="move it away and run again"
            )
        try:
            self.release(strategy).rename(self.out)
        except OSError as error:
            raise StorageError(f"{self.out}: {error.strerror}") from error
        sync_folder(self.out.absolute().parent)
        self._journal.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry == self._journal.path:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()


def partial(out: Path) -> Path:
    """Where a run that publishes `out` works."""
    return out.with_name(f"{out.name}.partial")


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    flat_before, flat_now = _flat(before), _flat(now)
    differing = sorted(
        key
        for key in flat_before.keys() | flat_now.keys()
        if flat_before.get(key) != flat_now.get(key)
    )
    if differing:
        shown = "; ".join(
            f"{key} was {flat_before.get(key)}, is {flat_now.get(key)}" for key in differing[:4]
        )
        raise RecipeError(
            f"{folder} holds another run that was stopped: {shown}",
            hint=f"give the same options to go on, or {RESTART_HINT.removeprefix('give ')}",
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        parts = (_flat(value, f"{path}.{key}" if path else str(key)) for key, value in tree.items())
        return {key: value for part in parts for key, value in part.items()}
    return {path: tree}


def disk_free(path: Path) -> int:
    """Bytes free where `path` will be."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize
