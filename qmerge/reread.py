"""A finished run, read back from the report that it left."""

from __future__ import annotations

import os
from pathlib import Path

from qmerge.errors import InputError
from qmerge.results import REPORT, RunResult
from qmerge.storage.files import read_json


def read_report(path: Path) -> RunResult:
    """The result of a release folder, or of its report. InputError names the file or the key."""
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        where = f"{path} holds no {REPORT}" if path.is_dir() else f"{path}: no such report"
        hint = f"give a release that `qmerge run` made, or its {REPORT}"
        raise InputError(where, hint=hint)
    result = RunResult.from_dict(read_json(file), source=str(file))
    for arm, scores in result.arms.items():
        for corpus, score in scores.items():
            _check_windows(result, corpus, len(score.window_nll), f"{file}: arms.{arm}.{corpus}")
            if score.window_kl:
                _check_windows(result, corpus, len(score.window_kl), f"{file}: arms.{arm}.{corpus}")
    return result


def is_of_release(file: Path) -> bool:
    """Whether `file` is the report of a run, or in a release: there `qmerge verify` takes no other
    file, and none in the place of one of its own."""
    place = Path(os.path.realpath(file))
    if place.name == REPORT:
        return place.exists()
    return all((place.parent / name).is_file() for name in (REPORT, "config.json"))


def _check_windows(result: RunResult, corpus: str, found: int, where: str) -> None:
    """Windows are paired by their place, so none may be missing."""
    record = result.corpora.evaluation.get(corpus)
    if record is None:
        raise InputError(f"{where}: the corpus is not among corpora.evaluation")
    if found != record.windows:
        hint = "the report is damaged"
        raise InputError(f"{where}: {found} windows where {record.windows} should be", hint=hint)
