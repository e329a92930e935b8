"""Hidden states on disk: two generations, digests, and what happens to damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qmerge.errors import StorageError
from qmerge.model.streams import Stream, Streams, batches

SHAPE = {"a b/c": Stream(windows=5, length=3, width=4)}


def write(streams: Streams, hidden: torch.Tensor) -> dict[str, str]:
    for start, stop in batches(5, 2):
        streams.append("a b/c", hidden[start:stop])
    return streams.commit()


def test_what_is_written_is_read_after_the_turn(tmp_path: Path) -> None:
    streams = Streams(tmp_path, SHAPE)
    first, second = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    write(streams, first)
    assert torch.equal(streams.fresh("a b/c", 1, 3), first[1:3])
    streams.turn()
    digests = write(streams, second)
    assert torch.equal(streams.read("a b/c", 0, 5), first)
    streams.turn()
    assert torch.equal(streams.read("a b/c", 2, 4), second[2:4])
    streams.check(digests)


def test_half_a_generation_is_forgotten_by_a_new_process(tmp_path: Path) -> None:
    streams = Streams(tmp_path, SHAPE)
    first = torch.randn(5, 3, 4)
    digests = write(streams, first)
    streams.turn()
    streams.append("a b/c", torch.randn(2, 3, 4))
    resumed = Streams(tmp_path, SHAPE)
    resumed.generation = streams.generation
    resumed.check(digests)
    assert torch.equal(resumed.read("a b/c", 0, 5), first)
    again = torch.randn(5, 3, 4)
    write(resumed, again)
    resumed.turn()
    assert torch.equal(resumed.read("a b/c", 0, 5), again)


@pytest.mark.parametrize("damage", [lambda b: b[:-4], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_damage_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    streams = Streams(tmp_path, SHAPE)
    digests = write(streams, torch.randn(5, 3, 4))
    streams.turn()
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StorageError, match=file.name):
        streams.check(digests)
