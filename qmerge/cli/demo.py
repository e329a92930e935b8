"""qmerge demo: the main job on what the package carries."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from qmerge.cli.options import Command, json_option
from qmerge.cli.progress import display
from qmerge.errors import RecipeError

FOLDER = Path("qmerge-demo")
MARK = ".made-by-qmerge-demo"  # what tells the demo's own folder from a user's


@click.command("demo", cls=Command)
@json_option
def command(as_json: bool) -> None:
    """The main job on a small model that comes with qmerge.

    Merges a LoRA adapter into a GPTQ base in both ways, publishes the better one, and leaves
    release, report and texts in ./qmerge-demo/, which a later demo replaces.
    """
    make_room(FOLDER)

    with display() as progress:
        from qmerge import demo
        from qmerge.pipeline import run

        texts = FOLDER / "texts"
        demo.write_texts(texts)
        result = run(demo.recipe(texts=texts, out=FOLDER / "release"), progress)

    from qmerge.report import render

    click.echo(render(result, "json" if as_json else "text").rstrip())


def make_room(folder: Path) -> None:
    """An empty folder with the mark; RecipeError where something else than a demo lies there."""
    if folder.is_symlink() or (folder.exists() and not (folder / MARK).is_file()):
        raise RecipeError(
            f"{folder} exists and was not made by qmerge demo",
            hint="run the demo in another folder, or move that one away",
        )
    from qmerge.storage.shards import translated

    with translated(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        (folder / MARK).touch()
