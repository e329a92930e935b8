"""Inputs that break other engines: each ends in finite codes, with what gave way on record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.gptq import GridSpec, Hessian, Solution, solve_update
from qmerge.recipe import ActOrder
from tests.gptq import reference
from tests.gptq.problems import inputs, second_moment, weight

OUT, WIDTH, GROUP = 6, 64, 16
SPEC = GridSpec(bits=4, group_size=GROUP)
ORDERS: tuple[ActOrder, ...] = ("none", "group", "full")


def solve(W: Tensor, H: Tensor, spec: GridSpec = SPEC, **asked: Any) -> Solution:
    """Plain GPTQ, as of a dense checkpoint."""
    plain: dict[str, Any] = {"unit_survival": False, "refine": False, "rows": (OUT,)}
    (found,) = solve_update(W, W, H, spec, **plain, **asked)
    return found.solution


def nearest(W: Tensor) -> Tensor:
    """Plain rounding, each column of equal weight."""
    columns = W.reshape(OUT * WIDTH // GROUP, GROUP).double()
    step, _ = reference.fit(columns, torch.ones(GROUP), 4, True, torch.float16)
    codes = torch.round(columns / step[:, None]).clamp(-8, 7)
    return (codes * step[:, None]).reshape(OUT, WIDTH)


@pytest.mark.parametrize("order", ORDERS)
def test_dead_columns_keep_nearest_rounding(order: ActOrder) -> None:
    H, W = second_moment(WIDTH, seed=1), weight(OUT, WIDTH, seed=1)
    dead = [0, 5, 17, 63]
    H[dead], H[:, dead] = 0.0, 0.0
    solution = solve(W.float(), H.float(), order=order)
    group = torch.arange(WIDTH) // GROUP if solution.g_idx_I is None else solution.g_idx_I.long()
    step = solution.scales_OG.double()[:, group[dead]]
    wanted = torch.round(W[:, dead] / step).clamp(-8, 7) * step
    torch.testing.assert_close(solution.weight_OI[:, dead].double(), wanted, rtol=1e-5, atol=1e-8)
    assert solution.weight_OI[:, dead].abs().sum() > 0
    assert solution.fallback is None


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_few_tokens(tokens: int, order: ActOrder) -> None:
    X = inputs(tokens, WIDTH, seed=2).float()
    hessian = Hessian(WIDTH)
    hessian.add(X)
    W = weight(OUT, WIDTH, seed=2).float()
    solution = solve(W, hessian.mean(), order=order)
    assert torch.isfinite(solution.weight_OI).all()
    assert solution.damping >= 0.01
    output_error = (X @ (solution.weight_OI - W).T).square().sum()
    assert output_error < (X @ (nearest(W).float() - W).T).square().sum()


def test_damping_rises_where_the_matrix_is_singular() -> None:
    hessian = Hessian(WIDTH)
    hessian.add(inputs(5, WIDTH, seed=3))
    W = weight(OUT, WIDTH, seed=3).float()
    solution = solve(W, hessian.mean().float(), damping=0.0)
    assert 0.0 < solution.damping <= 0.01
    assert solution.fallback is None
    assert torch.isfinite(solution.weight_OI).all()


def test_indefinite_matrix_takes_the_diagonal_floor() -> None:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(WIDTH, WIDTH, generator=generator)
    H = torch.eye(WIDTH) + 3 * (noise + noise.T)
    W = weight(OUT, WIDTH, seed=4).float()
    solution = solve(W, H, order="full")
    assert solution.fallback is not None
    assert solution.fallback.startswith("diagonal floor")
    assert torch.isfinite(solution.weight_OI).all()
    assert (solution.weight_OI - W).abs().max() < W.abs().max()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("order", ORDERS)
def test_hessian_that_is_not_finite_leaves_nearest_rounding(poison: float, order: ActOrder) -> None:
    H, W = second_moment(WIDTH, seed=5).float(), weight(OUT, WIDTH, seed=5).float()
    H[7, 9] = H[9, 7] = poison
    solution = solve(W, H, order=order)
    assert solution.fallback == "nearest rounding: the Hessian is not finite"
    assert solution.g_idx_I is None or order == "full"
    if order != "full":
        torch.testing.assert_close(solution.weight_OI.double(), nearest(W), rtol=1e-6, atol=0)


def test_no_tokens_leave_nearest_rounding() -> None:
    W = weight(OUT, WIDTH, seed=6).float()
    solution = solve(W, Hessian(WIDTH).mean())
    assert solution.fallback == "nearest rounding: the input was never active in calibration"
    assert solution.loss == 0.0
    torch.testing.assert_close(solution.weight_OI.double(), nearest(W), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_the_size_of_the_hessian_does_not_matter(size: float) -> None:
    H, W = second_moment(WIDTH, seed=7), weight(OUT, WIDTH, seed=7).float()
    plain = solve(W, H.float())
    scaled = solve(W, (H * size).float())
    assert scaled.fallback is None
    assert (scaled.codes_OI != plain.codes_OI).double().mean() < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6, 1e4, 1e7, 1e30])
def test_steps_stay_storable(size: float, symmetric: bool) -> None:
    """fp16 steps that would be zero or inf, and groups that are all zero."""
    H, W = second_moment(WIDTH, seed=8).float(), weight(OUT, WIDTH, seed=8).float()
    W[:, :GROUP] *= size
    spec = GridSpec(bits=4, group_size=GROUP, symmetric=symmetric)
    solution = solve(W, H, spec, order="none")
    assert torch.isfinite(solution.scales_OG).all()
    assert (solution.scales_OG > 0).all()
    assert torch.isfinite(solution.weight_OI).all()
    if size <= 1e-6:
        assert solution.weight_OI[:, :GROUP].abs().max() <= W[:, :GROUP].abs().max() * 1.2


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_group_of_one_sign_reaches_its_far_end(sign: float) -> None:
    H = torch.eye(WIDTH)
    W = sign * (weight(OUT, WIDTH, seed=9).float().abs() + 0.05)
    spec = GridSpec(bits=4, group_size=GROUP, symmetric=False)
    solution = solve(W, H, spec, order="none")
    assert ((solution.zeros_OG >= 0) & (solution.zeros_OG <= 15)).all()
    assert (solution.weight_OI - W).abs().max() < 0.01


def test_options_that_cannot_be() -> None:
    with pytest.raises(RecipeError, match="bits: 5"):
        GridSpec(bits=5)
    for group in (48, 0):
        spec = GridSpec(group_size=group)
        with pytest.raises(RecipeError, match=f"group size: {group}"):
            solve(weight(OUT, WIDTH, seed=10), torch.eye(WIDTH), spec)
