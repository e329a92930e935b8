"""Runs qmerge's commands in child processes that something happens to.

One order a line on stdin, one answer a line on stdout. A child is a fork of this process, which
has run the job once itself: imports, and what libraries do at their first call, are paid once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from qmerge.report import plots
from tests.faults.faults import STRUCK, Disk, lie_about_space, turn_back_the_clock

OUTPUT = "output.txt"
LOG = "log.json"


def main() -> None:
    # A shell that starts the tests in the background has its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # PEFT looks for it when it puts an adapter into a model, and it starts threads.
    sys.modules["gptqmodel"] = None  # type: ignore[assignment]
    # Drawing the report's plots takes longer than the job.
    plots.picture = lambda *_, **__: "<svg></svg>"
    children: dict[int, str] = {}
    for line in sys.stdin:
        order = json.loads(line)
        answer: Any = None
        if order["do"] == "warm":
            answer = _warm(order)
        elif order["do"] == "start":
            answer = _fork(order)
            children[answer] = order["folder"]
        elif order["do"] == "wait":
            if order["kill_after"] is not None:
                time.sleep(order["kill_after"])
                os.kill(order["child"], signal.SIGKILL)
            answer = _wait(order["child"], Path(children.pop(order["child"])))
        print(json.dumps(answer), flush=True)


def _warm(order: dict[str, Any]) -> int:
    from qmerge import cli

    os.chdir(order["folder"])
    with redirect_stdout(sys.stderr):
        return cli.status(order["words"])


def _fork(order: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        code = 3
        try:
            code = _run(order)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def _run(order: dict[str, Any]) -> int:
    from qmerge import cli

    os.chdir(order["folder"])
    handle = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    STRUCK.unlink(missing_ok=True)
    disk = Disk(
        order["at"], order["nth"], order["what"], reads=order["reads"], known=order["known"]
    )
    disk.install()
    if order["clock"]:
        turn_back_the_clock()
    if order["lie"]:
        lie_about_space()
    try:
        cli.main(order["words"])
    except SystemExit as ended:
        log = json.dumps(disk.log)
        disk.left = -1  # what is written here is not the command's
        Path(LOG).write_text(log)
        return int(ended.code or 0)


def _wait(child: int, folder: Path) -> dict[str, Any]:
    _, status = os.waitpid(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "struck": struck.read_text() if (struck := folder / STRUCK).exists() else None,
        "said": (folder / OUTPUT).read_text(errors="replace"),
        "log": json.loads((folder / LOG).read_text()) if os.WIFEXITED(status) else [],
    }


if __name__ == "__main__":
    main()
