"""A report comes back as it was written, or the error says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qmerge.errors import InputError
from qmerge.reread import read_report
from tests.samples import finished


def written(folder: Path, data: Any) -> Path:
    file = folder / "qmerge_report.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


def test_a_release_and_its_report_are_the_same_run(tmp_path: Path) -> None:
    file = written(tmp_path, finished().to_dict())
    assert read_report(file).to_dict() == finished().to_dict()
    assert read_report(tmp_path).to_dict() == finished().to_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ("{}", "no schema_version"),
        ({"schema_version": 99}, "schema_version 99"),
        ({"schema_version": 1}, "'qmerge_version' is missing"),
    ],
)
def test_what_is_no_report_is_named(tmp_path: Path, data: Any, message: str) -> None:
    file = written(tmp_path, data)
    with pytest.raises(InputError, match=message) as caught:
        read_report(tmp_path)
    assert str(file) in caught.value.message


def test_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no qmerge_report\.json"):
        read_report(tmp_path)
    with pytest.raises(InputError, match="no such report"):
        read_report(tmp_path / "gone")


def test_windows_that_are_missing_are_found(tmp_path: Path) -> None:
    for key in ("window_nll", "window_kl"):
        data = finished().to_dict()
        data["arms"]["release"]["plays"][key].pop()
        written(tmp_path, data)
        with pytest.raises(InputError, match=r"arms\.release\.plays: 15 windows where 16"):
            read_report(tmp_path)


def test_scores_of_an_unknown_text_are_found(tmp_path: Path) -> None:
    data = finished().to_dict()
    del data["corpora"]["evaluation"]["plays"]
    written(tmp_path, data)
    with pytest.raises(InputError, match="not among corpora"):
        read_report(tmp_path)
