from __future__ import annotations

import pytest
import torch

from qmerge.gptq import Hessian, output_squares
from tests.gptq.problems import inputs


@pytest.mark.parametrize("width", [5, 256, 300, 513])
def test_equals_the_plain_product(width: int) -> None:
    X = inputs(40, width, seed=1)
    hessian = Hessian(width, dtype=torch.float64)
    hessian.add(X[:24].reshape(2, 12, width))
    hessian.add(X[24:])
    H = hessian.mean()
    torch.testing.assert_close(H, X.T @ X / 40, rtol=1e-12, atol=1e-12)
    assert torch.equal(H, H.T)
    assert hessian.tokens == 40


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_is_left_out_and_counted(poison: float) -> None:
    X = inputs(30, 20, seed=3)
    poisoned = X.clone()
    poisoned[4, 2] = poison
    poisoned[9, 7] = -poison
    hessian = Hessian(20, dtype=torch.float64)
    hessian.add(poisoned)
    kept = torch.cat([X[:4], X[5:9], X[10:]])
    torch.testing.assert_close(hessian.mean(), kept.T @ kept / 28, rtol=1e-12, atol=1e-12)
    assert (hessian.tokens, hessian.dropped) == (28, 2)


def test_sixteen_bit_inputs_are_summed_in_full_precision() -> None:
    X = inputs(500, 16, seed=4).bfloat16()
    hessian = Hessian(16)
    hessian.add(X)
    wanted = X.double().T @ X.double() / 500
    torch.testing.assert_close(hessian.mean().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [5, 256, 300, 513])
def test_output_squares_equal_the_naive_sum(width: int) -> None:
    X, W = inputs(40, width, seed=5), inputs(7, width, seed=6)
    wanted = (X @ W.T).square().mean(0)
    found = output_squares(W, X.T @ X / 40)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
