"""How progress is shown: a live bar on a terminal, plain lines where there is none.

Both write to stderr: stdout is for data.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qmerge.errors import StorageError
from qmerge.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

QUIET = 5.0  # seconds between two plain lines about one step


@contextmanager
def display(log_json: Path | None = None) -> Iterator[Progress]:
    """The display that fits stderr, for as long as the block runs; events in a file beside it."""
    with chatter_to_stderr(), _shown() as shown:
        if log_json is None:
            yield shown
            return
        with logged(shown, log_json) as log:
            yield log


@contextmanager
def _shown() -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield PlainProgress(sys.stderr)
        return
    with rich_bars(sys.stderr) as bars:
        shown = RichProgress(bars)
        yield shown
        shown.finish()


@contextmanager
def logged(shown: Progress, file: Path) -> Iterator[Progress]:
    """`shown`, with its events written to `file`, the last of which is done or failed."""
    try:
        stream = file.open("wb", buffering=0)  # nothing is left to be written when it is closed
    except OSError as error:
        raise StorageError(f"--log-json: {file}: {error.strerror}") from error
    with stream:
        log = LoggedProgress(shown, stream)
        try:
            yield log
        except BaseException as error:
            log.event("failed", error=f"{type(error).__name__}: {error}")
            raise
        log.event("done")


@contextmanager
def chatter_to_stderr() -> Iterator[None]:
    """What libraries print while the block runs (some do when imported) is no data of ours."""
    with redirect_stdout(sys.stderr):
        yield


class PlainProgress:
    """A line at each step, and now and then one about a step that takes long."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self.clock = clock
        self.stage("", 0)

    def stage(self, name: str, total: int) -> None:
        self.name, self.total, self.begun = name, total, 0
        self.item = ""
        self.started = self.step_started = self.printed = self.clock()

    def step(self, item: str) -> None:
        self.begun += 1
        self.item = item
        self.step_started = self.clock()
        self._line(item)

    def doing(self, what: str) -> None:
        if self.clock() - self.printed >= QUIET:
            self._line(f"{self.item}: {what}" if self.item else what)

    def warn(self, message: str) -> None:
        print(f"warning: {message}", file=self.stream, flush=True)

    def _line(self, text: str) -> None:
        self.printed = self.clock()
        parts = [f"{self.name} {self.begun}/{self.total}", text]
        parts.append(duration(self.printed - self.started))
        if self.begun > 1:
            parts.append(f"{duration(self._left())} left")
        print(" · ".join([*parts, memory()]), file=self.stream, flush=True)

    def _left(self) -> float:
        """The steps to come take as long as those done did; this one is partly done."""
        each = (self.step_started - self.started) / (self.begun - 1)
        ahead = each * (self.total - self.begun)
        return ahead + max(0.0, each - (self.printed - self.step_started))


class RichProgress:
    """One bar per stage. Text from checkpoints is shown as it is, never as markup."""

    def __init__(self, bars: RichBars) -> None:
        self.bars = bars
        self.task: TaskID | None = None
        self.begun, self.item = 0, ""

    def stage(self, name: str, total: int) -> None:
        self.finish()
        self.begun, self.item = 0, ""
        self.task = self.bars.add_task(name, total=total, text="", memory=memory())

    def step(self, item: str) -> None:
        self.begun += 1
        self.item = item
        self._update(item)

    def doing(self, what: str) -> None:
        self._update(f"{self.item}: {what}" if self.item else what)

    def warn(self, message: str) -> None:
        from rich.text import Text

        self.bars.console.print(Text(f"warning: {message}"), soft_wrap=True)

    def finish(self) -> None:
        """The current stage is done."""
        if self.task is not None:
            total = self.bars.tasks[self.task].total
            self.bars.update(self.task, completed=total, text="", memory=memory())

    def _update(self, text: str) -> None:
        if self.task is not None:
            done = max(self.begun - 1, 0)
            self.bars.update(self.task, completed=done, text=text, memory=memory())


class LoggedProgress:
    """Another display, and each of its events as a line of JSON, there for others at once.

    Every event has `time` (UTC), `seconds` since the first, `rss` in bytes and `event`.
    """

    def __init__(
        self, shown: Progress, stream: RawIOBase, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.shown = shown
        self.stream: RawIOBase | None = stream
        self.clock = clock
        self.started = clock()
        self.place: dict[str, Any] = {}

    def stage(self, name: str, total: int) -> None:
        self.place = {"stage": name, "step": 0, "total": total}
        self.event("stage", **self.place)
        self.shown.stage(name, total)

    def step(self, item: str) -> None:
        self.place |= {"step": self.place.get("step", 0) + 1, "item": item}
        self.event("step", **self.place)
        self.shown.step(item)

    def doing(self, what: str) -> None:
        self.event("doing", **self.place, doing=what)
        self.shown.doing(what)

    def warn(self, message: str) -> None:
        self.event("warn", message=message)
        self.shown.warn(message)

    def event(self, name: str, **facts: Any) -> None:
        """A line for machines. A log that cannot be written any more does not end the job."""
        if self.stream is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(self.clock() - self.started, 3),
            "rss": resident(),
            "event": name,
            **facts,
        }
        try:
            self.stream.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            self.stream = None
            self.shown.warn(f"--log-json: {error.strerror}; no more events are written")


def rich_bars(stream: TextIO) -> RichBars:
    """Bars with stage, steps, what is being done, time gone, time left and memory."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}", markup=False),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(file=stream),
    )


def duration(seconds: float) -> str:
    """75.2 → 1:15, 4000 → 1:06:40."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory() -> str:
    """Resident memory, for people."""
    return f"{resident() / (1 << 20):.0f} MiB"


def resident() -> int:
    """Resident bytes of this process now, or at its peak where the system tells only that."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
