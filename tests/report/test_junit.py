"""JUnit XML, read back with a parser and against the schema's words that readers rely on."""

from __future__ import annotations

from xml.etree import ElementTree

from qmerge.report.checks import Check, Checked
from qmerge.report.junit import render

PASSED = Check(name="scored", passed=True, text="fine")
FALLEN = Check(
    name="mean KL on <a&b>", passed=False, text='mean KL is "7", over\x00\ud800 \x1b[31m'
)


def checked(*checks: Check) -> Checked:
    return Checked(
        command="qmerge run",
        sentence="s",
        checks=checks,
        seconds=1.5,
        text="table ]]> <x>\x08\uffff é 中 🙂\n",
        markdown="m",
    )


def test_counts_cases_and_failures() -> None:
    root = ElementTree.fromstring(render(checked(PASSED, FALLEN)))
    (suite,) = root
    for element in (root, suite):
        counts = {"tests": "2", "failures": "1", "errors": "0", "skipped": "0", "time": "1.500"}
        assert counts.items() <= element.attrib.items()
    first, second = suite.findall("testcase")
    assert (first.get("classname"), first.get("name")) == ("qmerge.run", "scored")
    assert first.find("failure") is None
    failure = second.find("failure")
    assert failure is not None
    assert failure.get("message") == failure.text == 'mean KL is "7", over [31m'
    assert second.get("name") == "mean KL on <a&b>"


def test_the_report_is_the_output() -> None:
    root = ElementTree.fromstring(render(checked(PASSED)))
    assert root.findtext("testsuite/system-out") == "table ]]> <x> é 中 🙂\n"
    assert render(checked(PASSED)).encode().startswith(b'<?xml version="1.0" encoding="UTF-8"?>')
