from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qmerge.gptq import Grid, GridSpec, aim, factor, solve_update
from qmerge.recipe import ActOrder
from tests.gptq import reference, reference_update
from tests.gptq.problems import inputs, second_moment, weight

WIDTH, GROUP, ROWS = 48, 16, (5, 3, 4)
OUT = sum(ROWS)
OWN = (slice(0, 5), slice(5, 8), slice(8, 12))
OPTIONS = tuple(itertools.product((3, 4), (True, False), (True, False), (0.01, 0.1, 1.0)))


def low_rank(size: float, seed: int) -> Tensor:
    """An update as an adapter makes it."""
    return weight(OUT, 3, seed=seed) @ weight(3, WIDTH, seed=seed + 1) * (8 * size)


def base_of(H: Tensor, bits: int, symmetric: bool, group: int = GROUP) -> reference.Reference:
    W = weight(OUT, WIDTH, seed=1)
    steps = reference.grid(W, bits=bits, group=group, symmetric=symmetric)
    return reference.gptq(W, H, steps, bits=bits, desc_act=True)


def given(base: reference.Reference) -> Grid:
    return Grid(scales_OG=base.steps.scales.half(), zeros_OG=base.steps.zeros.int())


@pytest.mark.parametrize(("bits", "symmetric", "anchor", "size"), OPTIONS)
@pytest.mark.parametrize("unit_survival", [True, False])
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("order", ["none", "group"])
def test_equals_naive_float64(
    bits: int,
    symmetric: bool,
    anchor: bool,
    size: float,
    unit_survival: bool,
    refine: bool,
    order: ActOrder,
) -> None:
    H = second_moment(WIDTH, seed=2)
    base = base_of(H, bits, symmetric)
    merged = base.weight + low_rank(size, seed=3)
    drift = torch.stack([0.02 * H.roll(1, dims=0), 0.02 * H.roll(2, dims=0)])
    residual = torch.stack([0.1 * weight(OUT, WIDTH, seed=5), 0.1 * weight(OUT, WIDTH, seed=6)])
    found = solve_update(
        merged,
        base.weight,
        H,
        GridSpec(bits=bits, group_size=GROUP, symmetric=symmetric),
        rows=ROWS,
        order=order,
        base=given(base) if anchor else None,
        unit_survival=unit_survival,
        refine=refine,
        drift_II=drift,
        residual_OI=residual,
    )
    wanted = reference_update.requantize(
        merged,
        base.weight,
        H,
        rows=ROWS,
        bits=bits,
        group=GROUP,
        symmetric=symmetric,
        target=aim(merged, factor(H, desc_act=order != "none"), drift, residual),
        base=base.steps if anchor else None,
        unit_survival=unit_survival,
        refine=refine,
        desc_act=order != "none",
    )
    for tensor, own in (("codes_OI", wanted.codes), ("zeros_OG", wanted.zeros)):
        stacked = torch.cat([getattr(update.solution, tensor) for update in found])
        assert torch.equal(stacked.double(), own), tensor
    scales = torch.cat([update.solution.scales_OG for update in found])
    torch.testing.assert_close(scales.double(), wanted.scales, rtol=1e-3, atol=0)
    assert (scales.double() != wanted.scales).double().mean() < 0.05
    torch.testing.assert_close(
        torch.tensor([update.kappa for update in found]).double(), wanted.kappa, rtol=1e-6, atol=0
    )
    assert [update.anchored for update in found] == [
        float(wanted.based[own].double().mean()) for own in OWN
    ]


@pytest.mark.parametrize("size", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("choice", ["fresh", "auto"])
def test_the_update_survives_whole(size: float, choice: str) -> None:
    H = second_moment(WIDTH, seed=6)
    base = base_of(H, 4, True)
    update = low_rank(size, seed=7)
    parts = solve_update(
        (base.weight + update).float(),
        base.weight.float(),
        H.float(),
        GridSpec(bits=4, group_size=GROUP),
        rows=ROWS,
        base=given(base),
        grid=choice,  # type: ignore[arg-type]
    )
    for found, own in zip(parts, OWN, strict=True):
        D, E = update[own], found.solution.weight_OI.double() - base.weight[own]
        energy = reference_update.inner(D, H, D)
        survival = reference_update.inner(E, H, D) / energy
        noise = reference_update.inner(E - D, H, E - D) / energy
        assert found.survival == pytest.approx(survival, abs=1e-3)
        assert found.noise == pytest.approx(noise, rel=1e-3)
        assert survival == pytest.approx(1.0, abs=0.01 if size > 0.05 else 0.05)


def test_anchored_keeps_steps_and_zero_points() -> None:
    H = second_moment(WIDTH, seed=8)
    base = base_of(H, 4, False)
    update = low_rank(0.3, seed=9)
    spec = GridSpec(bits=4, group_size=GROUP, symmetric=False)
    merged = base.weight + update

    def anchored(unit_survival: bool) -> Tensor:
        found = solve_update(
            merged,
            base.weight,
            H,
            spec,
            rows=ROWS,
            base=given(base),
            grid="anchored",
            unit_survival=unit_survival,
        )
        scales = torch.cat([part.solution.scales_OG for part in found])
        zeros = torch.cat([part.solution.zeros_OG for part in found])
        assert torch.equal(scales, base.steps.scales.half())
        assert torch.equal(zeros.double(), base.steps.zeros)
        assert {part.anchored for part in found} == {1.0}
        return torch.cat([part.solution.codes_OI for part in found])

    plain = reference.gptq(merged, H, base.steps, desc_act=True)
    assert torch.equal(anchored(False).double(), plain.codes)
    scales, zeros, g_idx = base.steps
    pushed = scales[:, g_idx] * (anchored(True) - zeros[:, g_idx])
    D, lost = update, plain.weight - base.weight
    before = reference_update.inner(lost, H, D) / reference_update.inner(D, H, D)
    after = reference_update.inner(pushed - base.weight, H, D) / reference_update.inner(D, H, D)
    assert abs(after - 1) < abs(before - 1)


@pytest.mark.parametrize("choice", ["auto", "anchored"])
def test_a_sibling_left_alone_keeps_its_codes(choice: str) -> None:
    H = second_moment(WIDTH, seed=10).float()
    base = base_of(H, 4, True)
    update = low_rank(0.3, seed=11)
    update[OWN[1]] = 0.0
    found = solve_update(
        (base.weight + update).float(),
        base.weight.float(),
        H,
        GridSpec(bits=4, group_size=GROUP),
        rows=ROWS,
        base=given(base),
        grid=choice,  # type: ignore[arg-type]
        drift_II=0.1 * torch.stack([H.roll(1, dims=0)] * 2),
    )
    alone = found[1]
    assert torch.equal(alone.solution.codes_OI.double(), base.codes[OWN[1]])
    assert torch.equal(alone.solution.scales_OG, base.steps.scales[OWN[1]].half())
    assert (alone.survival, alone.noise, alone.anchored) == (None, None, 1.0)
    assert found[0].survival == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("order", ["none", "group", "full"])
@pytest.mark.parametrize("mixed_base", [False, True])
def test_groups_are_those_the_release_can_express(order: ActOrder, mixed_base: bool) -> None:
    H = second_moment(WIDTH, seed=12).float()
    W, mixed = weight(OUT, WIDTH, seed=1), torch.arange(WIDTH) % (WIDTH // GROUP)
    steps = reference.grid(W, group=GROUP, g_idx=mixed if mixed_base else None)
    base = reference.gptq(W, H, steps)
    grid = given(base)
    if mixed_base:
        grid = replace(grid, g_idx_I=mixed.int())
    found = solve_update(
        (base.weight + low_rank(0.1, seed=13)).float(),
        base.weight.float(),
        H,
        GridSpec(bits=4, group_size=GROUP),
        rows=ROWS,
        order=order,
        base=grid,
    )
    used = mixed_base is False or order == "full"
    for part in found:
        assert (part.anchored_loss is not None) == used
        if mixed_base and order == "full":
            assert torch.equal(part.solution.g_idx_I, grid.g_idx_I)  # type: ignore[arg-type]
        else:
            assert part.solution.g_idx_I is None


def test_full_order_sorts_columns_into_groups() -> None:
    H = second_moment(WIDTH, seed=14).float()
    merged = weight(OUT, WIDTH, seed=15).float()
    found = solve_update(
        merged, merged * 0.9, H, GridSpec(group_size=GROUP), rows=ROWS, order="full"
    )
    order = H.diagonal().argsort(descending=True)
    wanted = torch.empty(WIDTH, dtype=torch.int32)
    wanted[order] = (torch.arange(WIDTH) // GROUP).int()
    assert torch.equal(found[0].solution.g_idx_I, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("poison", [0.0, torch.nan])
@pytest.mark.parametrize("choice", ["fresh", "auto", "anchored"])
def test_without_a_hessian_rounding_is_nearest_and_says_so(poison: float, choice: str) -> None:
    base = base_of(second_moment(WIDTH, seed=16), 4, True)
    merged = (base.weight + low_rank(0.3, seed=17)).float()
    found = solve_update(
        merged,
        base.weight.float(),
        torch.full((WIDTH, WIDTH), poison),
        GridSpec(bits=4, group_size=GROUP),
        rows=ROWS,
        base=given(base),
        grid=choice,  # type: ignore[arg-type]
    )
    for part in found:
        assert part.solution.fallback is not None
        assert part.solution.fallback.startswith("nearest rounding")
        assert torch.isfinite(part.solution.weight_OI).all()
        assert (part.survival, part.kappa) == (None, 1.0)


def test_asymmetric_target_brings_the_release_nearer_to_the_reference() -> None:
    X = inputs(400, WIDTH, seed=18)
    reference_X = X + 0.2 * X.roll(1, dims=1)
    H, drift = X.T @ X / 400, torch.stack([(reference_X - X).T @ X / 400] * 2)
    origin = weight(OUT, WIDTH, seed=19)
    merged = origin + low_rank(0.3, seed=20)

    def miss(drift_II: Tensor | None) -> float:
        found = solve_update(
            merged, origin, H, GridSpec(group_size=GROUP), rows=ROWS, drift_II=drift_II
        )
        release = torch.cat([part.solution.weight_OI for part in found]).double()
        return float((X @ release.T - reference_X @ merged.T).square().mean())

    assert miss(drift) < 0.5 * miss(None)
