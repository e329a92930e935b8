"""One server for all fault tests, one small job, and what it makes when nothing happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.rig import OUT, Ended, Job, Server, contents


@pytest.fixture(scope="session")
def words(
    tiny_original: Path, tiny_adapter: Path, calibration_text: Path, eval_text: Path
) -> tuple[str, ...]:
    """A job of five units that takes about a second."""
    for text in (calibration_text, eval_text):
        text.with_suffix(".short.txt").write_text(text.read_text()[:9000])
    given = {
        "base": tiny_original,
        "adapter": tiny_adapter,
        "out": OUT,
        "calibration": calibration_text.with_suffix(".short.txt"),
        "calibration-samples": 8,
        "eval": f"held_out={eval_text.with_suffix('.short.txt')}",
        "eval-windows": 4,
        "sequence-length": 32,
        "group-size": 32,
    }
    return tuple(word for name, value in given.items() for word in (f"--{name}", str(value)))


@pytest.fixture(scope="session")
def server(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file an operation is about")
    running = Server()
    folder = str(tmp_path_factory.mktemp("warm"))
    assert running.ask(do="warm", folder=folder, words=["run", *words]) == 0
    yield running
    running.close()


@pytest.fixture
def job(server: Server, words: tuple[str, ...], tmp_path: Path) -> Job:
    return Job(server=server, words=words, folder=tmp_path / "job")


@pytest.fixture(scope="session")
def straight(
    server: Server, words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Ended, dict[str, bytes]]:
    """The job with nothing happening to it: how it ended and what it made."""
    job = Job(server=server, words=words, folder=tmp_path_factory.mktemp("straight") / "job")
    ended = job.run()
    assert ended.code == 0, ended.said
    return ended, contents(job.release)


@pytest.fixture
def whole(straight: tuple[Ended, dict[str, bytes]]) -> Callable[[Job], None]:
    """Assert that a job's release is byte for byte the straight one, and that nothing is left."""

    def check(job: Job) -> None:
        found, expected = contents(job.release), straight[1]
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        assert not job.partial.exists()

    return check
