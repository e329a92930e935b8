"""What the README gives to paste is what the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from qmerge import cli

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def workflow() -> dict[Any, Any]:
    (text,) = (text for kind, text in BLOCKS if kind == "yaml" and "jobs:" in text)
    found: dict[Any, Any] = yaml.safe_load(text)
    return found


def steps() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = workflow()["jobs"]["release"]["steps"]
    return found


def commands() -> list[str]:
    """Every line that begins with qmerge, in the workflow and in blocks of shell."""
    shell = [step["run"] for step in steps() if "run" in step]
    shell += [text.replace("\\\n", " ") for kind, text in BLOCKS if kind in ("sh", "")]
    lines = [line for text in shell for line in text.splitlines()]
    return [line for line in lines if line.startswith("qmerge ")]


def test_the_workflow_is_one() -> None:
    found = workflow()
    # YAML 1.1 reads the key `on` as true.
    assert {"name", True, "jobs", "permissions"} == found.keys()
    assert all(("uses" in step) != ("run" in step) for step in steps())
    assert {"release/report.html", "run.jsonl"} <= set(steps()[-2]["with"]["path"].split())


def test_the_workflow_installs_what_it_fetched() -> None:
    """qmerge is on no package index."""
    fetched = [step["with"]["path"] for step in steps() if "path" in step.get("with", {})]
    (line,) = (step["run"] for step in steps() if "pip install" in step.get("run", ""))
    assert line.removeprefix("pip install ./") in fetched


@pytest.mark.parametrize("line", commands())
def test_the_command_line_takes_it(line: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    _, name, *arguments = shlex.split(line, comments=True)
    context = cli.group.make_context("qmerge", [name, *arguments])
    command = cli.group.get_command(context, name)
    assert command is not None
    command.make_context(name, arguments, parent=context)


def test_there_is_something_to_take() -> None:
    assert {line.split()[1] for line in commands()} >= {"run", "compare", "evaluate"}
