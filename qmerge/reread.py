"""A finished run, read back from the report that it left."""

from __future__ import annotations

from pathlib import Path

from qmerge.errors import InputError
from qmerge.results import RunResult
from qmerge.storage.files import read_json
from qmerge.storage.shards import sha256_file

REPORT = "qmerge_report.json"


def find_report(path: Path) -> Path:
    """The report of a release folder, or `path` where it is one. InputError where there is none."""
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        where = f"{path} holds no {REPORT}" if path.is_dir() else f"{path}: no such report"
        hint = f"give a release that `qmerge run` made, or its {REPORT}"
        raise InputError(where, hint=hint)
    return file


def read_report(path: Path) -> RunResult:
    """The result of a release folder, or of its report. InputError names the file or the key."""
    file = find_report(path)
    result = RunResult.from_dict(read_json(file), source=str(file))
    for arm, scores in result.arms.items():
        for corpus, score in scores.items():
            _check_windows(result, corpus, len(score.window_nll), f"{file}: arms.{arm}.{corpus}")
            if score.window_kl:
                _check_windows(result, corpus, len(score.window_kl), f"{file}: arms.{arm}.{corpus}")
    return result


def is_of_release(file: Path, path: Path, result: RunResult) -> bool:
    """Whether `file` is the report that was read at `path`, or as it says that the release has it:
    `qmerge verify` would find another one in its place."""
    report = find_report(path)
    if file.resolve() == report.resolve():
        return True
    files = result.release.files if result.release is not None else {}
    own = {(report.parent / name).resolve(): digest for name, digest in files.items()}
    digest = own.get(file.resolve())
    return digest is not None and file.is_file() and sha256_file(file) == digest


def _check_windows(result: RunResult, corpus: str, found: int, where: str) -> None:
    """Windows are paired by their place, so none may be missing."""
    record = result.corpora.evaluation.get(corpus)
    if record is None:
        raise InputError(f"{where}: the corpus is not among corpora.evaluation")
    if found != record.windows:
        hint = "the report is damaged"
        raise InputError(f"{where}: {found} windows where {record.windows} should be", hint=hint)
