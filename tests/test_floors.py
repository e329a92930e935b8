"""A module imports from lower floors only; inside a package, a file from those listed before it.

The two tables are the architecture. Whoever adds a file says here where it stands.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "qmerge"


@dataclass(frozen=True, kw_only=True)
class Floor:
    """`ladder`: a module of this floor may import those before it in its row.
    `sees`: the only floors it may import from, where that is not all the lower ones."""

    name: str
    modules: tuple[str, ...]
    ladder: bool = False
    sees: tuple[str, ...] | None = None


FLOORS = (
    Floor(
        name="words",
        modules=("errors", "names", "options", "specs", "recipe", "results", "progress", "meter"),
        ladder=True,
    ),
    Floor(name="bytes", modules=("storage", "heap", "precision")),
    Floor(name="tensors", modules=("formats", "adapters", "gptq")),
    Floor(name="measures", modules=("measure",)),
    Floor(name="models", modules=("documents", "corpus", "model"), ladder=True),
    Floor(
        name="intent",
        modules=(
            "job",
            "provenance",
            "workspace",
            "images",
            "texts",
            "machine",
            "estimate",
            "training",
            "tuning",
            "grids",
            "plan",
        ),
        ladder=True,
    ),
    Floor(name="work", modules=("stages",)),
    Floor(name="telling", modules=("report",), sees=("words",)),
    Floor(
        name="conduct",
        modules=(
            "release",
            "walk",
            "pipeline",
            "inspect",
            "reread",
            "evaluate",
            "compare",
            "export",
            "demo",
            "verify",
        ),
        ladder=True,
    ),
    Floor(name="door", modules=("cli", "__main__"), ladder=True),
)

# A package's __init__ comes after all its files, and none of them imports it.
FILES = {
    "storage": ("files", "headers", "pickled", "checkpoint", "shards", "journal"),
    "formats": (
        "settings",
        "checks",
        "integer",
        "base",
        "packing",
        "dense",
        "gptq",
        "awq",
        "bitsandbytes",
        "fp8",
        "mxfp4",
        "schemes",
        "compressed_tensors",
        "writing",
        "simulated",
        "padded",
        "stacked",
    ),
    "adapters": (
        "kinds",
        "spelling",
        "source",
        "unit",
        "rowwise",
        "landing",
        "injection",
        "probe",
        "retarget",
        "inject",
        "overlay",
        "chain",
        "combine",
    ),
    "gptq": ("grid", "factor", "hessian", "target", "solver", "refine", "update"),
    "measure": ("tokens", "statistics", "pairing", "survival", "remedy", "worst", "gate"),
    "model": (
        "experts",
        "skeleton",
        "changed",
        "layer",
        "paused",
        "residual",
        "frame",
        "probe",
        "weights",
        "opening",
        "reshape",
        "streams",
    ),
    "stages": ("substitute", "evaluate", "merge", "remedies", "requantize", "head"),
    "walk": ("ground", "notes", "arms", "live", "ledger", "releases"),
    "report": (
        "figures",
        "verdict",
        "lines",
        "glossary",
        "text",
        "json",
        "markdown",
        "plots",
        "html",
        "card",
        "plan",
        "checks",
        "junit",
        "github",
    ),
    "verify": ("findings", "files", "weights", "loaders", "loaded", "loading", "proof"),
    "cli": (
        "options",
        "progress",
        "outputs",
        "export",
        "dequantize",
        "merge",
        "quantize",
        "run",
        "plan",
        "inspect",
        "evaluate",
        "compare",
        "report",
        "verify",
        "demo",
    ),
}

LEVEL = {module: level for level, floor in enumerate(FLOORS) for module in floor.modules}


def name_of(file: Path) -> str:
    """qmerge/formats/gptq.py → formats.gptq, qmerge/formats/__init__.py → formats."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in sorted(ROOT.rglob("*.py")) if file.parent != ROOT}
MODULES |= {file.stem: file for file in sorted(ROOT.glob("*.py")) if file.stem != "__init__"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that are imported anywhere in a file, functions and type checks included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                is_module = deeper.removeprefix("qmerge.") in MODULES
                yield deeper if is_module else str(node.module)


def is_allowed(importer: str, imported: str) -> bool:
    """Both as in MODULES."""
    package, _, file = importer.partition(".")
    other, _, other_file = imported.partition(".")
    if package == other:
        order = [*FILES.get(package, ()), ""]
        listed = other_file in order and file in order
        return listed and order.index(other_file) < order.index(file)
    floor, lower = FLOORS[LEVEL[package]], FLOORS[LEVEL[other]]
    if floor is lower:
        return floor.ladder and floor.modules.index(other) < floor.modules.index(package)
    below = LEVEL[other] < LEVEL[package]
    return below and (floor.sees is None or lower.name in floor.sees)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    ours = {name.removeprefix("qmerge.") for name in imports(tree) if name.startswith("qmerge.")}
    wrong = sorted(name for name in ours if not is_allowed(module, name))
    assert not wrong, f"{module} stands below or beside what it imports: {', '.join(wrong)}"


def test_every_file_has_its_place() -> None:
    listed = {module for module in LEVEL if module not in FILES}
    listed |= {f"{package}.{file}" for package, files in FILES.items() for file in files}
    present = {name for name, file in MODULES.items() if file.stem != "__init__"}
    assert present - listed == set(), "not in the tables"
    assert listed - present == set(), "in the tables, and gone"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("formats.gptq", "adapters.inject"),  # beside
        ("storage.checkpoint", "formats.base"),  # above
        ("formats.base", "formats.dense"),  # listed later
        ("formats.base", "formats"),  # its own package
        ("report.text", "measure.tokens"),  # lower, but telling sees words alone
        ("errors", "names"),  # up the ladder
    ],
)
def test_the_rule_refuses(importer: str, imported: str) -> None:
    assert not is_allowed(importer, imported)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("recipe", "errors"), ("formats.dense", "formats.base"), ("formats", "formats.gptq")],
)
def test_the_rule_allows(importer: str, imported: str) -> None:
    assert is_allowed(importer, imported)
