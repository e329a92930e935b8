"""What can happen to a process at its work: every touch of the disk is seen, and one goes wrong.

Installed in a child process that runs the main job (`server.py`); nothing of it is in qmerge.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import pathlib
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO}
SIGNALS = {
    "kill": signal.SIGKILL,
    "terminate": signal.SIGTERM,
    "interrupt": signal.SIGINT,
    "stop": signal.SIGSTOP,
}
STRUCK = Path("struck.txt")
"""Where the operation is named that met something."""
CHANGES = ("fsync", "ftruncate", "rename", "replace", "unlink", "mkdir", "rmdir")


class Disk:
    """Sees changes (or, with `reads`, reads) below the folder the process is in.

    The one numbered `nth`, from 1, of those like `at` meets `what`: a signal, or an error of the
    system. `at` is a glob over "operation path". Those of a kind in `known` are not counted. Of a
    write half is on the disk by then.
    """

    def __init__(
        self, at: str, nth: int, what: str, *, reads: bool, known: Sequence[str] = ()
    ) -> None:
        self.root = Path("/") if reads else Path.cwd()
        self.at, self.left, self.what, self.reads = at, nth, what, reads
        self.known = set(known)
        self.log: list[str] = []

    def install(self) -> None:
        for name in CHANGES:
            setattr(os, name, self._seen(name, getattr(os, name)))
        vars(os)["pwrite"] = self._pwrite
        self._open = pathlib.Path.open
        disk = self

        def opened(path: pathlib.Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wxa"):
                disk.touch("create", str(path))
            return File(disk, disk._open(path, mode, *args, **kwargs), str(path))

        pathlib.Path.open = opened  # type: ignore[method-assign, assignment]
        if self.reads:
            self._see_tensors()

    def _see_tensors(self) -> None:
        """Tensors are read through a mapping, where a broken disk raises in the library's call."""
        import qmerge.storage.checkpoint as module

        disk = self
        real: Any = vars(module)["safe_open"]

        class Opened:
            def __init__(self, file: pathlib.Path, framework: str) -> None:
                self._file, self._opened = file, real(file, framework=framework)

            def get_tensor(self, name: str) -> Any:
                disk.touch("tensor", str(self._file), read=True)
                return self._opened.get_tensor(name)

            def get_slice(self, name: str) -> Any:
                disk.touch("tensor", str(self._file), read=True)
                return self._opened.get_slice(name)

        vars(module)["safe_open"] = Opened

    def touch(
        self, name: str, path: str, half: Callable[[], Any] | None = None, *, read: bool = False
    ) -> bool:
        """Note one operation, and let it have its fate; whether `half` of it has been done."""
        where = Path.cwd() / path
        if read is not self.reads or not where.is_relative_to(self.root):
            return False
        self.log.append(f"{name} {where.relative_to(self.root)}")
        if kind_of(self.log[-1]) not in self.known:
            self.left -= fnmatch.fnmatchcase(self.log[-1], self.at)
        if self.left:
            return False
        self.left = -1
        STRUCK.write_text(self.log[-1])
        if half is not None:
            half()
        if self.what in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.what])
        else:
            raise OSError(ERRORS[self.what], os.strerror(ERRORS[self.what]))
        return half is not None

    def _pwrite(self, handle: int, data: bytes, offset: int, _real: Any = os.pwrite) -> int:
        middle = len(data) // 2
        if self.touch("pwrite", _path(handle, None), lambda: _real(handle, data[:middle], offset)):
            return middle
        written: int = _real(handle, data, offset)
        return written

    def _seen(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            self.touch(name, _path(target, kwargs.get("dir_fd")))
            return real(target, *args, **kwargs)

        return call


class File:
    """An open file whose reads and writes are seen."""

    def __init__(self, disk: Disk, file: Any, path: str) -> None:
        self._disk, self._file, self._path = disk, file, path

    def write(self, data: Any) -> Any:
        middle = len(data) // 2

        def half() -> None:
            self._file.write(data[:middle])
            self._file.flush()

        if self._disk.touch("write", self._path, half):
            return self._file.write(data[middle:])
        return self._file.write(data)

    def read(self, *args: Any) -> Any:
        self._disk.touch("read", self._path, read=True)
        return self._file.read(*args)

    def readinto(self, buffer: Any) -> Any:
        self._disk.touch("read", self._path, read=True)
        return self._file.readinto(buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def kind_of(operation: str) -> str:
    """Names of one kind differ in their digits."""
    return re.sub(r"\d+", "#", operation)


def _path(target: Any, folder: int | None) -> str:
    """Of what an operation was given: a path, a handle, or a name below an open folder."""
    handles = Path("/proc/self/fd")
    if isinstance(target, int):
        return str((handles / str(target)).readlink())
    if folder is not None:
        return str((handles / str(folder)).readlink() / target)
    return os.fspath(target)


def turn_back_the_clock() -> None:
    """Each look at the clock shows an hour less than the one before."""
    now = [time.time()]

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    time.time = earlier


def lie_about_space() -> None:
    """The check before a run finds room, so that the disk fills up in the middle of it."""
    from qmerge import machine

    vars(machine)["disk_free"] = lambda _: 1 << 60
