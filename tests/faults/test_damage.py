"""What is changed between stop and resume is noticed by name, and never published."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.rig import Job, Server

BAD_INPUT, STORAGE_FAILED = 2, 3


def flip(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


@pytest.fixture(scope="module")
def stopped(
    server: Server, words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Job:
    """Killed in layer 2, after it had begun to write over the older hidden states."""
    job = Job(server=server, words=words, folder=tmp_path_factory.mktemp("stopped") / "job")
    assert job.run(at="create *model-00004*", nth=1).code < 0
    return job


@pytest.fixture
def again(stopped: Job, tmp_path: Path) -> Job:
    """A copy of it, to be damaged."""
    job = replace(stopped, folder=tmp_path / "job")
    shutil.copytree(stopped.folder, job.folder)
    return job


def shard(job: Job, number: int) -> Path:
    return job.partial / "release-dequantize" / f"model-{number:05}-of-00005.safetensors"


def newest_stream(job: Job) -> Path:
    """Layer 1 wrote generation 1: the embedding wrote 1, layer 0 wrote 0."""
    return job.partial / "streams" / "002.1.f32"


@pytest.mark.parametrize("find", [lambda j: shard(j, 2), newest_stream], ids=["shard", "stream"])
def test_damage_is_refused_by_name(again: Job, find: Callable[[Job], Path]) -> None:
    file = find(again)
    for harm in (flip, cut, Path.unlink):
        harm(file)
        ended = again.run()
        assert ended.code == STORAGE_FAILED, ended.said
        assert f"error: {file.relative_to(again.folder)}: " in ended.said
        assert "--restart" in ended.said
        assert not again.release.exists()


def test_restart_throws_away_what_is_damaged(again: Job, whole: Callable[[Job], None]) -> None:
    flip(shard(again, 1))
    assert again.run("--restart").code == 0
    whole(again)


def test_the_last_hidden_states_are_checked_before_they_are_scored(job: Job) -> None:
    assert job.run(at="create *index.json*", nth=1).code < 0
    assert job.finished() == 5
    flip(newest_stream(job).with_name("002.0.f32"))
    ended = job.run()
    assert ended.code == STORAGE_FAILED
    assert "002.0.f32: hidden states differ" in ended.said


def test_a_torn_line_of_the_journal_costs_one_layer(job: Job, whole: Callable[[Job], None]) -> None:
    assert job.run(at="fsync *.jsonl", nth=5).code < 0  # layer 1 is written, layer 2 not begun
    assert job.finished() == 3
    cut(job.partial / "journal.jsonl")
    assert job.run(at="write *streams/*", nth=1).code < 0
    assert job.finished() == 2
    assert job.run().code == 0
    whole(job)


def test_a_damaged_line_of_the_journal_is_refused(again: Job) -> None:
    journal = again.partial / "journal.jsonl"
    flip(journal, journal.read_bytes().index(b"sha256"))
    ended = again.run()
    assert ended.code == STORAGE_FAILED
    assert "journal.jsonl: line 2 is damaged" in ended.said
    assert "--restart" in ended.said


def test_a_link_that_leads_out_is_not_written_through(again: Job, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    stream = newest_stream(again).with_name("002.0.f32")
    stream.rename(outside)
    stream.symlink_to(outside)
    before = outside.read_bytes()
    ended = again.run()
    assert ended.code == STORAGE_FAILED
    assert "a link that no run has made" in ended.said
    assert again.run("--restart").code == 0
    assert outside.read_bytes() == before


def test_a_folder_of_the_user_s_is_left_alone(job: Job) -> None:
    job.partial.mkdir(parents=True)
    (job.partial / "thesis.tex").write_text("mine")
    for more in ([], ["--restart"]):
        ended = job.run(*more)
        assert ended.code == BAD_INPUT
        assert "no run has left it" in ended.said
    assert [file.name for file in job.partial.iterdir()] == ["thesis.tex"]


def test_another_recipe_is_refused(again: Job) -> None:
    ended = again.run("--damping", "0.02", "--calibration-samples", "6")
    assert ended.code == BAD_INPUT, ended.said
    assert "recipe.damping was 0.01, is 0.02" in ended.said
    assert "recipe.calibration_samples was 8, is 6" in ended.said
    assert "texts.calibration was " in ended.said
    assert "--restart" in ended.said


def test_another_input_is_refused(again: Job, tmp_path: Path) -> None:
    place = again.words.index("--adapter") + 1
    adapter = tmp_path / "adapter"
    shutil.copytree(again.words[place], adapter)
    words = (*again.words[:place], str(adapter), *again.words[place + 1 :])
    other = replace(again, words=words, folder=tmp_path / "other")
    assert other.run(at="create *model-00002*", nth=1).code < 0
    flip(adapter / "adapter_model.safetensors", -2)
    ended = other.run()
    assert ended.code == BAD_INPUT
    assert "adapter_model.safetensors was " in ended.said
