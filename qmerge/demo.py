"""What `qmerge demo` works on: the folders shipped in the package, three texts, one recipe.

The texts come from the interpreter at hand, so that nothing but weights is shipped. The domain is
Python code of the standard library without its prose (comments and docstrings fall away when it is
parsed and written again); the general text is chapters of the language reference, which `pydoc`
carries. `scripts/train_demo` trains on neither EVALUATION_MODULES nor HELD_OUT_TOPICS.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

from qmerge.errors import CorpusError
from qmerge.recipe import Recipe

ASSETS = Path(__file__).parent / "demo_assets"
ORIGINAL = ASSETS / "original"
BASE = ASSETS / "base-gptq"
ADAPTER = ASSETS / "adapter"

SEQUENCE_LENGTH = 256
CALIBRATION_WINDOWS = 128
EVALUATION_WINDOWS = 64

# Python 3.11 to 3.14 have all of these, and each list is long enough for the windows above. The
# adapter was trained on CALIBRATION_MODULES, among others.
CALIBRATION_MODULES = ("argparse", "ast", "logging/__init__", "subprocess")
EVALUATION_MODULES = ("bdb", "calendar", "fractions", "gettext", "smtplib", "tempfile")
HELD_OUT_TOPICS = (
    "calls",
    "comparisons",
    "formatstrings",
    "import",
    "string-methods",
    "typesmapping",
)
_HINT = "the demo needs a Python whose standard library is installed with its sources"


def recipe(*, texts: Path, out: Path) -> Recipe:
    """The demo's job, for the texts that `write_texts` left in `texts`."""
    return Recipe(
        base=BASE,
        adapter=(str(ADAPTER),),
        original=ORIGINAL,
        out=out,
        strategy="auto",
        calibration=str(texts / "calibration.txt"),
        calibration_samples=CALIBRATION_WINDOWS,
        sequence_length=SEQUENCE_LENGTH,
        eval=(str(texts / "python-code.txt"), str(texts / "python-reference.txt")),
        eval_windows=EVALUATION_WINDOWS,
    )


def write_texts(texts: Path) -> None:
    """Write the three texts that `recipe` names; CorpusError where Python lacks its sources."""
    texts.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("calibration.txt", calibration_text()),
        ("python-code.txt", in_domain_text()),
        ("python-reference.txt", general_text()),
    ):
        (texts / name).write_text(text, encoding="utf-8", newline="\n")


def calibration_text() -> str:
    """Code of the domain, which the adapter was trained on."""
    return "\n\n".join(map(module_code, CALIBRATION_MODULES))


def in_domain_text() -> str:
    """Code of the domain that nothing was trained on."""
    return "\n\n".join(map(module_code, EVALUATION_MODULES))


def general_text() -> str:
    """Chapters of the language reference that nothing was trained on."""
    topics = reference_topics()
    return "\n\n".join(topics[name] for name in HELD_OUT_TOPICS)


def reference_topics() -> dict[str, str]:
    """The chapters of the language reference that `pydoc` prints, by name, in sorted order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusError("this Python has no pydoc_data.topics", hint=_HINT) from error
    return dict(sorted(topics.items()))


def module_code(name: str) -> str:
    """The code of a standard library module such as `logging/__init__`, without its prose."""
    code, _ = split_source(Path(sysconfig.get_path("stdlib"), f"{name}.py"))
    return code


def split_source(path: Path) -> tuple[str, list[str]]:
    """One source file as code without its docstrings, and these; CorpusError if unreadable."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise CorpusError(f"{path}: cannot be read as Python source", hint=_HINT) from error
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                docstrings.append(text)
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree), docstrings
