"""What is written beside the answer, whatever the verdict, and refused before any work."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from qmerge import cli
from qmerge.measure import Limits, check_limits
from qmerge.progress import Progress
from qmerge.results import RunResult
from tests.samples import finished

RUN = ["run", "--base", "b", "--adapter", "a", "--out", "o"]
EVALUATE = ["evaluate", "b", "a"]


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> list[RunResult]:
    """The result that the stand-ins of `run` and `evaluate` give: the last of the list."""
    given: list[RunResult] = [finished()]

    def conduct(_: Any, progress: Progress) -> RunResult:
        progress.stage("walk", 2)
        progress.step("layer 0")
        progress.doing("trained")
        progress.warn("texts overlap")
        return given[-1]

    for name, call in (("qmerge.pipeline", "run"), ("qmerge.evaluate", "evaluate")):
        module = ModuleType(name)
        vars(module)[call] = conduct
        monkeypatch.setitem(sys.modules, name, module)
    return given


def fallen() -> RunResult:
    return dataclasses.replace(finished(), gate=check_limits(finished(), Limits(max_kl=1e-9)))


@pytest.mark.parametrize("command", [RUN, EVALUATE])
def test_the_gate_is_the_exit_code_and_everything_is_written(
    command: list[str],
    result: list[RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary, junit = tmp_path / "summary.md", tmp_path / "gate.xml"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    outputs = ["--github", "--junit", str(junit)]
    assert cli.status([*command, *outputs]) == 0
    assert ElementTree.parse(junit).getroot().get("failures") == "0"
    assert "::notice" in capsys.readouterr().err
    result.append(fallen())
    assert cli.status([*command, *outputs]) == 1
    assert ElementTree.parse(junit).getroot().get("failures") == "2"
    told = capsys.readouterr()
    assert told.err.count("::error title=qmerge run%3A mean KL on ") == 2
    assert "::" not in told.out
    assert "FAILED" in told.out
    written = summary.read_text()
    assert written.startswith("before\n## qmerge run\n")
    assert written.count("## qmerge run") == 2
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["gate.xml", "summary.md"]


def test_away_from_github_there_is_no_summary(
    result: list[RunResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert cli.status([*RUN, "--github", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["command"] == "run"
    assert "::notice" in told.err


@pytest.mark.parametrize("flag", ["--junit", "--log-json"])
@pytest.mark.parametrize("command", [RUN, EVALUATE])
def test_a_file_that_cannot_be_is_refused_first(
    command: list[str],
    flag: str,
    result: list[RunResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.status([*command, flag, str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag}: {tmp_path}: is a folder")
    assert cli.status([*command, flag, str(tmp_path / "gone" / "x")]) == 2
    told = capsys.readouterr().err
    assert told == (
        f"error: {flag}: {tmp_path}/gone/x: there is no folder {tmp_path}/gone\n"
        "hint: make it first, or name another file\n"
    )
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "x")
    assert cli.status([*command, flag, str(tmp_path / "link")]) == 2
    assert f"there is no folder {tmp_path}/gone" in capsys.readouterr().err


def test_events_go_to_a_file_beside_the_display(
    result: list[RunResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    assert cli.status([*RUN, "--log-json", str(log)]) == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events] == ["stage", "step", "doing", "warn", "done"]
    assert "walk 1/2 · layer 0" in capsys.readouterr().err


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for name, found in (("old", finished()), ("new", finished(damage=1.0))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "qmerge_report.json").write_text(json.dumps(found.to_dict()))
        folders.append(str(folder))
    old, new = folders
    junit = tmp_path / "gate.xml"
    assert cli.status(["compare", old, old]) == 0
    assert capsys.readouterr().out.startswith("No difference beyond noise.")
    assert cli.status(["compare", old, new, "--junit", str(junit), "--github"]) == 1
    told = capsys.readouterr()
    assert told.out.startswith("The new release is worse")
    assert told.err.count("::error") == 2
    assert ElementTree.parse(junit).getroot().get("failures") == "2"
    assert cli.status(["compare", old, old, "--max-kl", "0%", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "same"
    assert [verdict["passed"] for verdict in answer["gate"]] == [False, False]


@pytest.mark.parametrize("form", ["text", "md", "json", "html"])
def test_report(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qmerge.report import render

    (tmp_path / "qmerge_report.json").write_text(json.dumps(finished().to_dict()))
    expected = render(finished(), form)
    out = tmp_path / "drawn"
    assert cli.status(["report", str(tmp_path), "--format", form]) == 0
    assert capsys.readouterr().out.strip() == expected.strip()
    assert cli.status(["report", str(tmp_path), "--format", form, "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == expected
    assert capsys.readouterr().out == ""


def test_links_are_followed_and_a_pipe_stays_one(
    result: list[RunResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link, target, pipe = tmp_path / "link", tmp_path / "gate.xml", tmp_path / "pipe"
    link.symlink_to(target)
    for _ in range(2):  # the file is made, and then replaced
        assert cli.status([*RUN, "--junit", str(link)]) == 0
        assert link.is_symlink()
        assert ElementTree.parse(target).getroot().tag == "testsuites"
    os.mkfifo(pipe)
    read = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert cli.status([*RUN, "--junit", str(pipe)]) == 0
        assert pipe.is_fifo()
        assert os.read(read, 1 << 16).decode().startswith("<?xml")
    finally:
        os.close(read)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gate.xml", "link", "pipe"]


@pytest.mark.parametrize("option", ["--out", "--junit", "--log-json"])
@pytest.mark.parametrize("name", ["config.json", "new.html", "link", "qmerge_report.json"])
def test_nothing_is_written_into_a_release(
    option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, beside = tmp_path / "release", tmp_path / "beside"
    for folder in (release, beside):
        folder.mkdir()
        (folder / "qmerge_report.json").write_text(json.dumps(finished().to_dict()))
    (release / "config.json").write_text("{}")
    file = (beside if name == "link" else release) / name
    if name == "link":
        file.symlink_to(release / "config.json")
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    command = {
        "--out": ["report"],
        "--junit": ["compare", str(release)],
        "--log-json": ["evaluate"],
    }
    assert cli.status([*command[option], str(release), option, str(file)]) == 2
    told = capsys.readouterr().err
    assert f"{option}: {file} would be in a release" in told
    assert "hint: name a file elsewhere" in told
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before
    # A report alone is no release: pages may lie beside it.
    assert cli.status(["report", str(beside), "--out", str(beside / "page.md")]) == 0


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.status(["report", str(tmp_path)]) == 2
    assert "holds no qmerge_report.json" in capsys.readouterr().err
