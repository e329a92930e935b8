from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmerge.errors import StorageError
from qmerge.storage.journal import Journal

EVENTS: list[dict[str, Any]] = [
    {"unit": "embedding", "shard": {"sha256": "ab", "nbytes": 7}},
    {"unit": "layer 0", "loss": 1.25e-7, "nan": [float("inf"), None, True]},
    {"unit": "größe\n\u2028\r", "keys": {"10": 1, "2": 2}},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        for event in EVENTS:
            journal.append(event)
    return tmp_path / "journal.jsonl"


def reopened(file: Path) -> list[dict[str, Any]]:
    with Journal.open(file) as journal:
        return [dict(event) for event in journal.events()]


def test_events_come_back_in_order_and_go_on(file: Path) -> None:
    assert reopened(file) == EVENTS
    with Journal.open(file) as journal:
        journal.append({"unit": "head"})
        assert list(journal.events()) == [*EVENTS, {"unit": "head"}]
    assert reopened(file) == [*EVENTS, {"unit": "head"}]
    assert all(json.loads(line)["event"] for line in file.read_text("utf-8").split("\n")[:-1])


def test_keys_and_tuples_come_back_as_json_has_them(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j") as journal:
        journal.append({"counts": {10: "a", 2: "b"}, "pair": (1, 2)})
        assert journal.events() == ({"counts": {"10": "a", "2": "b"}, "pair": [1, 2]},)
    assert reopened(tmp_path / "j") == [{"counts": {"10": "a", "2": "b"}, "pair": [1, 2]}]


def test_a_torn_last_line_is_dropped_at_every_length(file: Path) -> None:
    whole = file.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(whole)):
        file.write_bytes(whole[:length])
        assert reopened(file) == EVENTS[:-1]
        assert file.read_bytes() == whole[:last]  # the torn part is gone from the disk as well
    file.write_bytes(whole[:last] + bytes(len(whole) - last - 1) + b"\n")
    assert reopened(file) == EVENTS[:-1]
    with Journal.open(file) as journal:
        journal.append(EVENTS[-1])
    assert file.read_bytes() == whole


def test_a_damaged_earlier_line_is_refused_and_kept(file: Path) -> None:
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    damaged = {
        "flipped": whole.replace(b"layer 0", b"layer 1"),
        "taken out": lines[0] + lines[2] + lines[2],
        "exchanged": lines[1] + lines[0] + lines[2],
        "without digest": b'{"event": {}}\n' + whole,
        "not an object": b"[]\n" + whole,
        "blank": b"\n" + whole,
    }
    for text in damaged.values():
        file.write_bytes(text)
        with pytest.raises(StorageError, match=r"journal\.jsonl: line \d is damaged") as caught:
            Journal.open(file)
        assert "--restart" in (caught.value.hint or "")
        assert file.read_bytes() == text


def test_restart_empties_even_a_damaged_journal(file: Path) -> None:
    file.write_bytes(b"junk\n" + file.read_bytes())
    with Journal.open(file, restart=True) as journal:
        assert journal.events() == ()
        journal.append({"unit": "new"})
    assert reopened(file) == [{"unit": "new"}]


def test_a_second_holder_is_refused(file: Path) -> None:
    with Journal.open(file), pytest.raises(StorageError, match="another process"):
        Journal.open(file)
    assert reopened(file) == EVENTS


def test_the_lock_dies_with_its_process(file: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Journal.open(file).append({"unit": "child"})
            os.write(write, b"held")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(read, 4) == b"held"
        with pytest.raises(StorageError, match="another process"):
            Journal.open(file, restart=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
    assert reopened(file) == [*EVENTS, {"unit": "child"}]


def test_a_folder_published_meanwhile_is_noticed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def published_just_before(handle: int, flags: int) -> None:
        file.parent.rename(file.parent.with_name("published"))
        file.parent.mkdir()
        flock(handle, flags)

    monkeypatch.setattr(fcntl, "flock", published_just_before)
    with pytest.raises(StorageError, match="moved or removed"):
        Journal.open(file)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_failed_append_leaves_the_journal_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    whole = file.read_bytes()
    real = getattr(os, call)

    def fails(handle: int, *arguments: Any) -> None:
        if call == "pwrite":
            real(handle, arguments[0][:10], arguments[1])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal.open(file) as journal:
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fails)
            with pytest.raises(StorageError, match="No space left"):
                journal.append({"unit": "lost"})
        assert file.read_bytes() == whole
        journal.append({"unit": "kept"})
    assert reopened(file) == [*EVENTS, {"unit": "kept"}]


def test_short_writes_are_finished(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    with Journal.open(file) as journal:
        monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[:3], at))
        journal.append({"unit": "in pieces"})
    assert reopened(file) == [*EVENTS, {"unit": "in pieces"}]


def test_paths_that_cannot_hold_a_journal(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in (tmp_path / "link", tmp_path / "no" / "j", tmp_path):
        with pytest.raises(StorageError, match=str(path)):
            Journal.open(path)


def append_for_ever(journal: Journal) -> None:
    while True:
        journal.append({"text": "x" * 500})


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    command = [mount, "-t", "tmpfs", "-o", "size=32k", "none", str(small)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system does not let a tmpfs be mounted")
    try:
        journal = Journal.open(small / "j")
        with pytest.raises(StorageError, match="No space"):
            append_for_ever(journal)
        appended = journal.events()
        journal.close()
        assert appended
        assert tuple(reopened(small / "j")) == appended
    finally:
        subprocess.run(["umount", str(small)], check=True)
