"""Products on matrix units: what goes in is rounded, what comes out is not, and nothing is lost."""

from __future__ import annotations

import pytest
import torch

from qmerge import precision
from qmerge.gptq import GridSpec, Hessian, solve_update
from qmerge.precision import reduced_precision
from tests.gptq.problems import inputs, weight

MATMUL = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
TOKENS, WIDTH = 4096, 320


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AMX; one that has no bf16 at all computes in float32 all the same."""
    monkeypatch.setattr(precision, "_backends", lambda: {"cpu": (MATMUL, "bf16")})


def gathered(X: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(WIDTH)
    with reduced_precision():
        hessian.add(X)
    return hessian.mean()


def test_the_precision_is_what_it_was_afterwards() -> None:
    before = MATMUL.fp32_precision
    with reduced_precision():
        assert MATMUL.fp32_precision == "bf16"
        with reduced_precision():
            pass
        assert MATMUL.fp32_precision == "bf16"
    assert MATMUL.fp32_precision == before
    with pytest.raises(KeyError), reduced_precision():
        raise KeyError
    assert MATMUL.fp32_precision == before


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.bfloat16, 1e-6),  # as exact as float32
        (torch.float32, 2e-4),  # roundings of 2⁻⁹ at most, of either sign, over all tokens
    ],
)
def test_a_hessian_is_that_of_rounded_inputs(dtype: torch.dtype, bound: float) -> None:
    X = inputs(TOKENS, WIDTH, seed=1).to(dtype)
    wanted = X.double().T @ X.double() / TOKENS
    found = gathered(X)
    assert torch.equal(found, found.T)
    assert float((found.double() - wanted).norm() / wanted.norm()) < bound


def test_a_solution_under_it_is_as_good() -> None:
    X, W = inputs(TOKENS, WIDTH, seed=4), weight(64, WIDTH, seed=5)
    losses = []
    for H in (X.T @ X / TOKENS, gathered(X.float())):
        (found,) = solve_update(W.to(H), W.to(H), H, GridSpec(group_size=64), rows=(64,))
        error = W - found.solution.weight_OI.double()
        losses.append(float((error @ X.T).square().mean()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
