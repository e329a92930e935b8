"""The folder a run works in, beside the one it will publish, and what is on disk in it.

`OUT.partial` holds the journal, the hidden states and, for each strategy, a release in the making.
Publishing is one rename of the chosen one; leaving in any other way publishes nothing, and the same
command goes on after the last unit that the journal has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qmerge import __version__
from qmerge.errors import RecipeError, StorageError
from qmerge.job import Job, partial_folder
from qmerge.options import options
from qmerge.provenance import versions
from qmerge.recipe import Recipe
from qmerge.results import InputRecord, encode
from qmerge.storage.journal import RESTART_HINT, Journal, glance
from qmerge.storage.shards import ShardRecord, sha256_file, sync_folder, translated

JOURNAL = "journal.jsonl"
PUBLISH = "publish"
DIFFERENCES = 4
"""Differences between two runs that a message lists."""


class Workspace:
    """`OUT.partial`, held by one process at a time."""

    def __init__(self, out: Path, journal: Journal) -> None:
        self.out = out
        self.folder = journal.path.parent
        self._journal = journal

    @classmethod
    def open(cls, out: Path, fingerprint: Mapping[str, Any], *, restart: bool) -> Self:
        """Begin, or go on where the same recipe on the same inputs was stopped.

        Raises `RecipeError` naming what differs from the run that was stopped, or where the folder
        holds something else than a run; `StorageError` where another process is at work.
        """
        folder = partial_folder(out)
        _make(folder)
        workspace = cls(out, Journal.open(folder / JOURNAL, restart=restart))
        try:
            workspace._begin(fingerprint)
        except BaseException:
            workspace.close()
            raise
        return workspace

    @classmethod
    def tidy(cls, out: Path) -> Any:
        """Clear away what a run left that was stopped right after its release had appeared.

        Returns what that run gave to `publish`, or None where nothing of the kind is there.
        """
        folder = partial_folder(out)
        if not os.access(folder / JOURNAL, os.F_OK) or folder.is_symlink() or not out.is_dir():
            return None
        with cls(out, Journal.open(folder / JOURNAL)) as workspace:
            event = (workspace._journal.events() or ({},))[-1]
            if PUBLISH not in event or (folder / f"release-{event[PUBLISH]}").exists():
                return None
            workspace._remove()
            return event["asked"]

    @property
    def streams(self) -> Path:
        return self.folder / "streams"

    def release(self, strategy: str) -> Path:
        """The release in the making for one strategy."""
        path = self.folder / f"release-{strategy}"
        if not path.is_dir():
            with translated(path):
                path.mkdir()
            sync_folder(self.folder)
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

    def publish(self, strategy: str, asked: Any) -> None:
        """Make the release appear under its name, whole, and clear away the rest.

        `asked` is what `tidy` gives back to a run that finds this one stopped in between.
        """
        release = self.release(strategy)
        sync_folder(release)
        self._journal.append({PUBLISH: strategy, "asked": asked})
        self._refuse_published()
        with translated(self.out):
            release.rename(self.out)
        sync_folder(self.out.absolute().parent)
        with suppress(StorageError):  # the release is there; what stays behind, `tidy` removes
            self._remove()

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
        if isinstance(error, KeyboardInterrupt) and self.finished():
            error.add_note(
                f"{len(self.finished())} finished units are kept in {self.folder}: "
                "the same command goes on from there"
            )
        self.close()

    def _begin(self, fingerprint: Mapping[str, Any]) -> None:
        self._refuse_published()
        events = self._journal.events()
        if events:
            _compare(events[0].get("begin", {}), fingerprint, self.folder)
            _refuse_links(self.folder)
        else:
            self._clear()
            self._journal.append({"begin": fingerprint})

    def _refuse_published(self) -> None:
        """Whoever held the folder before may have published after this run was planned."""
        if self.out.exists() or self.out.is_symlink():
            raise StorageError(
                f"{self.out}: appeared during the run", hint="move it away and run again"
            )

    def _clear(self) -> None:
        """Remove everything but the journal."""
        with translated(self.folder):
            for entry in self.folder.iterdir():
                if entry == self._journal.path:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()

    def _remove(self) -> None:
        """Remove the folder, the journal last: while it is there, `tidy` knows what the rest is."""
        self._clear()
        with translated(self.folder):
            self._journal.path.unlink()
            self.folder.rmdir()
        self.close()


def fingerprint(job: Job) -> dict[str, Any]:
    """What must be the same for a stopped run to be gone on with, but for the inputs' digests."""
    asked = {
        each.name: encode(getattr(job.recipe, each.name))
        for each in options(Recipe)
        if not each.transient and each.name != "out"
    }
    texts = {corpus.name: corpus.sha256 for corpus in (job.calibration, *job.evaluation)}
    made_by = {"qmerge": __version__, **versions(), "device": job.device.type}
    return {"made by": made_by, "recipe": asked, "texts": texts}


def whole_fingerprint(job: Job, inputs: Mapping[str, InputRecord]) -> dict[str, Any]:
    """`fingerprint`, with the digests of all files that go in."""
    return fingerprint(job) | {"inputs": {role: dict(each.files) for role, each in inputs.items()}}


def done_before(job: Job) -> frozenset[str]:
    """The units that a stopped run has finished where this one would work; nothing is written.

    Raises what `Workspace.open` does, but where that has to read all that goes in or checks what
    the journal says: where the inputs' files differ, or the journal is damaged.
    """
    folder = partial_folder(job.recipe.out)
    if not (folder.exists() or folder.is_symlink()):
        return frozenset()
    _refuse_foreign(folder)
    if not (folder / JOURNAL).exists():
        return frozenset()
    events = glance(folder / JOURNAL)
    if job.recipe.restart:
        return frozenset()
    if events:
        now, before = fingerprint(job), events[0].get("begin", {})
        _compare({key: before[key] for key in now if key in before}, now, folder)
        _refuse_links(folder)
    return frozenset(event["unit"] for event in events if "unit" in event)


def _make(folder: Path) -> None:
    """The folder, new or left by a run; `RecipeError` where it is somebody else's."""
    with translated(folder):
        if not folder.is_symlink():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.absolute().parent)
    _refuse_foreign(folder)


def _refuse_foreign(folder: Path) -> None:
    with translated(folder):
        if not folder.is_symlink() and ((folder / JOURNAL).exists() or not any(folder.iterdir())):
            return
    raise RecipeError(
        f"{folder} is there, and no run has left it",
        hint="move it away, or give another --out: a run works in a folder of that name",
    )


def _refuse_links(folder: Path) -> None:
    """A run makes no links; one that is there would lead its writing out of the folder."""
    for entry in folder.rglob("*"):
        if entry.is_symlink():
            raise StorageError(f"{entry}: a link that no run has made", hint=RESTART_HINT)


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    flat_before, flat_now = _flat(before), _flat(now)
    differing = sorted(
        key
        for key in flat_before.keys() | flat_now.keys()
        if flat_before.get(key) != flat_now.get(key)
    )
    if differing:
        shown = "; ".join(
            f"{key} was {flat_before.get(key)}, is {flat_now.get(key)}"
            for key in differing[:DIFFERENCES]
        )
        more = f"; and {len(differing) - DIFFERENCES} more" * (len(differing) > DIFFERENCES)
        raise RecipeError(
            f"{folder} holds another run that was stopped: {shown}{more}",
            hint=f"give the same options to go on, or {RESTART_HINT.removeprefix('give ')}",
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        parts = (_flat(value, f"{path}.{key}" if path else str(key)) for key, value in tree.items())
        return {key: value for part in parts for key, value in part.items()}
    return {path: tree}
