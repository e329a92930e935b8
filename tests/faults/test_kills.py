"""SIGKILL: at each point where something becomes lasting, between them, and at any moment."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.faults import kind_of
from tests.faults.rig import Ended, Job, Server

KILLED = -9

# In the order of a run, so that each run that goes on gets as far as the next of them.
COMMIT_POINTS = (
    ("mkdir *.partial", 1),
    ("pwrite *", 1),  # half of the journal's first line
    ("replace *00001-of*", 1),
    ("fsync *.jsonl", 2),  # the embedding's line is written; of the next layer nothing is
    ("write *00002-of*", 9),
    ("fsync *streams", 1),  # shard and hidden states are whole, and not yet journalled
    ("pwrite *", 1),
    ("fsync *.jsonl", 2),
    ("write *streams/*", 5),  # over the generation before the last
    ("pwrite *", 2),  # layer 1 is journalled, layer 2 half
    ("pwrite *", 1),
)
PUBLISHING = (
    ("replace *index.json*", 1),
    ("write *qmerge_report.json*", 1),
    ("rename *", 1),
    ("unlink *streams/*", 3),
)
TIDIED_UP_BUT_FOR_THE_FOLDER = ("rmdir *.partial", 1)


@pytest.mark.parametrize("points", [COMMIT_POINTS, PUBLISHING], ids=["walk", "publish"])
def test_killed_at_commit_points(
    job: Job, whole: Callable[[Job], None], points: tuple[tuple[str, int], ...]
) -> None:
    """One run, killed again and again: what is finished stays, and the bytes are the same."""
    finished = 0
    for at, nth in points:
        assert job.run(at=at, nth=nth).code == KILLED, at
        assert finished <= job.finished() or job.release.exists()
        finished = job.finished()
    assert job.run().code == 0
    whole(job)


def test_killed_at_the_very_last_step(job: Job, whole: Callable[[Job], None]) -> None:
    at, nth = TIDIED_UP_BUT_FOR_THE_FOLDER
    assert job.run(at=at, nth=nth).code == KILLED
    job.partial.rmdir()
    whole(job)


def test_what_is_journalled_is_on_the_disk(straight: tuple[Ended, dict[str, bytes]]) -> None:
    """Before a line of the journal, all that is new has been forced to disk, names included."""
    unsafe: set[str] = set()
    made: set[str] = set()
    lines = 0
    for operation in straight[0].log:
        name, path = operation.split(" ", 1)
        folder = str(Path(path).parent)
        if name in ("create", "write"):
            unsafe.add(path)
        if name in ("create", "replace", "rename") or (name == "mkdir" and path not in made):
            unsafe.add(folder)
        if name == "mkdir":
            made.add(path)
        if name == "replace":
            assert path not in unsafe, f"{path} was renamed before it was on the disk"
        if name == "fsync":
            unsafe.discard(path)
        if name == "pwrite":
            lines += 1
            assert lines == 1 or unsafe <= {"release.partial/journal.jsonl"}, unsafe
        if name == "rename":
            assert unsafe <= {folder, "release.partial/journal.jsonl"}
    assert lines == 7  # begin, five units, publish
    assert operation == "rmdir release.partial"


@pytest.mark.slow
def test_killed_at_every_kind_of_change(
    straight: tuple[Ended, dict[str, bytes]], job: Job, whole: Callable[[Job], None]
) -> None:
    """One run, killed at the first operation of each kind, again and again until it gets through;
    among them are all the kinds of a run that nothing happens to."""
    kinds = [kind_of(operation) for operation in straight[0].log]
    known = kinds[-1:]  # a test of its own: nothing is left to go on from
    while (ended := job.run(known=known, nth=1)).code == KILLED:
        assert ended.struck is not None
        known.append(kind_of(ended.struck))
    assert ended.code == 0, ended.said
    assert {*kinds} <= {*known}
    whole(job)


@pytest.mark.slow
def test_killed_at_random_times(
    server: Server, words: tuple[str, ...], whole: Callable[[Job], None], tmp_path: Path
) -> None:
    """50 kills and more, in bursts over several runs, at any moment of what is left to be done."""
    draw, kills = random.Random(0), 0
    began = time.monotonic()
    assert Job(server=server, words=words, folder=tmp_path / "timed").run().code == 0
    longest = time.monotonic() - began
    for number in range(1000):
        job = Job(server=server, words=words, folder=tmp_path / str(number))
        for _ in range(8):
            ended = job.wait(job.start(), kill_after=draw.uniform(0.05, longest))
            kills += ended.code == KILLED
            if ended.code != KILLED:
                break
        if not job.release.exists() or job.partial.exists():
            assert job.run().code == 0
        whole(job)
        if kills >= 50:
            return
    raise AssertionError("too few kills")
