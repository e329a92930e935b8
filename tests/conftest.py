"""Fixtures shared by all tests: tiny real checkpoints, text, and the checkpoints beside the tree.

They are made once per session and only where a test asks for them. Treat the folders as read-only.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import hypothesis
import pytest

from qmerge.recipe import Recipe
from tests import checkpoints

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub fails at once

# The same examples on every run and machine, however slow it is, and no folder left behind.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Qwen3 in shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "original"
    checkpoints.write_original(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_nf4(tiny_original: Path) -> Path:
    """tiny_original in nf4 with double quantization."""
    folder = tiny_original.parent / "nf4"
    checkpoints.write_nf4(tiny_original, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gptq(tiny_original: Path) -> Path:
    """tiny_original in GPTQ v1: 4 bits, group 32, symmetric."""
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("writing a GPTQ base needs the extra 'verify' (gptqmodel)")
    folder = tiny_original.parent / "gptq"
    checkpoints.write_gptq(tiny_original, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tiny_original: Path) -> Path:
    """A LoRA adapter, r 4, on all seven linears, for any of the three bases."""
    folder = tiny_original.parent / "adapter"
    checkpoints.write_adapter(tiny_original, folder)
    return folder


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file that shares no document with eval_text."""
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(checkpoints.texts()[0][:100_000], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def eval_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file that no tiny checkpoint was trained on: some 30,000 of its tokens."""
    file = tmp_path_factory.mktemp("text") / "evaluation.txt"
    file.write_text(checkpoints.texts()[1], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def shared() -> Path:
    """Larger checkpoints and text: $QMERGE_SHARED, or a folder `shared` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("QMERGE_SHARED", beside))
    if not (folder / "models").is_dir():
        pytest.skip("needs the checkpoints that QMERGE_SHARED names")
    return folder


@pytest.fixture
def asked(
    tiny_original: Path, tiny_adapter: Path, calibration_text: Path, eval_text: Path, tmp_path: Path
) -> Recipe:
    """A recipe on copies, for a test to damage."""
    base, adapter = tmp_path / "base", tmp_path / "run" / "adapter"
    shutil.copytree(tiny_original, base)
    shutil.copytree(tiny_adapter, adapter)
    return Recipe(
        base=base,
        adapter=(str(adapter),),
        out=tmp_path / "out",
        calibration=str(calibration_text),
        calibration_samples=4,
        eval=(str(eval_text),),
        eval_windows=2,
        sequence_length=64,
        group_size=32,
    )
