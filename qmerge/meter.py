"""What each stage of a job takes: seconds, and resident memory at its peak."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

SAMPLED = 0.05  # seconds between two looks at the memory


class Meter:
    """Stages add up by name; one runs at a time. Memory is looked at while the block runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory: dict[str, int] = {}
        self._stage: str | None = None
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look, name="qmerge-meter", daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._watch.join()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done in the block belongs to the stage `name`."""
        began, self._stage = time.monotonic(), name
        try:
            yield
        finally:
            self._note(name)
            self._stage = None
            self.seconds[name] += time.monotonic() - began

    def add(self, seconds: Mapping[str, float], memory: Mapping[str, int]) -> None:
        """Take over what another process measured of the same job."""
        for name, spent in seconds.items():
            self.seconds[name] += spent
        for name, peak in memory.items():
            self.memory[name] = max(peak, self.memory.get(name, 0))

    def _look(self) -> None:
        while not self._ended.wait(SAMPLED):
            stage = self._stage
            if stage is not None:
                self._note(stage)

    def _note(self, stage: str) -> None:
        self.memory[stage] = max(resident(), self.memory.get(stage, 0))


def resident() -> int:
    """Resident bytes of this process now, or at its peak where the system tells only that."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_rss()


def peak_rss() -> int:
    """Most memory this process has had resident, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
