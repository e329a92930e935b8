"""Checks as JUnit XML, which every continuous integration can show."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from qmerge.report.checks import Checked

# What XML 1.0 cannot hold, escaped or not: most control characters, halves of pairs.
UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(checked: Checked) -> str:
    """One suite with a case per check; the report as text is the suite's output."""
    fallen = [check for check in checked.checks if not check.passed]
    counts = {
        "tests": str(len(checked.checks)),
        "failures": str(len(fallen)),
        "errors": "0",
        "skipped": "0",
        "time": f"{checked.seconds:.3f}",
    }
    root = ElementTree.Element("testsuites", {"name": "qmerge", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": checked.command, **counts})
    group = checked.command.replace(" ", ".")
    for check in checked.checks:
        about = {"classname": group, "name": _clean(check.name), "time": "0"}
        case = ElementTree.SubElement(suite, "testcase", about)
        if not check.passed:
            text = _clean(check.text)
            failure = ElementTree.SubElement(case, "failure", {"type": "limit", "message": text})
            failure.text = text
    ElementTree.SubElement(suite, "system-out").text = _clean(checked.text)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"


def _clean(text: str) -> str:
    return UNPRINTABLE.sub("", text)
