from __future__ import annotations

from collections.abc import Sequence

import torch

from qmerge.measure.tokens import TokenStats
from qmerge.measure.worst import PASSAGE, worst_windows

W, S = 5, 200


def made(kl: torch.Tensor, nll: torch.Tensor) -> TokenStats:
    return TokenStats(
        nll_R=nll,
        scored_R=torch.ones_like(nll, dtype=torch.bool),
        probability_R=(-nll).exp(),
        confidence_R=(-nll).exp(),
        kl_R=kl,
        same_top_R=torch.ones_like(nll, dtype=torch.bool),
    )


def test_the_worst_window_and_its_hot_tokens_are_found() -> None:
    tokens = torch.arange(W * S).view(W, S)
    kl = torch.full((W, S - 1), 0.01)
    kl[3, 120:130] = 4.0  # the reference's guess at tokens 121 to 130
    base = torch.full((W, S - 1), 2.0)
    nll = base.clone()
    nll[3, 120] += 1.5
    words = worst_windows(made(kl, nll), made(torch.zeros_like(kl), base), tokens, _words, count=2)
    first = words[0]
    assert first.window == 3
    assert first.kl > words[1].kl
    assert len(first.pieces) == PASSAGE
    hot = [piece.text.strip() for piece in first.pieces if piece.kl and piece.kl > 1]
    assert hot == [str(3 * S + t) for t in range(121, 131)]
    lost = next(piece for piece in first.pieces if piece.text.strip() == str(3 * S + 121))
    assert lost.nll_change == 1.5
    assert abs(first.nll_change - 1.5 / (S - 1)) < 1e-6


def test_short_windows_are_shown_whole() -> None:
    kl = torch.rand(2, 7)
    found = worst_windows(
        made(kl, kl + 1), made(kl, kl), torch.arange(16).view(2, 8), _words, count=5
    )
    assert len(found) == 2
    assert all(len(window.pieces) == 7 and window.start == 0 for window in found)


def test_tokens_inside_one_character_are_one_piece() -> None:
    data = "é中🙂".encode()
    tokens = torch.tensor([[32, *data]])
    kl = torch.arange(1.0, len(data) + 1)[None]

    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    found = worst_windows(made(kl, kl), made(kl, kl), tokens, decode)[0]
    assert [piece.text for piece in found.pieces] == ["é", "中", "🙂"]
    assert [piece.kl for piece in found.pieces] == [2, 5, 9]


def _words(ids: Sequence[int]) -> str:
    return "".join(f" {i}" for i in ids)
