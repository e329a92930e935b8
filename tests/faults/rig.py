"""Orders for `server.py`: one small job in one folder, run, stopped, run again and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = "release"
TIMED = ("timings", "peak_rss_bytes", "memory", "sha256")
"""Keys of a report that need not be equal."""
REPORTS = ("qmerge_report.json", "report.html")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended: exit code (below 0 a signal), what it said, what it did to the disk, and
    the operation that met something."""

    code: int
    said: str
    struck: str | None
    log: list[str]


class Server:
    """The process that forks the children."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**environment, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"},
        )

    def ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        """The next line that is an answer; libraries print as they please."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except ValueError:
                continue
        raise RuntimeError("the server of the fault tests has died")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The words of one `qmerge run`, and a folder of its own to run it in."""

    server: Server
    words: tuple[str, ...]
    folder: Path

    @property
    def release(self) -> Path:
        return self.folder / OUT

    @property
    def partial(self) -> Path:
        return self.folder / f"{OUT}.partial"

    def start(
        self,
        *more: str,
        at: str = "*",
        nth: int = 0,
        what: str = "kill",
        reads: bool = False,
        known: Sequence[str] = (),
        clock: bool = False,
        lie: bool = False,
    ) -> int:
        """Begin `qmerge run`; the `nth` operation like `at`, kinds that are `known` left out, meets
        `what`. The child's process id."""
        self.folder.mkdir(exist_ok=True)
        child: int = self.server.ask(
            do="start",
            folder=str(self.folder),
            words=["run", *self.words, *more],
            at=at,
            nth=nth,
            what=what,
            reads=reads,
            known=list(known),
            clock=clock,
            lie=lie,
        )
        return child

    def wait(self, child: int, *, kill_after: float | None = None) -> Ended:
        answer = self.server.ask(do="wait", child=child, kill_after=kill_after)
        return Ended(**answer)

    def ask(self, *words: str) -> Ended:
        """Any command, with nothing happening to it."""
        untouched = {"at": "*", "nth": 0, "what": "kill", "reads": False, "known": []}
        order = {"do": "start", "folder": str(self.folder), "words": words, **untouched}
        return self.wait(self.server.ask(**order, clock=False, lie=False))

    def run(self, *more: str, **happening: Any) -> Ended:
        return self.wait(self.start(*more, **happening))

    def finished(self) -> int:
        """Units that the journal has."""
        file = self.partial / "journal.jsonl"
        return file.read_text().count('"unit"') if file.is_file() else 0


def contents(release: Path) -> dict[str, bytes]:
    """Every file of a release, the report without what is measured by the clock."""
    found = {str(p.relative_to(release)): p.read_bytes() for p in release.rglob("*") if p.is_file()}
    report = json.loads(found["qmerge_report.json"])
    for key in TIMED:
        report.pop(key, None)
    for layer in report["layers"]:
        del layer["seconds"]
    del report["release"]["files"]["report.html"]
    for name in REPORTS:
        del found[name]
    found["report without timings"] = json.dumps(report, indent=1).encode()
    return found
