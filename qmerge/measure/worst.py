"""Where a model is farthest from the reference, as text that a person can read.

W: windows, S: tokens of a window, T = S - 1 targets: target t is token t + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qmerge.measure.tokens import TokenStats
from qmerge.results import Piece, WorstWindow

Decode = Callable[[Sequence[int]], str]
# Tokens of a passage that are shown together: a paragraph on a phone.
PASSAGE = 64
# A byte-level tokenizer shows an unfinished character so.
UNFINISHED = "\ufffd"


def worst_windows(
    subject: TokenStats,
    base: TokenStats,
    tokens_WS: Tensor,
    decode: Decode,
    *,
    count: int = 3,
) -> tuple[WorstWindow, ...]:
    """The `count` windows of largest mean KL, each with the passage where most of it lies."""
    assert subject.kl_R is not None, "worst windows need a reference"
    kl_WT = subject.kl_R.double().nan_to_num(0.0)
    lost_WT = subject.nll_R.double() - base.nll_R.double()
    order = kl_WT.mean(dim=1).argsort(descending=True, stable=True)[:count]
    return tuple(
        _window(int(w), kl_WT[w], lost_WT[w], tokens_WS[w].tolist(), decode) for w in order
    )


def _window(
    window: int, kl_T: Tensor, lost_T: Tensor, tokens: list[int], decode: Decode
) -> WorstWindow:
    start = _hottest(kl_T)
    stop = min(start + PASSAGE, len(kl_T))
    return WorstWindow(
        window=window,
        kl=float(kl_T.mean()),
        nll_change=float(lost_T.nanmean()),
        start=start,
        pieces=_pieces(
            tokens[start + 1 : stop + 1],
            kl_T[start:stop].tolist(),
            lost_T[start:stop].tolist(),
            decode,
        ),
    )


def _hottest(kl_T: Tensor) -> int:
    width = min(PASSAGE, len(kl_T))
    sums = torch.cat([kl_T.new_zeros(1), kl_T.cumsum(0)])
    return int((sums[width:] - sums[:-width]).argmax())


def _pieces(
    ids: list[int], kl: list[float], lost: list[float], decode: Decode
) -> tuple[Piece, ...]:
    """Text as it grows with each token; tokens that end inside a character wait for the rest."""
    pieces, shown, first = [], 0, 0
    for last in range(len(ids)):
        text = decode(ids[: last + 1])
        if text.endswith(UNFINISHED) and last + 1 < len(ids):
            continue
        span = slice(first, last + 1)
        piece = Piece(
            text=text[shown:], kl=_rounded(max(kl[span])), nll_change=_rounded(sum(lost[span]))
        )
        pieces.append(piece)
        shown, first = len(text), last + 1
    return tuple(pieces)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
