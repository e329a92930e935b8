"""Signals, two runs at a time, a clock that goes back: a run is stopped and goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.rig import Job

INTERRUPTED, STORAGE_FAILED = 130, 3


def test_signals_leave_a_state_that_goes_on(job: Job, whole: Callable[[Job], None]) -> None:
    ended = job.run(at="write *streams/*", nth=2, what="interrupt")
    assert ended.code == INTERRUPTED
    assert ended.said.endswith("error: interrupted\n")  # nothing is finished, nothing is kept
    ended = job.run(at="replace *00002-of*", nth=1, what="terminate")
    assert ended.code == INTERRUPTED
    assert ended.said.endswith(
        "error: interrupted\nhint: 1 finished units are kept in release.partial: "
        "the same command goes on from there\n"
    )
    ended = job.run(at="write *qmerge_report*", nth=1, what="interrupt")
    assert ended.code == INTERRUPTED
    assert "5 finished units are kept" in ended.said
    assert not job.release.exists()
    assert job.run().code == 0
    whole(job)


def test_interrupted_while_it_publishes(job: Job, whole: Callable[[Job], None]) -> None:
    """The release is there; the same command clears away the rest and tells the result again."""
    assert job.run(at="unlink *streams/*", nth=3, what="terminate").code == INTERRUPTED
    assert job.release.exists()
    assert job.partial.exists()
    ended = job.run()
    assert ended.code == 0
    assert "trained (reference)" in ended.said
    whole(job)


def test_a_second_run_is_refused(job: Job, whole: Callable[[Job], None]) -> None:
    first = job.start(at="replace *00003-of*", nth=1, what="stop")
    wait_until_stopped(first)
    ended = job.run()
    assert ended.code == STORAGE_FAILED
    assert "another process is at work in this folder" in ended.said
    ended = job.run("--restart")
    assert ended.code == STORAGE_FAILED
    os.kill(first, signal.SIGCONT)
    assert job.wait(first).code == 0
    whole(job)


def test_a_release_that_appears_meanwhile_is_not_written_over(job: Job) -> None:
    first = job.start(at="replace *00003-of*", nth=1, what="stop")
    wait_until_stopped(first)
    job.release.mkdir()
    (job.release / "mine").touch()
    os.kill(first, signal.SIGCONT)
    ended = job.wait(first)
    assert ended.code == STORAGE_FAILED
    assert "release: appeared during the run" in ended.said
    assert [file.name for file in job.release.iterdir()] == ["mine"]


def test_a_clock_that_goes_back(job: Job, whole: Callable[[Job], None]) -> None:
    assert job.run(at="replace *00003-of*", nth=1, clock=True).code < 0
    tomorrow = time.time() + 86400
    for path in (job.partial, *job.partial.rglob("*")):
        os.utime(path, (tomorrow, tomorrow))
    assert job.run(clock=True).code == 0
    whole(job)


def wait_until_stopped(process: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] == "T":
            return
        time.sleep(0.01)
    pytest.fail("the first run did not get as far as it should")


def test_a_release_s_recipe_makes_it_again(job: Job, whole: Callable[[Job], None]) -> None:
    """The same bytes, but for the name of the folder where it is said."""
    assert job.run().code == 0
    whole(job)
    recipe = str(job.release / "qmerge_recipe.yaml")
    assert job.ask("run", recipe, "--out", "other").code == 0
    names = {path.name for path in job.release.iterdir()}
    other = job.folder / "other"
    assert names == {path.name for path in other.iterdir()}
    for name in names - {"qmerge_report.json", "report.html"}:
        first, second = (
            (job.release / name).read_text("latin-1"),
            (other / name).read_text("latin-1"),
        )
        if name in ("README.md", "qmerge_recipe.yaml"):
            first, second = first.replace("release", "other"), second.replace("release", "other")
        assert first == second, name
