"""Checks as GitHub Actions shows them: annotations in a job's log, and a job summary.

A line `::error title=T::TEXT` on stdout or stderr of a step becomes an annotation.
https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

from qmerge.report.checks import Checked
from qmerge.report.figures import printable


def commands(checked: Checked) -> str:
    """An error for each check that failed, else a notice; a warning for each of the report's."""
    fallen = [check for check in checked.checks if not check.passed]
    lines = [_command("error", f"{checked.command}: {c.name}", c.text) for c in fallen]
    lines += [_command("warning", checked.command, warning) for warning in checked.warnings]
    if not fallen:
        lines.append(_command("notice", checked.command, checked.sentence))
    return "\n".join(lines) + "\n"


def summary(checked: Checked) -> str:
    """Markdown to append to the file that $GITHUB_STEP_SUMMARY names."""
    return f"## {checked.command}\n\n{checked.markdown}\n\n"


def _command(kind: str, title: str, text: str) -> str:
    name = _data(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={name}::{_data(text)}"


def _data(text: str) -> str:
    """A line break would end the command, and what follows be taken as another one."""
    return printable(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))
