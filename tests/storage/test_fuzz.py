"""Random damage to real files: our own errors only, or the very tensors the library sees."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from qmerge.errors import CheckpointError, StorageError
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.journal import Journal

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ODD_VALUES: tuple[object, ...] = (
    -1, 0, 1, 7, 2**31, 2**63, 2**64, 10**40, 1.5, True, None, "", "F32", "F4", "I64", "..",
    "/etc/passwd", "../" + SHARDS[0], "\0", "\ud800", [], [0], [2, 2], [1] * 99, [[1]], {},
    {"a": {}},
)  # fmt: skip
SOME_BYTES = (
    b"",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"0",
    b"9" * 30,
    b"\0",
    b"\xff",
    b"\\u",
)
MEMORY = 200 * 2**20  # bytes that all cases together may add


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b.qweight": torch.arange(4, dtype=torch.int32),
        "c.scales": torch.ones(2, 2, dtype=torch.float16),
        "d": torch.zeros(0, 3),
    }


def cut_or_spliced(data: bytes, draw: random.Random) -> bytes:
    """Flipped, removed, repeated and inserted bytes, mostly early, where the text is."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(max(len(changed), 1)) // draw.choice((1, 2))
        kind = draw.randrange(5)
        if kind == 0 and changed:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[at : at + draw.choice((1, 8, 100))]
        elif kind == 2:
            changed[at:at] = draw.choice(SOME_BYTES)
        elif kind == 3:
            changed[at:at] = changed[at : at + draw.choice((1, 20, 200))]
        else:
            del changed[at:]
    return bytes(changed)


def with_odd_value(value: object, draw: random.Random) -> object:
    """The same JSON with one value or one key, at a random depth, replaced or taken out."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.2:
        return draw.choice(ODD_VALUES)
    if isinstance(value, list):
        items = list(value)
        items[draw.randrange(len(items))] = with_odd_value(draw.choice(items), draw)
        return items
    key = draw.choice(sorted(value))
    pairs = dict(value)
    fate = draw.randrange(6)
    if fate == 0:
        del pairs[key]
    elif fate == 1:
        pairs[draw.choice(("", "x", "__metadata__", "\ud800"))] = pairs.pop(key)
    else:
        pairs[key] = with_odd_value(pairs[key], draw)
    return pairs


def odd_header(data: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = with_odd_value(json.loads(data[8 : 8 + length]), draw)
    text = json.dumps(header, ensure_ascii=draw.random() < 0.9).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def odd_length(data: bytes, draw: random.Random) -> bytes:
    length = draw.choice((0, 1, 2**16, 2**27, 2**40, 2**63, 2**64 - 1, draw.randrange(2**64)))
    return length.to_bytes(8, "little") + data[8:]


def odd_json(data: bytes, draw: random.Random) -> bytes:
    return json.dumps(with_odd_value(json.loads(data), draw)).encode()


def assert_honest(folder: Path) -> bool:
    """Open and read all; True if it was refused. Whatever opens is what the library sees."""
    before = sorted(folder.rglob("*"))
    try:
        opened = Checkpoint.open(folder)
        total = 0
        for name, info in opened.tensors.items():
            tensor = opened.read(name)
            with safe_open(info.file, framework="pt") as file:
                assert torch.equal(
                    tensor.reshape(-1).view(torch.uint8),
                    file.get_tensor(name).reshape(-1).view(torch.uint8),
                )
            assert tensor.shape == info.shape
            assert tensor.dtype == info.dtype
            assert info.file.parent == folder
            total += info.nbytes
        assert total <= sum(file.stat().st_size for file in folder.iterdir())
    except CheckpointError:
        return True
    finally:
        assert sorted(folder.rglob("*")) == before
    return False


def fuzz(
    folder: Path,
    file: Path,
    ways: tuple[Callable[[bytes, random.Random], bytes], ...],
    cases: int,
    seed: int,
) -> None:
    assert not assert_honest(folder)
    original, draw, refused = file.read_bytes(), random.Random(seed), 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(cases):
        file.write_bytes(draw.choice(ways)(original, draw))
        refused += assert_honest(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY / 1024
    assert refused > cases // 2  # the damage is real


def check_headers(folder: Path, cases: int, seed: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(save(tensors(), {"format": "pt"}))
    fuzz(folder, file, (cut_or_spliced, odd_header, odd_header, odd_length), cases, seed)


def check_indexes(folder: Path, cases: int, seed: int) -> None:
    names = list(tensors())
    for shard, part in zip(SHARDS, (names[:2], names[2:]), strict=True):
        (folder / shard).write_bytes(save({name: tensors()[name] for name in part}))
    weight_map = {name: SHARDS[number // 2] for number, name in enumerate(names)}
    index = {"metadata": {"total_size": 48}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    fuzz(folder, folder / INDEX, (cut_or_spliced, odd_json, odd_json), cases, seed)


def check_pickles(folder: Path, cases: int, seed: int) -> None:
    """The archive's text is spread over the file, so damage is, too; most of it hits padding."""
    file = folder / "pytorch_model.bin"
    torch.save(tensors(), file)
    original, draw = file.read_bytes(), random.Random(seed)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(cases):
        file.write_bytes(cut_or_spliced(original, draw))
        try:
            opened = Checkpoint.open(folder)
            found = {name: opened.read(name) for name in opened.tensors}
            assert sum(tensor.nbytes for tensor in found.values()) <= 10 * len(original)
        except CheckpointError:
            pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY / 1024


def check_journals(folder: Path, cases: int, seed: int) -> None:
    """A damaged journal gives back a beginning of what was written, or is refused."""
    file, events = folder / "journal.jsonl", [{"layer": n, "sha": "0" * 64} for n in range(4)]
    with Journal.open(file) as journal:
        for event in events:
            journal.append(event)
    original, draw = file.read_bytes(), random.Random(seed)
    for _ in range(cases):
        file.write_bytes(cut_or_spliced(original, draw))
        try:
            with Journal.open(file) as journal:
                found = list(journal.events())
        except StorageError:
            continue
        assert found == events[: len(found)]


CHECKS = (check_headers, check_indexes, check_pickles, check_journals)


@pytest.mark.parametrize("check", CHECKS)
def test_damaged_files(tmp_path: Path, check: Callable[[Path, int, int], None]) -> None:
    check(tmp_path, 250, 0)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_many_damaged_files(tmp_path: Path, check: Callable[[Path, int, int], None]) -> None:
    """10,000 cases; those of settings, tokenizers and recipes are in tests/faults."""
    check(tmp_path, 2500, 1)
