"""The cheapest remedy is one that was tried, and its bytes are those of the files."""

from __future__ import annotations

import pytest
import torch

from qmerge.formats.base import IntegerWeight
from qmerge.formats.gptq import pack_gptq
from qmerge.measure.remedy import (
    Alternative,
    cheapest,
    is_weak,
    remedies,
    stored_bytes,
    survival_warning,
)
from qmerge.results import Survival


def kept(share: float, energy: float = 1.0) -> Survival:
    return Survival(survival=share, noise=0.1, energy=energy, elements=10, update_rms=1.0, step=1.0)


class Tried(list[str]):
    """Alternatives that note when they are solved."""

    def alternative(self, option: str, extra: int, survival: Survival) -> Alternative:
        def solve() -> Survival:
            self.append(option)
            return survival

        return Alternative(option=option, extra_bytes=extra, solve=solve)


def test_alternatives_are_solved_from_the_cheapest_until_one_is_enough() -> None:
    tried = Tried()
    found = cheapest(
        "q",
        [
            tried.alternative("8 bits", 400, kept(0.99)),
            tried.alternative("anchored", 0, kept(0.7)),
            tried.alternative("group 32", 30, kept(0.9)),
        ],
    )
    assert tried == ["anchored", "group 32"]
    assert found is not None
    assert (found.linear, found.option, found.extra_bytes) == ("q", "group 32", 30)


def test_where_nothing_is_enough_there_is_no_remedy() -> None:
    tried = Tried()
    hopeless = [tried.alternative("a", 0, kept(0.2)), tried.alternative("b", 1, Survival())]
    assert cheapest("q", hopeless) is None
    assert tried == ["a", "b"]
    assert cheapest("q", []) is None


def test_remedies_name_their_linears_and_pool_by_effect() -> None:
    tried = Tried()
    shares = {"q": kept(0.9, 3.0), "k": kept(0.98, 1.0)}
    trials = [
        cheapest(name, [tried.alternative("--bits 8", 100, share)])
        for name, share in shares.items()
    ]
    trials.append(cheapest("v", [tried.alternative("--grid anchored", 0, kept(0.95))]))
    anchored, wide = remedies([trial for trial in trials if trial is not None])
    assert (anchored.option, anchored.where) == ("--grid anchored", ("v",))
    assert (wide.where, wide.extra_bytes) == (("q", "k"), 200)
    assert wide.survival == pytest.approx((3 * 0.9 + 0.98) / 4)


def test_the_warning_counts_and_names_the_worst() -> None:
    linears = {"a": kept(0.95, 9.0), "b": kept(0.5), "c": kept(0.6), "d": None}
    (remedy,) = remedies(
        [cheapest("b", [Tried().alternative("--bits 8", 1, kept(0.99))])]  # type: ignore[list-item]
    )
    text = survival_warning(linears, [remedy])
    assert text is not None
    assert "2 of 4 linears" in text
    assert "0.50 in b, 0.88 in the model" in text
    assert "for 1 of them" in text
    assert survival_warning({"a": kept(0.9), "d": None, "e": Survival()}, []) is None


def test_no_adapter_is_not_a_weak_one() -> None:
    assert not is_weak(None)
    assert not is_weak(Survival())
    assert not is_weak(kept(0.9))
    assert is_weak(kept(0.899))


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 32), (4, -1), (8, 64)])
def test_bytes_are_those_of_the_packed_tensors(bits: int, group: int) -> None:
    outputs, inputs = 96, 128
    groups = 1 if group == -1 else inputs // group
    weight = IntegerWeight(
        codes_OI=torch.zeros(outputs, inputs, dtype=torch.uint8),
        scales_OG=torch.ones(outputs, groups, dtype=torch.float16),
        zeros_OG=torch.full((outputs, groups), 1 << (bits - 1), dtype=torch.int32),
        g_idx_I=None,
        bits=bits,
        group_size=group,
        symmetric=True,
    )
    packed = pack_gptq(weight, version=1)
    expected = sum(tensor.nbytes for tensor in packed.values())
    assert stored_bytes(outputs, inputs, bits=bits, group_size=group) == expected
