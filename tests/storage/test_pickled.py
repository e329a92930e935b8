from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge.errors import CheckpointError
from qmerge.storage.checkpoint import Checkpoint

NAME = "pytorch_model.bin"


class Intruder:
    """What a hostile pickle does: call something on being read."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def with_pickle(path: Path, value: object) -> None:
    """A torch.save archive whose pickle is replaced by that of `value`."""
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            changed = pickle.dumps(value, protocol=2) if name.endswith("data.pkl") else data
            archive.writestr(name, changed)


def squeezed(path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "runs a command": lambda p: with_pickle(p, {"a": Intruder(Path.touch, p.with_name("hit"))}),
    "fills memory": lambda p: with_pickle(p, {"a": Intruder(bytearray, 2**38)}),
    "claims memory": lambda p: with_pickle(p, {"a": Intruder(torch.Tensor, 2**38)}),
    "stretched tensor": lambda p: torch.save({"a": torch.ones(1).expand(2**38)}, p),
    "meta tensor": lambda p: torch.save({"a": torch.empty(2**38, device="meta")}, p),
    "sparse tensor": lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p),
    "not a state": lambda p: torch.save([torch.ones(2)], p),
    "nested state": lambda p: torch.save({"state_dict": {"a": torch.ones(2)}}, p),
    "name not text": lambda p: torch.save({1: torch.ones(2)}, p),
    "compressed": squeezed,
    "old format": lambda p: torch.save(
        {"a": torch.ones(2)}, p, _use_new_zipfile_serialization=False
    ),
    "plain pickle": lambda p: p.write_bytes(pickle.dumps({"a": 1})),
    "another zip": lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "x"),
    "empty": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_only_plain_tensors_come_out(tmp_path: Path, kind: str) -> None:
    HOSTILE[kind](tmp_path / NAME)
    with pytest.raises(CheckpointError, match=NAME):
        Checkpoint.open(tmp_path)
    assert not (tmp_path / "hit").exists()


def test_shared_storage_and_views_are_read(tmp_path: Path) -> None:
    """As a tied head, a transposed weight and a parameter are saved."""
    weight = torch.randn(5, 3)
    state = OrderedDict(
        embed=weight, head=weight, turned=weight.T, learned=torch.nn.Parameter(torch.ones(2))
    )
    torch.save(state, tmp_path / NAME)
    opened = Checkpoint.open(tmp_path)
    assert torch.equal(opened.read("head"), weight)
    assert torch.equal(opened.read("turned"), weight.T)
    assert torch.equal(opened.read_rows("turned", 1, 3), weight.T[1:3])
    assert not opened.read("learned").requires_grad
