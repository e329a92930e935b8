"""A disk that is full or cannot be read: our own error, nothing published, no work lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.faults import kind_of
from tests.faults.rig import Ended, Job, Server

BAD_INPUT, STORAGE_FAILED = 2, 3
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
ERRORS = {"full": "No space left on device", "broken": "Input/output error"}
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
@pytest.mark.parametrize("what", ["full", "broken"])
def test_failing_at_every_kind_of_change(
    straight: tuple[Ended, dict[str, bytes]], job: Job, whole: Callable[[Job], None], what: str
) -> None:
    """One run, failing at the first operation of each kind, again and again until nothing is left
    to fail: an error of our own while there is no release, and never less than before."""
    kinds = [kind_of(operation) for operation in straight[0].log]
    known, finished = kinds[-1:], 0  # behind the last one nothing is left to do
    while (ended := job.run(known=known, nth=1, what=what)).struck is not None:
        known.append(kind_of(ended.struck))
        if not job.release.exists():
            assert_stopped(job, ended, ERRORS[what])
            assert finished <= job.finished()
            finished = job.finished()
    assert {*kinds} <= {*known}
    assert ended.code == 0
    whole(job)


def test_as_much_disk_is_taken_as_was_planned(job: Job) -> None:
    """It holds most right before the release appears."""
    assert job.run(at="rename *", nth=1).code < 0
    held = sum(file.stat().st_size for file in job.partial.rglob("*") if file.is_file())
    planned = job.ask("plan", *job.words, "--json")
    assert abs(json.loads(planned.said)["disk_bytes"] / held - 1) < 0.25


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
    ended = job.run()
    assert ended.code == BAD_INPUT
    assert re.search(r"error: --out: the run needs about \d+ MiB of disk, 0 MiB are", ended.said)
    assert not job.partial.exists()
    assert_stopped(job, job.run(lie=True), "No space left on device")
    assert job.finished() > 0
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert job.run().code == 0
    whole(job)
