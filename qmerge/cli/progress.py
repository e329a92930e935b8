"""How progress is shown: a live bar on a terminal, plain lines where there is none.

Both write to stderr: stdout is for data.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import UTC, datetime
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qmerge.errors import StorageError
from qmerge.meter import resident
from qmerge.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

QUIET = 5.0  # seconds between two plain lines about one step
BRIEF = 1.0  # and between two about steps


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


class Place:
    """Where a job is: the stage, its step, how long steps take, and the figures it has."""

    def __init__(self, name: str, total: int, now: float) -> None:
        self.name, self.total, self.begun, self.item = name, total, 0, ""
        self.figures: dict[str, float] = {}
        self.started = self.step_started = now
        self._taken: list[float] = []

    def step(self, item: str, now: float) -> None:
        """The embedding and the head say nothing of how long a layer takes."""
        if _kind(item) != _kind(self.item):
            self._taken.clear()
        elif self.begun:
            self._taken.append(now - self.step_started)
        self.begun, self.item, self.step_started = self.begun + 1, item, now

    def doing(self, what: str) -> str:
        return f"{self.item}: {what}" if self.item else what

    def left(self, now: float) -> str:
        """Steps to come take as long as their like did; this one is partly done."""
        if not self._taken:
            return ""
        each = sum(self._taken) / len(self._taken)
        here = max(0.0, each - (now - self.step_started))
        return f"{duration(each * (self.total - self.begun) + here)} left"

    def told(self) -> list[str]:
        """The figures for people, three digits each."""
        return [f"{name} {value:.3g}" for name, value in self.figures.items()]


def _kind(item: str) -> str:
    """ "layer 3" is a layer. Single words are alike: names of weights, of texts."""
    name, _, more = item.partition(" ")
    return name if more else ""


class PlainProgress:
    """A line at each step that takes a while, and now and then one about a step that takes long."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self.clock = clock
        self.stage("", 0)

    def stage(self, name: str, total: int) -> None:
        self.printed = self.stepped = self.clock()
        self.place = Place(name, total, self.printed)

    def step(self, item: str) -> None:
        now = self.clock()
        self.place.step(item, now)
        if self.place.begun == 1 or now - self.stepped >= BRIEF:
            self.stepped = now
            self._line(item)

    def doing(self, what: str) -> None:
        if self.clock() - self.printed >= QUIET:
            self._line(self.place.doing(what))

    def figures(self, found: Mapping[str, float]) -> None:
        self.place.figures = dict(found)

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    def _line(self, text: str) -> None:
        place, self.printed = self.place, self.clock()
        parts = [
            f"{place.name} {place.begun}/{place.total}",
            text,
            *place.told(),
            duration(self.printed - place.started),
            place.left(self.printed),
            memory(),
        ]
        self._print(" · ".join(filter(None, parts)))

    def _print(self, line: str) -> None:
        """A stream that cannot be written to any more, as a log on a full disk, does not end the
        job."""
        with suppress(OSError):
            print(line, file=self.stream, flush=True)


class RichProgress:
    """One bar per stage. Text from checkpoints is shown as it is, never as markup."""

    def __init__(self, bars: RichBars, clock: Callable[[], float] = time.monotonic) -> None:
        self.bars = bars
        self.clock = clock
        self.task: TaskID | None = None
        self.place = Place("", 0, clock())

    def stage(self, name: str, total: int) -> None:
        self.finish()
        self.place = Place(name, total, self.clock())
        self.task = self.bars.add_task(name, total=total, text="", left="", memory=memory())

    def step(self, item: str) -> None:
        self.place.step(item, self.clock())
        self._update(item)

    def doing(self, what: str) -> None:
        self._update(self.place.doing(what))

    def figures(self, found: Mapping[str, float]) -> None:
        self.place.figures = dict(found)

    def warn(self, message: str) -> None:
        from rich.text import Text

        self.bars.console.print(Text(f"warning: {message}"), soft_wrap=True)

    def finish(self) -> None:
        """The current stage is done; the figures that it ended with stay."""
        if self.task is not None:
            total = self.bars.tasks[self.task].total
            text = " · ".join(self.place.told())
            self.bars.update(self.task, completed=total, text=text, left="", memory=memory())

    def _update(self, text: str) -> None:
        if self.task is not None:
            self.bars.update(
                self.task,
                completed=max(self.place.begun - 1, 0),
                text=" · ".join([text, *self.place.told()]),
                left=self.place.left(self.clock()),
                memory=memory(),
            )


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

    def figures(self, found: Mapping[str, float]) -> None:
        known = {name: value for name, value in found.items() if math.isfinite(value)}
        self.event("figures", **self.place, figures=known)
        self.shown.figures(found)

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
    """Bars with stage, steps, time gone, time left, memory, and in what room there is the rest."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    class Rest(TextColumn):
        """Cut where the terminal ends; the columns before it keep their width."""

        def render(self, task: Any) -> Text:
            text = super().render(task)
            text.no_wrap, text.overflow = True, "ellipsis"
            return text

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[memory]}", markup=False),
        Rest("{task.fields[text]}", markup=False, table_column=Column(no_wrap=False)),
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
