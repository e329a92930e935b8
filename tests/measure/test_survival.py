"""Survival against float64 loops that follow the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qmerge.measure.survival import error_ratio, linear_survival, pool_survival, relative_error
from qmerge.results import Survival

OUT, IN = 9, 14


def problem(seed: int, outputs: int = OUT) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(outputs, IN, generator=generator)
    update = (
        0.02
        * torch.randn(outputs, 2, generator=generator)
        @ torch.randn(2, IN, generator=generator)
    )
    inputs = torch.randn(64, IN, generator=generator) * torch.rand(IN, generator=generator)
    release = base + 0.8 * update + 0.003 * torch.randn(outputs, IN, generator=generator)
    return base, base + update, release, inputs.T @ inputs / 64


def naive_inner(a: Tensor, b: Tensor, h: Tensor) -> float:
    total = 0.0
    for o in range(a.shape[0]):
        for i in range(a.shape[1]):
            for j in range(a.shape[1]):
                total += float(a[o, i]) * float(h[i, j]) * float(b[o, j])
    return total


def test_figures_follow_the_definition() -> None:
    base, merged, release, moment = problem(0)
    update, left = merged.double() - base.double(), release.double() - base.double()
    codes = torch.arange(OUT * IN).view(OUT, IN) % 16
    changed = codes.clone()
    changed[0, :7] += 1
    found = linear_survival(
        base, merged, release, moment, 0.1, codes_OI=changed, base_codes_OI=codes
    )
    energy = naive_inner(update, update, moment)
    assert found.survival == pytest.approx(naive_inner(left, update, moment) / energy, rel=1e-4)
    error = left - update
    assert found.noise == pytest.approx(naive_inner(error, error, moment) / energy, rel=1e-4)
    assert found.step_ratio == pytest.approx(math.sqrt(float((update**2).mean())) / 0.1, rel=1e-4)
    assert found.codes_changed == pytest.approx(7 / (OUT * IN))
    ratio = naive_inner(merged - release, merged - release, moment) / naive_inner(
        merged, merged, moment
    )
    assert relative_error(merged, release, moment) == pytest.approx(ratio, rel=1e-4)


def test_the_bases_error_over_the_adapters_effect() -> None:
    base, merged, _, moment = problem(7)
    original = base + 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(8))
    update, error = merged.double() - base.double(), original.double() - base.double()
    energy = naive_inner(update, update, moment)
    wanted = math.sqrt(naive_inner(error, error, moment) / energy)
    found = linear_survival(base, merged, base, moment, 0.1)
    assert error_ratio(original, base, moment, found.energy) == pytest.approx(wanted, rel=1e-4)
    assert error_ratio(base, base, moment, found.energy) == 0
    assert error_ratio(original, base, moment, Survival().energy) is None


def test_whole_and_erased() -> None:
    base, merged, _, moment = problem(1)
    whole = linear_survival(base, merged, merged, moment, 0.1)
    assert whole.survival == pytest.approx(1)
    assert whole.noise == pytest.approx(0, abs=1e-9)
    erased = linear_survival(base, merged, base, moment, 0.1)
    assert erased.survival == 0
    assert erased.noise == pytest.approx(1)
    assert erased.codes_changed is None


def test_an_untouched_linear_has_no_figures() -> None:
    base, _, release, moment = problem(2)
    codes = torch.zeros(OUT, IN)
    found = linear_survival(base, base, release, moment, 0.1, codes_OI=codes, base_codes_OI=codes)
    assert found == Survival()


def test_an_update_that_no_input_sees_has_no_survival_but_a_step() -> None:
    base, merged, release, _ = problem(3)
    found = linear_survival(base, merged, release, torch.zeros(IN, IN), 0.1)
    assert found.survival is None
    assert found.noise is None
    assert found.step_ratio is not None


def test_rows_in_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, merged, release, moment = problem(4)
    whole = linear_survival(base, merged, release, moment, 0.1)
    monkeypatch.setattr("qmerge.measure.survival.ROWS", 2)
    parts = linear_survival(base, merged, release, moment, 0.1)
    assert parts.survival == pytest.approx(whole.survival)
    assert parts.noise == pytest.approx(whole.noise)


def test_pooled_linears_equal_one_stacked_linear() -> None:
    """Siblings that share their input: stacking them along O is one linear."""
    first, second = problem(5), problem(6, outputs=21)
    moment = first[3]
    codes = [torch.zeros(len(part[0]), IN) for part in (first, second)]
    changed = [c.clone() for c in codes]
    changed[1][0] = 1
    parts = [
        linear_survival(base, merged, release, moment, 0.1, codes_OI=new, base_codes_OI=old)
        for (base, merged, release, _), new, old in zip(
            (first, second), changed, codes, strict=True
        )
    ]
    base, merged, release = (torch.cat([a, b]) for a, b in zip(first[:3], second[:3], strict=True))
    whole = linear_survival(
        base,
        merged,
        release,
        moment,
        0.1,
        codes_OI=torch.cat(changed),
        base_codes_OI=torch.cat(codes),
    )
    pooled = pool_survival([*parts, Survival(), None])
    assert pooled is not None
    for name in ("survival", "noise", "step_ratio", "codes_changed", "energy", "elements"):
        assert getattr(pooled, name) == pytest.approx(getattr(whole, name), rel=1e-5)
    assert pool_survival([Survival(), None]) is None


def test_pooled_error_ratios_weigh_by_the_adapters_effect() -> None:
    """Sums of squares over sums of squares; a linear without an original has no part in it."""
    one = Survival(survival=1, noise=0, energy=4.0, elements=1, error_ratio=3.0)
    two = Survival(survival=1, noise=0, energy=1.0, elements=1, error_ratio=1.0)
    other = Survival(survival=1, noise=0, energy=9.0, elements=1)
    pooled = pool_survival([one, two, other])
    assert pooled is not None
    assert pooled.error_ratio == pytest.approx(math.sqrt((9 * 4 + 1 * 1) / 5))
    bare = pool_survival([other])
    assert bare is not None
    assert bare.error_ratio is None
