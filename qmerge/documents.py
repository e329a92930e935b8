"""From what the user names to documents: files, recipes of `calibration/`, datasets of the hub."""

from __future__ import annotations

import importlib
import json
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmerge.errors import CorpusError
from qmerge.specs import expanded, is_there

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB = re.compile(
    r"hub:(?P<org>[^/@]+)/(?P<dataset>[^/@]+)(?:@(?P<revision>[^:]+))?"
    r"/(?P<config>[^/]+)/(?P<split>(?:[^/:\[\]]|\[[^\]]*\])+)(?::(?P<column>.+))?"
)
_HUB_HINT = "hub:ORG/NAME[@REV]/CONFIG/SPLIT[:COLUMN], with CONFIG default where there is only one"
_OFFLINE_HINT = "without the network, give a local file or the recipe pydoc"
_USUAL_COLUMNS = ("text", "messages")
_FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
_PYDOC = "pydoc_data.topics"
THOUGHTS = re.compile(r"<think>(.*?)</think>", re.DOTALL)
TAGS = {"<think>": "\ufdd0", "</think>": "\ufdd1"}
"""What stands for the tags where a template must not see them: characters that no text has."""


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """A file of `calibration/`; its README explains the keys."""

    description: str
    source: str
    split: str
    licence: str
    config: str | None = None
    column: str | None = None
    template: str | None = None
    data_files: str | None = None


def check_spec(spec: str) -> None:
    """What can be seen of a text without a tokenizer; CorpusError as `load_corpus` has it."""
    if spec in text_recipes():
        read_text_recipe(spec)
    elif spec.startswith("hub:"):
        _hub_name(spec)
    else:
        file, column = split_column(spec)
        rows = _file_rows(spec, file, column)
        if not isinstance(rows, str):
            deque(_cells(spec, rows, column), maxlen=0)


def text_recipes() -> dict[str, Path]:
    """The named texts and their files: in the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    folder = next(
        (place for place in (here / "calibration", here.parent / "calibration") if place.is_dir()),
        here,
    )
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read_text_recipe(name: str) -> TextRecipe:
    """The recipe `name`; CorpusError if its file does not hold one."""
    import yaml

    file = text_recipes()[name]
    try:
        return TextRecipe(**yaml.safe_load(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise CorpusError(f"{file}: not a text recipe: {error}") from error


def read_documents(spec: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], str | None]:
    """The documents and, where it is known, their licence."""
    if spec in text_recipes():
        recipe = read_text_recipe(spec)
        return _from_recipe(spec, recipe, tokenizer), recipe.licence
    if spec.startswith("hub:"):
        match = _hub_name(spec)
        path = f"{match['org']}/{match['dataset']}"
        rows = _from_hub(spec, path, match["config"], match["split"], match["revision"], None)
        return _from_rows(spec, rows, match["column"], tokenizer), None
    file, column = split_column(spec)
    return _from_file(spec, file, column, tokenizer), None


def _hub_name(spec: str) -> re.Match[str]:
    match = _HUB.fullmatch(spec)
    if match is None:
        raise CorpusError(f"{spec}: not the name of a dataset", hint=_HUB_HINT)
    return match


def split_column(spec: str) -> tuple[Path, str | None]:
    """FILE[:COLUMN]."""
    path, colon, column = spec.rpartition(":")
    if not colon or Path(path).suffix not in _FILE_SUFFIXES or is_there(spec):
        return expanded(spec), None
    return expanded(path), column


def _from_file(
    spec: str, file: Path, column: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    found = _file_rows(spec, file, column)
    return [found] if isinstance(found, str) else _from_rows(spec, found, column, tokenizer)


def _file_rows(spec: str, file: Path, column: str | None) -> str | list[Any]:
    """The text of a file that is nothing else, the rows of another."""
    if file.suffix not in _FILE_SUFFIXES:
        raise CorpusError(
            f"{spec}: neither a recipe nor a {', '.join(_FILE_SUFFIXES)} file",
            hint=_recipes_hint(),
        )
    if not is_there(str(file)):
        raise CorpusError(f"{file}: no such file", hint=f"look at the path; {_recipes_hint()}")
    try:
        if file.suffix == ".txt":
            if column is not None:
                raise CorpusError(f"{spec}: a text file has no column {column!r}")
            return file.read_text("utf-8-sig")
        return jsonl_rows(file) if file.suffix == ".jsonl" else _parquet_rows(file)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{file}: cannot be read: {error}",
            hint="save it in UTF-8; `iconv -f LATIN1 -t UTF-8` makes it of Latin-1",
        ) from error
    except OSError as error:
        raise CorpusError(f"{file}: cannot be read: {error}") from error


def _recipes_hint() -> str:
    return f"recipes are {', '.join(text_recipes())}"


def jsonl_rows(file: Path) -> list[Any]:
    """What each line holds; CorpusError names the line that is no JSON."""
    rows = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise CorpusError(f"{file}: line {number} is not JSON: {error}") from error
    return rows


def _parquet_rows(file: Path) -> list[Any]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows: list[Any] = pyarrow.parquet.ParquetFile(file).read().to_pylist()
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{file}: not a parquet file: {error}") from error
    return rows


def _from_recipe(name: str, recipe: TextRecipe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if recipe.source == _PYDOC:
        return _pydoc(recipe.split)
    path, _, revision = recipe.source.removeprefix("hub:").partition("@")
    rows = _from_hub(name, path, recipe.config, recipe.split, revision or None, recipe.data_files)
    if recipe.template is None:
        return _from_rows(name, rows, recipe.column, tokenizer)
    try:
        return [recipe.template.format_map(row) for row in rows]
    except KeyError as error:
        raise CorpusError(f"{name}: the dataset has no column {error}") from error


def _from_hub(
    spec: str,
    path: str,
    config: str | None,
    split: str,
    revision: str | None,
    data_files: str | None,
) -> Iterable[Any]:
    import datasets

    try:
        rows: Iterable[Any] = datasets.load_dataset(
            path, config, split=split, revision=revision, data_files=data_files
        )
    except Exception as error:  # the network, the cache, the hub and the builders raise all kinds
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise CorpusError(f"{spec}: {reason}", hint=_OFFLINE_HINT) from error
    return rows


def _from_rows(
    spec: str, rows: Iterable[Any], column: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """One document a row; empty ones count too, as published perplexities have them."""
    return [
        _document(where, value, name, tokenizer)
        for where, value, name in _cells(spec, rows, column)
    ]


def _cells(spec: str, rows: Iterable[Any], column: str | None) -> Iterator[tuple[str, Any, str]]:
    """Where each row stands, what its column holds, and how that is called."""
    for number, row in enumerate(rows, start=1):
        where = f"{spec}: row {number}"
        if not isinstance(row, dict):
            raise CorpusError(f"{where} is not an object with columns")
        if column is None:
            column = usual_column(where, list(row))
        if column not in row:
            raise CorpusError(f"{where} has no column {column!r}", hint=columns_hint(list(row)))
        yield where, row[column], column


def usual_column(where: str, columns: list[str]) -> str:
    """`text` or `messages` or the only one; CorpusError where that leaves a choice."""
    for usual in _USUAL_COLUMNS:
        if usual in columns:
            return usual
    if len(columns) != 1:
        raise CorpusError(f"{where}: which column is the text?", hint=columns_hint(columns))
    return columns[0]


def columns_hint(columns: list[str]) -> str:
    return f"give it as SPEC:COLUMN; there is {', '.join(columns) or 'none'}"


def _document(where: str, value: Any, column: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise CorpusError(f"{where}: column {column!r} is neither a text nor a list of messages")
    if not getattr(tokenizer, "chat_template", None):
        raise CorpusError(
            f"{where}: holds messages, and the tokenizer has no chat template",
            hint="give text, or add the chat template that training used to the base's folder",
        )
    document = from_messages(where, value, tokenizer)
    # Templates spell out the start token that the tokenizer will put before the whole text.
    return document.removeprefix(tokenizer.bos_token or "")


def from_messages(where: str, messages: list[dict[str, Any]], templated: Any) -> str:
    """Messages through the chat template of a tokenizer or processor.

    Templates for talking drop what a model thought before it answered. Training saw it, so where
    the last answer's thoughts are gone the tags are hidden from the template.
    """
    thoughts = THOUGHTS.findall(json.dumps(messages[-1:], ensure_ascii=False))
    document = _templated(where, messages, templated)
    if all(json.loads(f'"{thought}"') in document for thought in thoughts):
        return document
    hidden = json.loads(_retagged(json.dumps(messages, ensure_ascii=False), TAGS))
    shown = {mark: tag for tag, mark in TAGS.items()}
    return _retagged(_templated(where, hidden, templated), shown)


def _retagged(text: str, tags: Mapping[str, str]) -> str:
    for tag, mark in tags.items():
        text = text.replace(tag, mark)
    return text


def _templated(where: str, messages: list[dict[str, Any]], templated: Any) -> str:
    try:
        document = templated.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program and may raise anything
        raise CorpusError(f"{where}: the chat template refuses it: {error}") from error
    assert isinstance(document, str)
    return document


def _pydoc(split: str) -> list[str]:
    """Chapters of the language reference; about a fifth of the text is held out for evaluation.

    The chapters quote one another at length, so a paragraph goes to the first chapter that has it,
    evaluation before calibration.
    """
    try:
        topics: dict[str, str] = importlib.import_module(_PYDOC).topics
    except ImportError as error:
        raise CorpusError(
            f"this Python was installed without {_PYDOC}", hint="give a text file"
        ) from error
    held_out = [name for name in sorted(topics) if _is_held_out(name)]
    others = [name for name in sorted(topics) if not _is_held_out(name)]
    seen: set[str] = set()
    parts = {
        part: _new_paragraphs([topics[name] for name in names], seen)
        for part, names in (("evaluation", held_out), ("calibration", others))
    }
    return parts[split]


def _is_held_out(topic: str) -> bool:
    """By name alone, so that a topic stays on its side when another version of Python adds some."""
    return zlib.crc32(topic.encode()) % 3 == 0


def _new_paragraphs(chapters: Iterable[str], seen: set[str]) -> list[str]:
    documents = []
    for chapter in chapters:
        new = []
        for paragraph in chapter.split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                new.append(paragraph)
            seen.add(words)
        documents.append("\n\n".join(new).strip())
    return [document for document in documents if document]
