"""What the wheel carries."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    builder = pytest.importorskip("hatchling.builders.wheel", reason="building needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    (artifact,) = builder.WheelBuilder(str(ROOT)).build(
        directory=str(folder), versions=["standard"]
    )
    return zipfile.ZipFile(artifact)


def test_all_of_the_package_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    sources = [file for file in (ROOT / "qmerge").rglob("*") if file.is_file()]
    expected = {str(file.relative_to(ROOT)) for file in sources if file.suffix != ".pyc"}
    assert expected <= set(wheel.namelist())


def test_calibration_recipes_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    recipes = {f"qmerge/calibration/{file.name}" for file in (ROOT / "calibration").glob("*.yaml")}
    assert recipes
    assert recipes <= set(wheel.namelist())


def test_the_wheel_runs_anywhere_and_stays_small(wheel: zipfile.ZipFile) -> None:
    assert Path(wheel.filename or "").name.endswith("-py3-none-any.whl")
    assert Path(wheel.filename or "").stat().st_size < 6 << 20
    (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "qmerge = qmerge.cli:main" in wheel.read(entry).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
