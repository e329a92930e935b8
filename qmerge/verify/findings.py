"""Named checks, each with an outcome and a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from qmerge.errors import PlanError, QmergeError
from qmerge.names import listed

LISTED = 4
"""Complaints in a sentence before it says how many more there are."""
Outcome = Literal["pass", "fail", "note", "skip"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A `note` is something that a reader should know and the recipe chose; a `skip` says why."""

    name: str
    outcome: Outcome
    text: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Everything that was looked at in one release."""

    release: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(check.name for check in self.checks if check.outcome == "fail")


class Findings:
    """Collects checks in the order in which they are made."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def add(self, name: str, outcome: Outcome, text: str) -> None:
        self.checks.append(Check(name=name, outcome=outcome, text=text))

    def say(self, name: str, wrong: Sequence[str], well: str) -> None:
        """A failure that lists what is wrong, or a pass."""
        self.add(name, "fail" if wrong else "pass", listed(wrong, LISTED) if wrong else well)

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Our own errors inside the block are a failure of this check."""
        try:
            yield
        except PlanError as error:
            self.say(name, [f"{fault.where}: {fault.message}" for fault in error.faults], "")
        except QmergeError as error:
            self.add(name, "fail", error.message)
