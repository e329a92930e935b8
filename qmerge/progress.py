"""What a long job tells while it runs; how it is shown is the door's business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """A job is stages in a row, a stage is `total` steps in a row, a step may do several things."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins; the one before it is done."""

    def step(self, item: str) -> None:
        """The next step begins ("layer 3"); the one before it is done."""

    def doing(self, what: str) -> None:
        """What the current step is at: an arm, a linear. May be called often."""

    def figures(self, found: Mapping[str, float]) -> None:
        """What the job has measured so far ("perplexity", "KL"); shown until there are others."""

    def warn(self, message: str) -> None:
        """Something the user should read now, whatever the report says later."""


class Silent:
    """For callers that want no display."""

    def stage(self, name: str, total: int) -> None: ...

    def step(self, item: str) -> None: ...

    def doing(self, what: str) -> None: ...

    def figures(self, found: Mapping[str, float]) -> None: ...

    def warn(self, message: str) -> None: ...
