"""Text with images: rows of a jsonl file, in windows that hold each image whole.

A row names its images (`image` or `images`, paths relative to the file) beside its text or
messages; the model's own processor makes of both what the model takes.

S: tokens of a window, T: tokens of a row.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.corpus import Corpus, Role
from qmerge.documents import from_messages, jsonl_rows, split_column, usual_column
from qmerge.errors import CorpusError

COLUMNS = ("image", "images")
MARK = "<image>"
"""What stands for an image in a row's text; where there is none, the images come first."""
TOKENS = ("input_ids", "attention_mask")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a processor made of one row."""

    text: str
    tokens_T: Tensor
    along: Mapping[str, Tensor]
    """Other inputs with a value for each token, [T]."""
    images: Mapping[str, Tensor]
    """Inputs with a value for each image or piece of one; empty for a row without images."""
    last: int
    """Tokens up to the last one that stands for an image."""

    def cut(self, start: int, stop: int) -> Row:
        """Tokens [start, stop), with the images where they begin at the first one."""
        return replace(
            self,
            tokens_T=self.tokens_T[start:stop],
            along={name: value[start:stop] for name, value in self.along.items()},
            images={} if start else self.images,
        )


def image_rows(spec: str) -> list[Any] | None:
    """The rows of the jsonl file that `spec` names, if any of them names images."""
    file, _ = split_column(spec)
    if file.suffix != ".jsonl" or not file.is_file():
        return None
    try:
        rows = jsonl_rows(file)
    except (OSError, UnicodeDecodeError):
        return None  # the reader of plain text will say why
    return rows if any(isinstance(row, dict) and _paths(row) for row in rows) else None


def load_images(
    spec: str,
    rows: Iterable[Any],
    processor: Any,
    *,
    sequence_length: int,
    role: Role,
    name: str,
    windows: int,
    seed: int,
) -> Corpus:
    """Windows of the rows, drawn in an order that `seed` decides, until there are enough.

    A window holds whole images: what is left of it where the next row's images do not fit is
    filled with text from behind them. CorpusError names the row that cannot be read, or says that
    the rows do not fill one window.
    """
    file, column = split_column(spec)
    numbered = list(enumerate(rows, start=1))
    random.Random(seed).shuffle(numbered)
    read = (_read(f"{spec}: row {n}", row, column, file.parent, processor) for n, row in numbered)
    found = list(_windows(read, sequence_length, windows))
    if not found:
        raise CorpusError(
            f"{spec}: its rows do not fill one window of {sequence_length} tokens",
            hint="give more rows, or another --sequence-length: an image must fit into a window",
        )
    tokens_WS = torch.stack([torch.cat([part.tokens_T for part in parts]) for parts in found])
    inputs = tuple(_joined(parts) for parts in found)
    digest = hashlib.sha256(tokens_WS.numpy().astype("<i8").tobytes())
    for own in inputs:
        for key in sorted(own):
            digest.update(own[key].contiguous().numpy().tobytes())
    texts = "\n\n".join(part.text for parts in found for part in parts)
    return Corpus(
        name=name,
        source=spec,
        role=role,
        tokens=tokens_WS,
        documents=len(numbered),
        windows_available=len(found),
        sha256=digest.hexdigest(),
        text_sha256=hashlib.sha256(texts.encode("utf-8")).hexdigest(),
        licence=None,
        inputs=inputs,
    )


# From rows to windows.


def _windows(rows: Iterator[Row], length: int, count: int) -> Iterator[list[Row]]:
    waiting: deque[Row] = deque()
    for _ in range(count):
        parts: list[Row] = []
        room, later = length, []
        while room:
            row = waiting.popleft() if waiting else next(rows, None)
            if row is None:
                return
            fits = row.last <= room
            part = row.cut(0, room) if fits else row.cut(row.last, row.last + room)
            if not fits and row.last <= length:
                later.append(row)
            if len(part.tokens_T):
                parts.append(part)
                room -= len(part.tokens_T)
        waiting.extendleft(reversed(later))
        yield parts


def _joined(parts: list[Row]) -> dict[str, Tensor]:
    """One window's inputs beside its tokens: [1, S] where each token has a value."""
    joined = {
        name: torch.cat([part.along[name] for part in parts])[None] for name in parts[0].along
    }
    for name in dict.fromkeys(name for part in parts for name in part.images):
        joined[name] = torch.cat([part.images[name] for part in parts if part.images])
    return joined


# From a line to a row.


def _read(where: str, row: Any, column: str | None, folder: Path, processor: Any) -> Row:
    if not isinstance(row, dict):
        raise CorpusError(f"{where} is not an object with columns")
    paths = _paths(row)
    column = column or usual_column(where, [name for name in row if name not in COLUMNS])
    images = [_open(where, folder / path) for path in paths]
    text = _text(where, row.get(column), len(images), processor)
    try:
        made = processor(text=[text], images=images or None, return_tensors="pt")
    except Exception as error:  # whatever a model's own processor raises
        raise CorpusError(f"{where}: the processor refuses it: {error}") from error
    tokens_T = made["input_ids"][0]
    others = {name: value for name, value in made.items() if name not in TOKENS}
    along = {name: v[0] for name, v in others.items() if v.shape == made["input_ids"].shape}
    standing = torch.isin(tokens_T, torch.tensor(_image_tokens(processor))).nonzero()
    return Row(
        text=text,
        tokens_T=tokens_T,
        along=along,
        images={name: value for name, value in others.items() if name not in along},
        last=int(standing.max()) + 1 if len(standing) else 0,
    )


def _paths(row: Mapping[str, Any]) -> list[str]:
    named = [row[column] for column in COLUMNS if row.get(column)]
    return [str(p) for each in named for p in (each if isinstance(each, list) else [each])]


def _open(where: str, path: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError) as error:
        raise CorpusError(f"{where}: {path} is no image that can be read: {error}") from error


def _image_tokens(processor: Any) -> list[int]:
    return [token for token in processor.image_token_ids if token is not None]


def _text(where: str, value: Any, images: int, processor: Any) -> str:
    if isinstance(value, str):
        marked = value if MARK in value else MARK * images + value
        _check_marks(where, marked.count(MARK), images)
        return marked.replace(MARK, processor.image_token)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise CorpusError(f"{where}: neither a text nor a list of messages")
    messages = [{**message, "content": _content(message.get("content"))} for message in value]
    marks = sum(part.get("type") == "image" for m in messages for part in m["content"])
    if not marks:
        first = next((m for m in messages if m.get("role") == "user"), messages[0])
        first["content"] = [{"type": "image"}] * images + first["content"]
    _check_marks(where, marks or images, images)
    text = from_messages(where, messages, processor)
    return text.removeprefix(getattr(processor.tokenizer, "bos_token", None) or "")


def _content(content: Any) -> list[dict[str, Any]]:
    """A message's content in the parts that templates of such models expect."""
    if isinstance(content, list):
        return [dict(part) for part in content]
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(str(content or "").split(MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _check_marks(where: str, marks: int, images: int) -> None:
    if marks != images:
        raise CorpusError(f"{where}: has {images} images and {marks} places for them")
