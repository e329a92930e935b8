"""Checkpoints as models: what is stored beside the weights, and heads that are tied and packed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.errors import PlanError
from qmerge.export import export
from qmerge.model.opening import open_model
from qmerge.recipe import Recipe
from qmerge.storage.checkpoint import Checkpoint
from tests import test_matrix as forms


@pytest.fixture(scope="module")
def packed(tiny_original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_original in GPTQ, every linear packed."""
    folder = tmp_path_factory.mktemp("opening") / "packed"
    forms.gptq(4)(tiny_original, folder)
    return folder


def with_biases(packed: Path, folder: Path, value: float) -> Path:
    """A bias for every packed linear, of a model that has none."""
    shutil.copytree(packed, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(".qweight")]:
            bias = torch.full(tensors[name].shape[1:], value, dtype=torch.float16)
            tensors[name.replace(".qweight", ".bias")] = bias
        save_file(tensors, file, metadata={"format": "pt"})
    forms.write_index(folder)
    return folder


def test_biases_of_zeros_as_autogptq_wrote_them(packed: Path, tmp_path: Path) -> None:
    folder = with_biases(packed, tmp_path / "base", 0.0)
    for base, out in ((packed, "plain"), (folder, "biased")):
        export(Recipe(base=base, out=tmp_path / out))
    plain, biased = (Checkpoint.open(tmp_path / out) for out in ("plain", "biased"))
    assert set(biased.tensors) == set(plain.tensors)
    for name in plain.tensors:
        assert torch.equal(biased.read(name), plain.read(name)), name


def test_biases_that_add_something_are_no_part_of_the_model(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"down_proj\.bias"):
        open_model(with_biases(packed, tmp_path / "base", 0.5))
