from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from qmerge.errors import CheckpointError, StorageError
from qmerge.storage import shards
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.shards import (
    copy_file,
    sha256_file,
    write_index,
    write_json,
    write_pieces,
    write_shard,
    write_text,
)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "b.scales": torch.randn(3, 5).to(torch.float16),
        "a.qweight": torch.randint(0, 100, (4, 3), dtype=torch.int32),
        "c": torch.tensor(2.5, dtype=torch.float64),
        "é.mask": torch.tensor([True, False, True]),
        "d": torch.randn(2, 2).to(torch.bfloat16),
        "e": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "none": torch.zeros(0, 4),
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def listed(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_library_reads_back_what_was_written(tmp_path: Path) -> None:
    record = write_shard(tmp_path / "x.safetensors", tensors())
    written = (tmp_path / "x.safetensors").read_bytes()
    read = load_file(tmp_path / "x.safetensors")
    assert list(read) == sorted(read, key=lambda name: (-read[name].element_size(), name))
    assert read.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(read[name]), bits(tensor))
    assert record.file == "x.safetensors"
    assert record.nbytes == len(written)
    assert record.sha256 == hashlib.sha256(written).hexdigest()
    assert dict(record.tensors) == {name: tensor.nbytes for name, tensor in tensors().items()}


def test_pieces_make_the_same_file_as_whole_tensors(tmp_path: Path) -> None:
    whole = {name: tensor for name, tensor in tensors().items() if tensor.dim()}
    record = write_shard(tmp_path / "whole.safetensors", whole)
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in whole.items()}

    def rows(name: str) -> Iterator[torch.Tensor]:
        return (whole[name][row : row + 1] for row in range(len(whole[name])))

    found = write_pieces(tmp_path / "pieces.safetensors", shapes, rows)
    written = (tmp_path / "pieces.safetensors").read_bytes()
    assert written == (tmp_path / "whole.safetensors").read_bytes()
    assert (found.nbytes, found.tensors, found.sha256) == (record.nbytes, record.tensors, "")


def test_one_kind_of_tensor_gives_the_librarys_own_bytes(tmp_path: Path) -> None:
    plain = {f"layer.{number}.weight": torch.randn(3, 4) for number in (10, 2, 1)}
    write_shard(tmp_path / "x.safetensors", plain)
    assert (tmp_path / "x.safetensors").read_bytes() == save(plain, {"format": "pt"})


def test_order_does_not_move_a_byte(tmp_path: Path) -> None:
    forth = write_shard(tmp_path / "a", tensors())
    back = write_shard(tmp_path / "b", dict(reversed(tensors().items())))
    assert forth.sha256 == back.sha256
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    views = {"turned": whole.T, "rows": whole[1:], "column": whole[:, 1], "tied": whole}
    write_shard(tmp_path / "x.safetensors", views)
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], view.detach()) for name, view in views.items())


def test_a_release_opens_as_a_checkpoint(tmp_path: Path) -> None:
    names = sorted(tensors())
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    records = [
        write_shard(tmp_path / file, {name: tensors()[name] for name in part})
        for file, part in zip(files, (names[:3], names[3:]), strict=True)
    ]
    digest = write_index(tmp_path, records)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors().values())
    assert list(index["weight_map"]) == names
    assert digest == sha256_file(tmp_path / "model.safetensors.index.json")
    assert list(Checkpoint.open(tmp_path).tensors) == names


def test_texts_and_copies_are_whole_and_digested(tmp_path: Path) -> None:
    digest = write_text(tmp_path / "a.md", "größe\n")
    assert (tmp_path / "a.md").read_bytes() == "größe\n".encode()
    assert digest == hashlib.sha256("größe\n".encode()).hexdigest()
    assert (
        copy_file(tmp_path / "a.md", tmp_path / "b.md") == digest == sha256_file(tmp_path / "b.md")
    )
    value = {"b": [1, float("inf")], "a": "\ud800"}
    write_json(tmp_path / "c.json", value)
    assert json.loads((tmp_path / "c.json").read_text()) == value
    assert listed(tmp_path) == ["a.md", "b.md", "c.json"]


def test_a_large_file_is_copied_and_digested_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(1000)
    (tmp_path / "a").write_bytes(data)
    monkeypatch.setattr(shards, "_CHUNK", 64)
    assert copy_file(tmp_path / "a", tmp_path / "b") == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "b").read_bytes() == data


def test_links_are_replaced_and_never_written_through(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "out"
    folder.mkdir()
    outside.write_text("mine")
    (folder / "a.txt").symlink_to(outside)
    (folder / ".a.txt.tmp").symlink_to(outside)
    write_text(folder / "a.txt", "new")
    assert outside.read_text() == "mine"
    assert (folder / "a.txt").read_text() == "new"
    assert not (folder / "a.txt").is_symlink()


def test_order_is_file_fsync_rename_folder_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands under the final name is always whole, also after a loss of power."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        steps.append(f"fsync {Path(f'/proc/self/fd/{handle}').readlink().name}")
        fsync(handle)

    def noted_replace(self: Path, target: Path) -> Path:
        steps.append(f"rename {self.name} {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_shard(tmp_path / "x.safetensors", tensors())
    assert steps == [
        "fsync .x.safetensors.tmp",
        "rename .x.safetensors.tmp x.safetensors",
        f"fsync {tmp_path.name}",
    ]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_text(tmp_path / "a.txt", "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if step == "fsync" else Path, step, full)
    with pytest.raises(StorageError, match=r"a\.txt: No space left") as caught:
        write_text(tmp_path / "a.txt", "new")
    assert "space" in (caught.value.hint or "")
    assert listed(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    """A real failure in the middle of a file, by the system's own limit on file sizes."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            write_shard(tmp_path / "x.safetensors", {"a": torch.zeros(100_000)})
        except StorageError as error:
            code = 0 if "x.safetensors: File too large" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert listed(tmp_path) == []


def test_unreadable_sources_are_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone"):
        copy_file(tmp_path / "gone", tmp_path / "x")
    with pytest.raises(StorageError, match="gone"):
        sha256_file(tmp_path / "gone")
    with pytest.raises(StorageError, match="nowhere"):
        write_text(tmp_path / "nowhere" / "x", "")
    assert listed(tmp_path) == []


def test_one_flipped_bit_changes_the_digest_but_not_the_header(tmp_path: Path) -> None:
    record = write_shard(tmp_path / "model.safetensors", {"a": torch.zeros(8)})
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert Checkpoint.open(tmp_path).tensors["a"].shape == (8,)
    assert sha256_file(tmp_path / "model.safetensors") != record.sha256
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(tmp_path)
