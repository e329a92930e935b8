"""Where figures come from: inputs with their digests, texts and versions."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmerge.corpus import Corpus
from qmerge.recipe import Scoring
from qmerge.results import CorpusRecord, InputRecord
from qmerge.storage.shards import sha256_file

PACKAGES = ("torch", "transformers", "peft", "safetensors", "accelerate", "bitsandbytes")
CARD = "README.md"
TEMPLATES = "additional_chat_templates"


def folder_record(path: Path, **facts: Any) -> InputRecord:
    """A folder with the digest of each of its files, a tokenizer's further templates among them,
    and what the hub calls it where that can be known."""
    entries = sorted((*path.iterdir(), *path.glob(f"{TEMPLATES}/*")))
    files = [entry for entry in entries if entry.is_file() and entry.name[0] != "."]
    return InputRecord(
        path=str(path),
        bytes=sum(entry.stat().st_size for entry in files),
        files={entry.relative_to(path).as_posix(): sha256_file(entry) for entry in files},
        model=hub_name(path),
        license=license_of(path),
        details=_own_licence(path),
        **facts,
    )


def hub_name(folder: Path) -> str | None:
    """ORG/NAME where the folder lies in the hub's cache: models--ORG--NAME/snapshots/REVISION."""
    match = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", f"{folder.resolve().as_posix()}/")
    return f"{match[1]}/{match[2]}" if match else None


def file_record(path: Path, *beside: Path) -> InputRecord:
    """One file with its digest, and those that were taken from its folder."""
    files = {each.name: sha256_file(each) for each in (path, *beside)}
    return InputRecord(path=str(path), bytes=path.stat().st_size, files=files)


def license_of(folder: Path) -> str | None:
    """What the front matter of a model card calls the licence."""
    found = front_matter(folder).get("license")
    return found if isinstance(found, str) else None


def _own_licence(folder: Path) -> dict[str, str]:
    """Name and link that the hub wants of a licence it does not know (`license: other`)."""
    front = front_matter(folder)
    keys = ("license_name", "license_link")
    return {key: front[key] for key in keys if isinstance(front.get(key), str)}


def front_matter(folder: Path) -> Mapping[str, Any]:
    """The YAML at the head of a folder's model card; empty where there is none to read."""
    import yaml

    card = folder / CARD
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, Mapping) else {}


def corpus_record(corpus: Corpus, seed: int | None = None) -> CorpusRecord:
    """A text as it was used."""
    windows, length = corpus.tokens.shape
    return CorpusRecord(
        name=corpus.name,
        source=corpus.source,
        role=corpus.role,
        windows=windows,
        sequence_length=length,
        tokens=windows * length,
        documents=corpus.documents,
        sha256=corpus.sha256,
        text_sha256=corpus.text_sha256,
        seed=seed,
        license=corpus.licence,
    )


def plain_recipe(recipe: Scoring) -> dict[str, Any]:
    """The effective recipe as plain values, by key."""
    import yaml

    return dict(yaml.safe_load(recipe.to_yaml()))


def versions() -> dict[str, str]:
    """Versions of what a run's figures depend on."""
    found = {"python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in PACKAGES}
