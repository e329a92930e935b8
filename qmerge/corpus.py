"""Text for calibration and evaluation, cut into windows of tokens.

Shapes: W windows, S tokens in a window, T tokens of a whole text, P positions in a window.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from qmerge.documents import read_documents
from qmerge.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["calibration", "in_domain", "general"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """A text cut into windows.

    `tokens` is int64 [W, S]. `sha256` is of its bytes as little-endian int64, `text_sha256` of
    the whole joined text in UTF-8, and `windows_available` counts the windows of that whole text.
    """

    name: str
    source: str
    role: Role
    tokens: Tensor
    documents: int
    windows_available: int
    sha256: str
    text_sha256: str
    licence: str | None
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    """What a model takes beside each window's tokens, where the text has images."""


def load_corpus(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    role: Role,
    name: str,
    windows: int | None = None,
    seed: int = 0,
) -> Corpus:
    """Windows of the text that `spec` names (calibration/README.md), at most `windows` of them.

    Evaluation takes the first ones, as the published perplexity protocol does; calibration draws
    with `seed` without replacement, in the order of the text. CorpusError if the text cannot be
    had or does not fill one window.
    """
    documents, licence = read_documents(spec, tokenizer)
    text = "\n\n".join(documents)
    text_sha256 = _sha256_of_text(text, spec)
    all_WS = _cut(_tokenize(text, tokenizer), sequence_length, spec)
    tokens_WS = _choose(all_WS, windows, seed if role == "calibration" else None)
    return Corpus(
        name=name,
        source=spec,
        role=role,
        tokens=tokens_WS,
        documents=len(documents),
        windows_available=len(all_WS),
        sha256=hashlib.sha256(tokens_WS.numpy().astype("<i8").tobytes()).hexdigest(),
        text_sha256=text_sha256,
        licence=licence,
    )


def overlap(calibration: Corpus, evaluation: Corpus, *, width: int = 64) -> float:
    """Share of the evaluation's tokens that stand, `width` in a row, in the calibration windows.

    The evaluation is looked up in blocks of `width` from the start of each window, so every shared
    run of at least `2 * width - 1` tokens inside a window is found.
    """
    width = min(width, calibration.tokens.shape[1], evaluation.tokens.shape[1])
    known = _fingerprints(calibration.tokens, width, step=1)
    asked = _fingerprints(evaluation.tokens, width, step=width)
    return torch.isin(asked, known).double().mean().item()


def _sha256_of_text(text: str, spec: str) -> str:
    try:
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{spec}: holds half of a surrogate pair, which is no text") from error


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """int64 [T] of the whole text; `verbose` would warn that it is longer than the model takes."""
    encode: Callable[..., Any] = tokenizer
    ids: list[int] = encode(text, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the text began with one of its own
        ids = ids[1:]
    return torch.tensor(ids, dtype=torch.int64)


def _cut(tokens_T: Tensor, sequence_length: int, spec: str) -> Tensor:
    """[W, S] without overlap; the tail is dropped."""
    count = len(tokens_T) // sequence_length
    if count == 0:
        raise CorpusError(
            f"{spec}: {len(tokens_T)} tokens do not fill one window of {sequence_length}",
            hint="give a longer text or a smaller --sequence-length",
        )
    return tokens_T[: count * sequence_length].view(count, sequence_length)


def _choose(all_WS: Tensor, windows: int | None, seed: int | None) -> Tensor:
    """The first `windows`, or with a seed that many drawn ones."""
    if windows is None or windows >= len(all_WS):
        return all_WS
    if seed is None:
        return all_WS[:windows].clone()
    # Python's own generator: its draws are the same on every platform and version of torch.
    drawn = sorted(random.Random(seed).sample(range(len(all_WS)), windows))
    return all_WS[drawn]


def _fingerprints(tokens_WS: Tensor, width: int, *, step: int) -> Tensor:
    """A 64-bit hash of every run of `width` tokens that starts at a multiple of `step`.

    Multilinear with fixed odd factors modulo 2⁶⁴ (integer arithmetic in torch wraps around).
    """
    generator = random.Random(width)
    hashes_WP = torch.zeros(len(tokens_WS), (tokens_WS.shape[1] - width) // step + 1).long()
    last = tokens_WS.shape[1] - width + 1
    for offset in range(width):
        factor = generator.getrandbits(63) | 1
        hashes_WP += tokens_WS[:, offset : offset + last : step] * factor
    return hashes_WP.flatten()
