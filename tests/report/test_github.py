"""Commands that GitHub's runner takes from a log: one a line, whatever a name holds."""

from __future__ import annotations

import re
from urllib.parse import unquote

from qmerge.report.checks import Check, Checked
from qmerge.report.github import commands, summary

# As the runner reads them: `::KIND KEY=VALUE,…::TEXT` at the start of a line, %XX decoded.
COMMAND = re.compile(r"::(?P<kind>\w+) title=(?P<title>[^:,\r\n]*)::(?P<text>[^\r\n]*)\Z")

ODD = "100% of a: b, c\n::error::no\r::set-env name=x::y"


def checked(*checks: Check) -> Checked:
    return Checked(
        command="qmerge run",
        sentence="As good as trained.",
        checks=checks,
        warnings=("texts overlap",),
        text="t",
        markdown="**m**",
    )


def read(lines: str) -> list[tuple[str, str, str]]:
    found = [COMMAND.match(line) for line in lines.splitlines()]
    assert None not in found
    return [(m["kind"], unquote(m["title"]), unquote(m["text"])) for m in found if m]


def test_what_fell_is_an_error_under_its_name() -> None:
    fallen = Check(name="mean KL", passed=False, text="mean KL is 7")
    assert read(commands(checked(Check(name="scored", passed=True, text="s"), fallen))) == [
        ("error", "qmerge run: mean KL", "mean KL is 7"),
        ("warning", "qmerge run", "texts overlap"),
    ]


def test_what_holds_is_a_notice() -> None:
    assert read(commands(checked()))[-1] == ("notice", "qmerge run", "As good as trained.")


def test_no_name_can_give_a_command_of_its_own() -> None:
    lines = commands(checked(Check(name=ODD, passed=False, text=ODD)))
    assert read(lines)[0] == ("error", f"qmerge run: {ODD}", ODD)
    assert len(lines.splitlines()) == 2


def test_the_summary_is_a_section() -> None:
    assert summary(checked()) == "## qmerge run\n\n**m**\n\n"
