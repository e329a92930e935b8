"""The door: commands that parse, call and print, and the border where errors become words.

Commands are imported when they are named, and what they call when they run, so that `--help`
answers at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import click

from qmerge import __version__
from qmerge.errors import Fault, PlanError, QmergeError

# Each is a module qmerge.cli.NAME with a click command called `command`.
COMMANDS = (
    "run",
    "plan",
    "inspect",
    "evaluate",
    "compare",
    "report",
    "verify",
    "dequantize",
    "merge",
    "quantize",
    "demo",
)

# Loggers that warn, while libraries are imported, of what no command of ours uses: kernels that
# torchao and bitsandbytes would have on another machine, and what torchao asks of torch.
CHATTER = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")

INTERRUPTED = 130
INTERNAL = 3


class Lazy(click.Group):
    """A group whose commands are modules, imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"qmerge.cli.{name}").command
        return command


@click.command(cls=Lazy)
@click.version_option(__version__, message="%(prog)s %(version)s")
def group() -> None:
    """Merge a QLoRA adapter into its 4-bit base, requantize with GPTQ, and say what it cost.

    Exit codes: 0 done; 1 a gate, comparison, verification or plan found a fault; 2 bad input;
    3 internal or I/O failure; 130 interrupted. QMERGE_DEBUG=1 shows tracebacks, and what libraries
    warn of while they are imported.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code.

    SIGTERM ends it as Ctrl-C does: an exception, so that files and locks are let go in order. So
    does the end of a terminal, where nohup does not say otherwise.
    """
    _open_closed_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    if not _debugging():
        for name in CHATTER:
            logging.getLogger(name).setLevel(logging.ERROR)
    sys.exit(status(arguments))


def _open_closed_streams() -> None:
    """The next file that is opened gets the number of a stream that was closed, and would get what
    libraries print there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def status(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (sys.argv's by default); every error ends here, as words on stderr."""
    try:
        outcome = group.main(arguments, prog_name="qmerge", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except (KeyboardInterrupt, click.Abort) as error:
        # click raises Abort from the interrupt, whose notes say what has been kept.
        notes = getattr(error.__cause__ or error, "__notes__", ())
        _tell("interrupted", "; ".join(notes) or None)
        return INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        page = context.command_path if context else "qmerge"
        _tell(error.format_message(), f"`{page} --help` lists what there is")
        return error.exit_code
    except QmergeError as error:
        _trace()
        for fault in _faults(error):
            _tell(f"{fault.where}: {fault.message}" if fault.where else fault.message, fault.hint)
        return error.exit_code
    except Exception as error:
        _trace()
        _tell(f"{type(error).__name__}: {error}".partition("\n")[0], "QMERGE_DEBUG=1 shows where")
        return INTERNAL


def _faults(error: QmergeError) -> tuple[Fault, ...]:
    if isinstance(error, PlanError):
        return error.faults
    return (Fault(where="", message=error.message, hint=error.hint),)


def _tell(message: str, hint: str | None = None) -> None:
    with suppress(OSError):  # stderr may be what is full; the exit code says it too
        print(f"error: {_printable(message)}", file=sys.stderr, flush=True)
        if hint:
            print(f"hint: {_printable(hint)}", file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    """Names from damaged files may hold escape sequences, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _trace() -> None:
    if _debugging():
        traceback.print_exc()


def _debugging() -> bool:
    return os.environ.get("QMERGE_DEBUG") == "1"
