from __future__ import annotations

import itertools

import pytest
import torch

from qmerge.errors import InputError
from qmerge.gptq import Grid, factor, solve, solver
from qmerge.gptq.grid import GridSpec, fit_groups
from tests.gptq import reference
from tests.gptq.problems import second_moment, weight

OUT, WIDTH = 32, 96
# One group, groups wider and narrower than a leaf of the recursion, and not a power of two.
GROUPS = (-1, 48, 12, 8)
OPTIONS = tuple(itertools.product((2, 3, 4, 8), (True, False), (True, False), GROUPS))


def given(steps: reference.Steps, *, mixed: bool = False) -> Grid:
    return Grid(
        scales_OG=steps.scales.half(),
        zeros_OG=steps.zeros.int(),
        g_idx_I=steps.g_idx.int() if mixed else None,
    )


@pytest.mark.parametrize(("bits", "symmetric", "desc_act", "group"), OPTIONS)
def test_equals_naive_float64(bits: int, symmetric: bool, desc_act: bool, group: int) -> None:
    H, W = second_moment(WIDTH, seed=bits), weight(OUT, WIDTH, seed=group)
    steps = reference.grid(W, bits=bits, group=group, symmetric=symmetric)
    wanted = reference.gptq(W, H, steps, bits=bits, desc_act=desc_act)
    grid = given(steps)

    exact = solve(W, factor(H, desc_act=desc_act), grid, bits=bits)
    assert torch.equal(exact.codes_OI.double(), wanted.codes)
    assert torch.equal(exact.scales_OG, grid.scales_OG)
    assert torch.equal(exact.zeros_OG, grid.zeros_OG)
    torch.testing.assert_close(exact.weight_OI, wanted.weight.float(), rtol=1e-6, atol=0)
    assert exact.loss == pytest.approx(wanted.loss, rel=1e-8)
    assert (exact.damping, exact.fallback) == (0.01, None)

    single = solve(W.float(), factor(H.float(), desc_act=desc_act), grid, bits=bits)
    E = W - single.weight_OI.double()
    loss = float((E @ H * E).sum())
    assert single.loss == pytest.approx(loss, rel=1e-3)
    assert loss == pytest.approx(wanted.loss, rel=1e-2)  # a tie or two go the other way


@pytest.mark.parametrize("desc_act", [False, True])
def test_groups_may_be_of_columns_anywhere(desc_act: bool) -> None:
    H, W = second_moment(WIDTH, seed=3), weight(OUT, WIDTH, seed=3)
    steps = reference.grid(W, symmetric=False, g_idx=torch.arange(WIDTH) * 7 % WIDTH // 16)
    wanted = reference.gptq(W, H, steps, desc_act=desc_act)
    grid = given(steps, mixed=True)
    solution = solve(W, factor(H, desc_act=desc_act), grid, bits=4)
    assert torch.equal(solution.codes_OI.double(), wanted.codes)
    assert solution.g_idx_I is grid.g_idx_I
    assert solution.loss == pytest.approx(wanted.loss, rel=1e-8)


def test_what_other_devices_run_equals_naive_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "round_by_numpy", solver.round_by_torch)
    H, W = second_moment(WIDTH, seed=2), weight(OUT, WIDTH, seed=2)
    steps = reference.grid(W, group=32, symmetric=False)
    wanted = reference.gptq(W, H, steps, desc_act=True)
    solution = solve(W, factor(H), given(steps), bits=4)
    assert torch.equal(solution.codes_OI.double(), wanted.codes)
    torch.testing.assert_close(solution.weight_OI, wanted.weight.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fitted_steps_equal_naive_float64(dtype: torch.dtype, mixed: bool, symmetric: bool) -> None:
    """In the stored dtype, each group weighted by its columns' weights."""
    W, seen = weight(OUT, WIDTH, seed=1), second_moment(WIDTH, seed=1).diagonal()
    spec = GridSpec(bits=4, group_size=32, symmetric=symmetric, scale_dtype=dtype)
    g_idx = torch.arange(WIDTH) * 7 % WIDTH // 32 if mixed else None
    found = fit_groups(W, seen, spec, g_idx, 3)
    wanted = reference.grid(W, group=32, symmetric=symmetric, dtype=dtype, weight=seen, g_idx=g_idx)
    assert found.scales_OG.dtype == dtype
    assert torch.equal(found.scales_OG.double(), wanted.scales)
    assert torch.equal(found.zeros_OG.double(), wanted.zeros)


def test_a_weight_on_its_grid_keeps_every_code() -> None:
    H, W = second_moment(WIDTH, seed=5), weight(OUT, WIDTH, seed=5)
    base = reference.gptq(W, H, reference.grid(W, group=32))
    solution = solve(base.weight.float(), factor(H.float()), given(base.steps), bits=4)
    assert torch.equal(solution.codes_OI.double(), base.codes)
    assert solution.loss < 1e-9


def test_siblings_stacked_along_out_equal_each_alone() -> None:
    found = factor(second_moment(WIDTH, seed=6))
    parts = [weight(out, WIDTH, seed=out) for out in (8, 4, 5)]
    whole = torch.cat(parts)
    grid = given(reference.grid(whole, group=32))
    together = solve(whole, found, grid, bits=4).split((8, 4, 5))
    for stacked, part, start in zip(together, parts, (0, 8, 12), strict=True):
        alone = solve(part, found, grid.rows(slice(start, start + len(part))), bits=4)
        assert torch.equal(stacked.codes_OI, alone.codes_OI)
        assert torch.equal(stacked.scales_OG, alone.scales_OG)
        assert torch.equal(stacked.weight_OI, alone.weight_OI)
        assert stacked.loss == pytest.approx(alone.loss)


def test_rows_are_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    H, W = second_moment(WIDTH, seed=9), weight(OUT, WIDTH, seed=9)
    grid, found = given(reference.grid(W, group=32)), factor(H)
    whole = solve(W, found, grid, bits=4)
    monkeypatch.setitem(solver.ROWS, "cpu", 5)
    parts = solve(W, found, grid, bits=4)
    for name in ("codes_OI", "scales_OG", "zeros_OG", "weight_OI"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    torch.testing.assert_close(parts.loss_O, whole.loss_O)


def test_same_input_same_bytes() -> None:
    H, W = second_moment(WIDTH, seed=7).float(), weight(OUT, WIDTH, seed=7).float()
    grid = given(reference.grid(W, group=32))
    first, second = (solve(W, factor(H), grid, bits=4) for _ in range(2))
    assert torch.equal(first.codes_OI, second.codes_OI)
    assert torch.equal(first.loss_O, second.loss_O)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    W = weight(OUT, WIDTH, seed=8)
    grid = given(reference.grid(W))
    W[2, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        solve(W, factor(second_moment(WIDTH, seed=8)), grid, bits=4)
