"""The border: every error becomes words on stderr and an exit code; help costs nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from qmerge import __version__, cli
from qmerge.errors import CheckpointError, Fault, PlanError, StorageError

HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "yaml", "rich")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom qmerge.cli import status\n"
        "for words in (['--help'], *([name, '--help'] for name in sys.argv[2:])):\n"
        "    assert status(words) == 0\n"
        "sys.exit(', '.join(set(sys.argv[1].split()) & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, " ".join(HEAVY), *cli.COMMANDS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip() == ""
    assert "qmerge run" in done.stdout
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.status(["--version"]) == 0
    assert capsys.readouterr().out == f"qmerge {__version__}\n"


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "qmerge", "verify", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds no qmerge_report.json\nhint: " in done.stderr


def test_streams_that_are_closed_take_nothing_else(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom qmerge import cli\n"
        "def status(arguments):\n"
        "    file = os.open('file', os.O_CREAT | os.O_WRONLY)\n"
        "    print('said'), print('told', file=sys.stderr)\n"
        "    return 7 if file > 2 and sys.stderr.isatty() is False else 8\n"
        "cli.status = status\ncli.main()"
    )
    words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script]
    assert subprocess.run(words, cwd=tmp_path, check=False).returncode == 7
    assert (tmp_path / "file").read_bytes() == b""


def test_an_error_that_cannot_be_told_is_still_an_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "qmerge", "verify", "nowhere"]
        assert subprocess.run(words, stderr=full, check=False).returncode == 2


@pytest.mark.parametrize(("before", "code"), [("SIG_DFL", cli.INTERRUPTED), ("SIG_IGN", 0)])
def test_the_end_of_a_terminal_ends_a_command_in_order(before: str, code: int) -> None:
    """But for one that nohup keeps."""
    script = (
        f"import signal\nsignal.signal(signal.SIGHUP, signal.{before})\nfrom qmerge import cli\n"
        "cli.group.main = lambda *_, **__: signal.raise_signal(signal.SIGHUP)\ncli.main()"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == code


def test_libraries_say_nothing_while_they_are_imported(
    tiny_gptq: Path, tiny_adapter: Path, eval_text: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "qmerge", "plan", "--base", str(tiny_gptq)]
    words += ["--adapter", str(tiny_adapter), "--out", str(tmp_path / "release")]
    words += ["--eval", str(eval_text), "--eval-windows", "2", "--sequence-length", "64"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "reads " in done.stdout


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["rum"], "error: No such command 'rum'", "`qmerge --help`"),
        (["run", "--bse", "x"], "error: No such option '--bse'", "`qmerge run --help`"),
        (["run", "--base"], "error: Option '--base' requires an argument", "--help`"),
        (["run", "--base", "b"], "error: missing: --out", "recipe file"),
        (["run", "--bits", "5"], "error: --bits: '5' is not one of 2, 3, 4, 8", None),
        (["run", "gone.yaml"], "error: gone.yaml: cannot be read", None),
        (["evaluate"], "error: Missing argument", "`qmerge evaluate --help`"),
    ],
)
def test_bad_words_are_exit_code_2(
    words: list[str], error: str, hint: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.status(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(error)
    assert hint is None or hint in told.err.splitlines()[-1]
    assert len(told.err.splitlines()) <= 2


def test_no_words_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.status([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """The exit code of a command that ends by raising."""

    def ends(error: BaseException) -> int:
        def fail() -> None:
            raise error

        command = click.Command("fail", callback=fail)
        monkeypatch.setattr(cli.Lazy, "get_command", lambda *_: command)
        return cli.status(["fail"])

    return ends


def test_our_errors_have_their_exit_codes(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(CheckpointError("x.safetensors: truncated", hint="fetch it again")) == 2
    assert capsys.readouterr().err == "error: x.safetensors: truncated\nhint: fetch it again\n"
    assert raising(StorageError("disk full")) == 3


def test_all_faults_of_a_plan_are_told_each_with_its_hint(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    faults = [
        Fault(where="--out", message="exists", hint="name another"),
        Fault(where="lora_A", message="left over"),
    ]
    assert raising(PlanError(faults)) == 2
    assert capsys.readouterr().err == (
        "error: --out: exists\nhint: name another\nerror: lora_A: left over\n"
    )


def test_a_fault_of_ours_is_one_line(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(ZeroDivisionError("first\nsecond")) == 3
    assert capsys.readouterr().err == (
        "error: ZeroDivisionError: first\nhint: QMERGE_DEBUG=1 shows where\n"
    )


def test_debugging_shows_where(
    raising: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QMERGE_DEBUG", "1")
    assert raising(ZeroDivisionError("x")) == 3
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


def test_names_from_files_cannot_write_to_the_terminal(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    raising(CheckpointError("tensor \x1b[2J\r\u202eé"))
    (line, *_) = capsys.readouterr().err.splitlines()
    assert line == "error: tensor \\x1b[2J\\r\\u202eé"
