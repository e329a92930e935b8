from __future__ import annotations

import itertools

import pytest
import torch

from qmerge.errors import InputError
from qmerge.gptq import Grid, GridSpec, Order, factor, solve, solver
from tests.gptq import reference
from tests.gptq.problems import second_moment, weight

OUT, WIDTH = 32, 96
ORDERS: tuple[Order, ...] = ("none", "group", "full")
# One group, groups wider and narrower than a leaf of the recursion, and not a power of two.
GROUPS = (-1, 32, 12, 8)
OPTIONS = tuple(itertools.product((2, 3, 4, 8), (True, False), ORDERS, GROUPS))


@pytest.mark.parametrize(("bits", "symmetric", "order", "group"), OPTIONS)
def test_equals_naive_float64(bits: int, symmetric: bool, order: Order, group: int) -> None:
    H, W = second_moment(WIDTH, seed=bits), weight(OUT, WIDTH, seed=group)
    spec = GridSpec(bits=bits, group_size=group, symmetric=symmetric)
    wanted = reference.gptq(W, H, bits=bits, symmetric=symmetric, order=order, group=group)

    exact = solve(W, factor(H, order=order, group_size=group), spec)
    assert torch.equal(exact.codes_OI.double(), wanted.codes)
    assert torch.equal(exact.scales_OG.double(), wanted.scales)
    assert torch.equal(exact.zeros_OG.double(), wanted.zeros)
    width = WIDTH if group == -1 else group
    trivial = torch.arange(WIDTH) // width
    g_idx = trivial if exact.g_idx_I is None else exact.g_idx_I.long()
    assert torch.equal(g_idx, wanted.g_idx)
    assert (exact.g_idx_I is None) == (order != "full" or group == -1)
    torch.testing.assert_close(exact.weight_OI, wanted.weight.float(), rtol=1e-6, atol=0)
    assert exact.loss == pytest.approx(wanted.loss, rel=1e-8)
    assert (exact.damping, exact.fallback) == (0.01, None)

    single = solve(W.float(), factor(H.float(), order=order, group_size=group), spec)
    E = W - single.weight_OI.double()
    assert float((E @ H * E).sum()) == pytest.approx(wanted.loss, rel=1e-3)
    assert single.loss == pytest.approx(wanted.loss, rel=1e-3)


def test_what_other_devices_run_equals_naive_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "round_by_numpy", solver.round_by_torch)
    H, W = second_moment(WIDTH, seed=2), weight(OUT, WIDTH, seed=2)
    wanted = reference.gptq(W, H, symmetric=False, order="group", group=32)
    spec = GridSpec(bits=4, group_size=32, symmetric=False)
    solution = solve(W, factor(H, order="group", group_size=32), spec)
    assert torch.equal(solution.codes_OI.double(), wanted.codes)
    torch.testing.assert_close(solution.weight_OI, wanted.weight.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_those_of_the_stored_dtype(dtype: torch.dtype) -> None:
    H, W = second_moment(WIDTH, seed=1), weight(OUT, WIDTH, seed=1)
    spec = GridSpec(bits=4, group_size=32, scale_dtype=dtype)
    solution = solve(W, factor(H, order="group", group_size=32), spec)
    wanted = reference.gptq(W, H, group=32, order="group", dtype=dtype)
    assert solution.scales_OG.dtype == dtype
    assert torch.equal(solution.scales_OG.double(), wanted.scales)
    assert torch.equal(solution.codes_OI.double(), wanted.codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mixed", [False, True])
def test_given_grid_equals_naive_float64(order: Order, mixed: bool) -> None:
    H, W = second_moment(WIDTH, seed=3), weight(OUT, WIDTH, seed=3)
    base = reference.gptq(W, H, group=16, symmetric=False, order="full" if mixed else "none")
    W = W + 0.1 * weight(OUT, WIDTH, seed=4)
    grid = Grid(
        scales_OG=base.scales.half(),
        zeros_OG=base.zeros.int(),
        g_idx_I=base.g_idx.int() if mixed else None,
    )
    solution = solve(
        W,
        factor(H, order=order, group_size=32),
        GridSpec(bits=4, group_size=16, symmetric=False),
        grid=grid,
    )
    wanted = reference.gptq(W, H, group=32, order=order, grid=(base.scales, base.zeros, base.g_idx))
    assert torch.equal(solution.codes_OI.double(), wanted.codes)
    assert torch.equal(solution.scales_OG, grid.scales_OG)
    assert torch.equal(solution.zeros_OG, grid.zeros_OG)
    assert solution.g_idx_I is grid.g_idx_I
    assert solution.loss == pytest.approx(wanted.loss, rel=1e-8)


def test_a_weight_on_its_grid_keeps_every_code() -> None:
    H, W = second_moment(WIDTH, seed=5), weight(OUT, WIDTH, seed=5)
    base = reference.gptq(W, H, group=32)
    grid = Grid(scales_OG=base.scales.half(), zeros_OG=base.zeros.int())
    found = factor(H.float(), order="full", group_size=32)
    solution = solve(base.weight.float(), found, GridSpec(group_size=32), grid=grid)
    assert torch.equal(solution.codes_OI.double(), base.codes)
    assert solution.loss < 1e-9


def test_later_groups_are_fitted_on_fed_columns() -> None:
    """The first group is all error, and what it feeds on outgrows the second group's own range."""
    H = torch.tensor([[1.0, 0.95], [0.95, 1.0]], dtype=torch.float64).kron(torch.eye(4).double())
    W = torch.cat([torch.tensor([[8.0, 0.9, 0.9, 0.9]]), torch.full((1, 4), 0.01)], 1).double()
    spec = GridSpec(bits=2, group_size=4)
    solution = solve(W, factor(H, order="none", group_size=4), spec)
    wanted = reference.gptq(W, H, bits=2, group=4)
    assert torch.equal(solution.codes_OI.double(), wanted.codes)
    assert solution.scales_OG[0, 1] > 0.3


def test_siblings_stacked_along_out_equal_each_alone() -> None:
    H = second_moment(WIDTH, seed=6)
    found, spec = factor(H, order="group", group_size=32), GridSpec(group_size=32)
    parts = [weight(out, WIDTH, seed=out) for out in (8, 4, 5)]
    together = solve(torch.cat(parts), found, spec).split((8, 4, 5))
    for stacked, part in zip(together, parts, strict=True):
        alone = solve(part, found, spec)
        assert torch.equal(stacked.codes_OI, alone.codes_OI)
        assert torch.equal(stacked.scales_OG, alone.scales_OG)
        assert torch.equal(stacked.weight_OI, alone.weight_OI)
        assert stacked.loss == pytest.approx(alone.loss)


@pytest.mark.parametrize("given", [False, True])
def test_rows_are_solved_in_parts(monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    H, W = second_moment(WIDTH, seed=9), weight(OUT, WIDTH, seed=9)
    base = reference.gptq(W, H, group=32)
    grid = Grid(scales_OG=base.scales.half(), zeros_OG=base.zeros.int()) if given else None
    found, spec = factor(H, order="full", group_size=32), GridSpec(group_size=32)
    whole = solve(W, found, spec, grid=grid)
    monkeypatch.setattr(solver, "ROWS", 5)
    parts = solve(W, found, spec, grid=grid)
    for name in ("codes_OI", "scales_OG", "zeros_OG", "weight_OI"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    torch.testing.assert_close(parts.loss_O, whole.loss_O)


def test_same_input_same_bytes() -> None:
    H, W = second_moment(WIDTH, seed=7).float(), weight(OUT, WIDTH, seed=7).float()
    first, second = (
        solve(W, factor(H, order="full", group_size=32), GridSpec(group_size=32)) for _ in range(2)
    )
    assert torch.equal(first.codes_OI, second.codes_OI)
    assert torch.equal(first.scales_OG, second.scales_OG)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    W = weight(OUT, WIDTH, seed=8)
    W[2, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        solve(W, factor(second_moment(WIDTH, seed=8), order="none"), GridSpec(group_size=-1))
