from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qmerge.errors import CheckpointError, StorageError
from qmerge.storage import checkpoint as checkpoint_module
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.files import translate

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(11, 4).to(torch.bfloat16),
        "layer.qweight": torch.randint(-(2**31), 2**31 - 1, (3, 5), dtype=torch.int32),
        "layer.scales": torch.rand(2, 5).to(torch.float16),
        "layer.scale_inv": torch.rand(2, 2),
        "layer.fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "layer.absmax": torch.arange(7, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
    }


def write_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """As transformers lays it out: two shards and an index; the weight map."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    half = len(names) // 2
    weight_map: dict[str, str] = {}
    for file, part in ((FIRST, names[:half]), (SECOND, names[half:])):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def same(left: Tensor, right: Tensor) -> bool:
    bits = (left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


@pytest.mark.parametrize("layout", ["single", "odd name", "sharded", "pickled", "pickled shards"])
def test_reads_back_what_the_libraries_wrote(tmp_path: Path, layout: str) -> None:
    tensors = some_tensors()
    if layout == "single":
        save_file(tensors, tmp_path / "model.safetensors")
    elif layout == "odd name":
        save_file(tensors, tmp_path / "gptq_model-4bit-128g.safetensors")
        save_file({"other": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    elif layout == "sharded":
        write_sharded(tmp_path, tensors)
    elif layout == "pickled":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        torch.save({n: t for n, t in tensors.items() if n < "g"}, tmp_path / "a.bin")
        torch.save({n: t for n, t in tensors.items() if n >= "g"}, tmp_path / "b.bin")
        weight_map = {name: "a.bin" if name < "g" else "b.bin" for name in tensors}
        index = json.dumps({"weight_map": weight_map})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)

    with Checkpoint.open(tmp_path) as opened:
        assert list(opened.tensors) == sorted(tensors)
        for name, tensor in tensors.items():
            info = opened.tensors[name]
            assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
            assert info.nbytes == tensor.numel() * tensor.element_size()
            assert same(opened.read(name), tensor)
        assert same(opened.read_rows("embed.weight", 3, 8), tensors["embed.weight"][3:8])
        assert same(opened.read_rows("embed.weight", 5, 5), tensors["embed.weight"][5:5])
        assert same(opened.read_rows("empty", 0, 0), tensors["empty"])


def test_config_is_read_or_empty(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).config == {}
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        Checkpoint.open(tmp_path, config_required=True)
    (tmp_path / "config.json").write_text('{"a": [1, Infinity]}')
    assert Checkpoint.open(tmp_path, config_required=True).config == {"a": [1, float("inf")]}


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="nowhere"):
        Checkpoint.open(tmp_path).read("nowhere")


def test_mappings_are_let_go_and_tensors_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = some_tensors()
    write_sharded(tmp_path, tensors)
    monkeypatch.setattr(checkpoint_module, "_MAPPED_BYTES", 1)
    opened = Checkpoint.open(tmp_path)
    read = {name: opened.read(name) for name in tensors}
    assert len(opened._opened) <= 1
    opened.close()
    assert all(same(read[name], tensors[name]) for name in tensors)


def test_a_mapping_that_another_thread_lets_go_is_no_loss(tmp_path: Path) -> None:
    class LetGo(dict[Path, Any]):
        def __setitem__(self, file: Path, opened: Any) -> None:
            super().__setitem__(file, opened)
            self.clear()  # as `close` of another thread does

    tensors = some_tensors()
    write_sharded(tmp_path, tensors)
    opened = Checkpoint.open(tmp_path)
    opened._opened = LetGo()
    assert all(same(opened.read(name), tensors[name]) for name in tensors)


def test_a_file_that_changes_after_opening_is_noticed(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="has changed"):
        opened.read("flag")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        opened.read("flag")


def test_an_error_of_the_machine_is_not_the_users() -> None:
    assert isinstance(translate(OSError(5, "Input/output error"), Path("x")), StorageError)
    assert isinstance(translate(OSError(36, "File name too long"), Path("x")), CheckpointError)
    assert "right to read" in str(translate(OSError(13, "Permission denied"), Path("x")).hint)


def test_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_sharded(blobs, some_tensors())
    (blobs / "tokenizer.json").write_text("{}")
    for number, file in enumerate(sorted(blobs.iterdir())):
        blob = blobs / f"digest{number}"
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.rename(blob).name)
    (tmp_path / "link").symlink_to(snapshot)
    opened = Checkpoint.open(tmp_path / "link")
    assert set(opened.tensors) == set(some_tensors())
    assert opened.config == {"model_type": "qwen3"}
    assert same(opened.read("scalar"), torch.tensor(3.5))
    assert "tokenizer.json" in {file.name for file in opened.side_files()}


def test_side_files_are_all_but_weights_and_indexes(tmp_path: Path) -> None:
    write_sharded(tmp_path, some_tensors())
    (tmp_path / "additional_chat_templates").mkdir()
    wanted = {
        "config.json", "tokenizer.model", "tokenizer.json", "LICENSE", "modeling_own.py",
        "chat_template.jinja", "additional_chat_templates/rag.jinja", "preprocessor_config.json",
    }  # fmt: skip
    unwanted = {"training_args.bin", "optimizer.pt", "consolidated.safetensors", ".gitattributes"}
    for name in (wanted | unwanted) - {"config.json"}:
        (tmp_path / name).write_text("x")
    found = Checkpoint.open(tmp_path).side_files()
    assert {str(file.relative_to(tmp_path)) for file in found} == wanted
    assert list(found) == sorted(found)


def test_a_side_file_that_links_out_is_not_given_away(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_sharded(folder, some_tensors())
    (tmp_path / "secret").write_text("key")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="LICENSE"):
        Checkpoint.open(folder).side_files()
    (tmp_path / "secret").unlink()
    with pytest.raises(CheckpointError, match="LICENSE"):
        Checkpoint.open(folder).side_files()


Damage = Callable[[Path], Any]


def truncate(folder: Path) -> None:
    with (folder / SECOND).open("r+b") as file:
        file.truncate((folder / SECOND).stat().st_size - 1)


def tiny_shard(name: str) -> Damage:
    return lambda folder: save_file({name: torch.ones(1)}, folder / SECOND)


def second_index_entry(value: object) -> Damage:
    names = sorted(some_tensors())
    return lambda folder: write_index(folder, {names[0]: FIRST, names[-1]: value})


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


FAULTS: dict[str, tuple[Damage, str]] = {
    "missing shard": (lambda f: (f / SECOND).unlink(), SECOND),
    "truncated shard": (truncate, f"{SECOND}: truncated"),
    "trailing bytes": (lambda f: (f / SECOND).open("ab").write(b"x"), "after the last tensor"),
    "empty shard": (lambda f: (f / SECOND).write_bytes(b""), f"{SECOND}: truncated"),
    "shard is a folder": (instead(SECOND, Path.mkdir), "not a regular file"),
    "shard is a pipe": (instead(SECOND, os.mkfifo), "not a regular file"),
    "shard is a device": (
        instead(SECOND, lambda file: file.symlink_to("/dev/zero")),
        "not a regular file",
    ),
    "broken link": (instead(SECOND, lambda file: file.symlink_to("gone")), SECOND),
    "tensor not in its shard": (tiny_shard("unheard"), "lacks tensor"),
    "tensor in two shards": (lambda f: shutil.copy(f / FIRST, f / SECOND), "is both in"),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
    "index a list": (lambda f: (f / INDEX).write_text("[]"), "not an object"),
    "index not text": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe{}"), "not valid JSON"),
    "index too deep": (lambda f: (f / INDEX).write_text("[" * 100_000), "not valid JSON"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
    "index map a list": (lambda f: write_index(f, []), "weight_map"),
    "index empty": (lambda f: write_index(f, {}), "weight_map"),
    "index with a name twice": (
        lambda f: (f / INDEX).write_text(
            f'{{"weight_map": {{"flag": "{FIRST}", "flag": "{SECOND}"}}}}'
        ),
        "given twice",
    ),
    "entry leaves the folder": (second_index_entry(f"../{FIRST}"), "not a weight file"),
    "entry absolute": (second_index_entry("/etc/passwd"), "not a weight file"),
    "entry absolute weights": (second_index_entry(f"/tmp/{FIRST}"), "not a weight file"),
    "entry in a folder": (second_index_entry(f"deeper/{FIRST}"), "not a weight file"),
    "entry with backslash": (second_index_entry(f"..\\{FIRST}"), "not a weight file"),
    "entry the parent": (second_index_entry(".."), "not a weight file"),
    "entry hidden": (second_index_entry(".safetensors"), "not a weight file"),
    "entry a number": (second_index_entry(7), "not a weight file"),
    "entry empty": (second_index_entry(""), "not a weight file"),
    "entry with NUL": (second_index_entry("a\0.safetensors"), "not a weight file"),
    "entry half a surrogate": (second_index_entry("\ud800.safetensors"), "can have this name"),
    "entry too long": (second_index_entry("x" * 5000 + ".safetensors"), "too long"),
    "single file besides": (
        lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors"),
        "holds both",
    ),
    "index missing": (lambda f: (f / INDEX).unlink(), "no model.safetensors.index.json"),
    "index missing, one shard": (
        lambda f: (f / INDEX).rename(f / SECOND),
        "no model.safetensors.index.json",
    ),
    "config not JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "config a pipe": (instead("config.json", os.mkfifo), "config.json"),
    "config huge": (lambda f: os.truncate(f / "config.json", 2**40), "more than"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_one_clear_error(tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    write_sharded(tmp_path, some_tensors())
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: dict[str, tuple[object, bytes, str]] = {
    "dtype unknown": ({"a": GOOD | {"dtype": "F33"}}, bytes(8), "unknown dtype"),
    "dtype a list": ({"a": GOOD | {"dtype": []}}, bytes(8), "unknown dtype"),
    "entry a list": ({"a": [1]}, bytes(8), "needs exactly"),
    "entry short": ({"a": {"dtype": "F32"}}, bytes(8), "needs exactly"),
    "shape too large": ({"a": GOOD | {"shape": [3]}}, bytes(8), "needs 12 bytes"),
    "shape negative": ({"a": GOOD | {"shape": [-1, -2]}}, bytes(8), "not a size"),
    "shape a float": ({"a": GOOD | {"shape": [2.0]}}, bytes(8), "not a size"),
    "shape a truth value": ({"a": GOOD | {"shape": [True, 2]}}, bytes(8), "not a size"),
    "shape text": ({"a": GOOD | {"shape": "2"}}, bytes(8), "not a list"),
    "shape enormous": ({"a": GOOD | {"shape": [10**30]}}, bytes(8), "not a size"),
    "rank enormous": ({"a": GOOD | {"shape": [1] * 1000}}, bytes(8), "not a list"),
    "product enormous": ({"a": GOOD | {"shape": [2**62] * 60}}, bytes(8), "bytes"),
    "offsets backwards": ({"a": GOOD | {"data_offsets": [8, 0]}}, bytes(8), "invalid"),
    "offsets negative": ({"a": GOOD | {"data_offsets": [-8, 0]}}, bytes(8), "not a size"),
    "one offset": ({"a": GOOD | {"data_offsets": [8]}}, bytes(8), "invalid"),
    "offset past the end": ({"a": GOOD | {"data_offsets": [8, 16]}}, bytes(8), "leaves a gap"),
    "overlap": ({"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}}, bytes(12), "overlaps"),
    "same place": ({"a": GOOD, "b": GOOD}, bytes(8), "overlaps"),
    "gap": ({"a": GOOD, "b": GOOD | {"data_offsets": [12, 20]}}, bytes(20), "leaves a gap"),
    "cut short": ({"a": GOOD}, bytes(7), "truncated"),
    "metadata": ({"a": GOOD, "__metadata__": {"x": 1}}, bytes(8), "expected a string"),
    "not JSON": (b"{", b"", "not valid JSON"),
    "not an object": (b"[]", b"", "not an object"),
    "too deep": (b'{"a":' * 50_000, b"", "not valid JSON"),
    "digits": (b'{"a": ' + b"9" * 10_000 + b"}", b"", "not valid JSON"),
    "not text": (b'{"\xff": 1}', b"", "not valid JSON"),
    "twice": (b'{"a": 1, "a": 2}', b"", "given twice"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADERS)
def test_a_damaged_header_is_one_clear_error(tmp_path: Path, fault: str) -> None:
    header, data, message = HEADERS[fault]
    file = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 100, 2**31, 2**63, 2**64 - 1])
def test_a_false_header_length_reads_nothing_large(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path / "model.safetensors", {"a": GOOD}, bytes(8), length=length)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_told_from_damage(tmp_path: Path, file: str) -> None:
    lines = (
        "version https://git-lfs.github.com/spec/v1",
        f"oid sha256:{'0' * 64}",
        "size 988097824",
    )
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=rf"{file}: a pointer of git-lfs"):
        Checkpoint.open(tmp_path)


def test_a_sparse_giant_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "model.safetensors", {"a": GOOD}, length=90_000_000_000)
    os.truncate(file, 2**40)
    with pytest.raises(CheckpointError, match="over the format's limit"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda path: None, "local folder"),
        (lambda path: path.write_text("x"), "local folder"),
        (lambda path: path.mkdir(), "model.safetensors"),
        (lambda path: (path.mkdir(), (path / "adapter_config.json").touch()), "an adapter"),
    ],
    ids=["nothing", "a file", "empty", "adapter"],
)
def test_what_is_no_checkpoint_says_what_to_give(
    tmp_path: Path, make: Callable[[Path], object], hint: str
) -> None:
    make(tmp_path / "model")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path / "model")
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["original", "base-gptq", "base-nf4"])
def test_published_checkpoints_read_as_the_library_reads_them(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    expected: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        expected |= load_file(file)
    opened = Checkpoint.open(folder, config_required=True)
    assert list(opened.tensors) == sorted(expected)
    assert all(same(opened.read(name), tensor) for name, tensor in expected.items())
    assert {"config.json", "tokenizer.json"} <= {file.name for file in opened.side_files()}
