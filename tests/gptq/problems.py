"""Random problems whose Hessians look like those of a language model's linears."""

from __future__ import annotations

import torch
from torch import Tensor


def inputs(tokens: int, width: int, *, seed: int) -> Tensor:
    """Correlated inputs with a few loud columns, float64 [tokens, width]."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(width, generator=generator, dtype=torch.float64) * 3
    common = torch.randn(tokens, 4, generator=generator, dtype=torch.float64)
    mixing = torch.randn(4, width, generator=generator, dtype=torch.float64)
    own = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return own * loudness + common @ mixing


def second_moment(width: int, *, seed: int, tokens: int | None = None) -> Tensor:
    """XᵀX / N of such inputs."""
    X = inputs(tokens or 3 * width, width, seed=seed)
    return X.T @ X / len(X)


def weight(out: int, width: int, *, seed: int) -> Tensor:
    """A weight of the usual size, float64 [out, width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator, dtype=torch.float64) * 0.05
