"""A disk that is full or cannot be read: our own error, nothing published, no work lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.rig import Ended, Job, Server, each_kind

STORAGE_FAILED = 3
FULL = (
    "mkdir *streams",
    "write *streams/*",
    "fsync *.f32",
    "pwrite *",
    "write *00003-of*",
    "write *index.json*",
    "fsync *report.html*",
    "rename *",
)
GROWS = ("create", "write", "mkdir", "pwrite")
UNREADABLE = ("tensor *original/*", "read *.f32", "read *partial/*00001-of*")


def assert_stopped(job: Job, ended: Ended, reason: str) -> None:
    assert ended.code == STORAGE_FAILED, ended.said
    assert reason in ended.said
    assert "Traceback" not in ended.said
    assert not job.release.exists()


def test_full_at_each_stage(job: Job, whole: Callable[[Job], None]) -> None:
    """One run that meets a full disk again and again, each time with room made in between."""
    finished = 0
    for at in FULL:
        ended = job.run(at=at, nth=1, what="full")
        assert_stopped(job, ended, "No space left on device")
        assert "hint: free some space and give the same command again" in ended.said
        assert finished <= job.finished()
        finished = job.finished()
    assert job.run().code == 0
    whole(job)


def test_unreadable(job: Job, whole: Callable[[Job], None]) -> None:
    """The base, then hidden states, then a finished shard."""
    for at in UNREADABLE:
        ended = job.run(at=at, nth=1, what="broken", reads=True)
        assert_stopped(job, ended, "Input/output error")
    assert job.finished() == 1
    assert job.run().code == 0
    whole(job)


@pytest.mark.slow
def test_failing_at_every_kind_of_change(
    server: Server,
    words: tuple[str, ...],
    straight: tuple[Ended, dict[str, bytes]],
    whole: Callable[[Job], None],
    tmp_path: Path,
) -> None:
    log = straight[0].log
    for nth in each_kind(log[:-1]):  # behind the last one nothing is left to do
        operation = log[nth - 1]
        job = Job(server=server, words=words, folder=tmp_path / str(nth))
        ended = job.run(nth=nth, what="full" if operation.startswith(GROWS) else "broken")
        if ended.code == 0:  # tidying up may fail when the release is there
            assert job.release.exists()
        elif not job.release.exists():
            assert ended.code == STORAGE_FAILED, (operation, ended.said)
        if job.partial.exists() or not job.release.exists():
            assert job.run().code == 0, operation
        whole(job)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 400 kB, where the job takes nearly a megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    command = [mount, "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system does not let a tmpfs be mounted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(
    server: Server, words: tuple[str, ...], whole: Callable[[Job], None], small_disk: Path
) -> None:
    job = Job(server=server, words=words, folder=small_disk)
    assert_stopped(job, job.run(), "MiB of disk")
    assert job.finished() == 0
    assert_stopped(job, job.run(lie=True), "No space left on device")
    assert job.finished() > 0
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert job.run().code == 0
    whole(job)
