"""Time and memory by stage."""

from __future__ import annotations

import time

import pytest

from qmerge.meter import SAMPLED, Meter, resident

LARGE = 64 << 20


def test_a_stage_has_its_own_peak() -> None:
    before = resident()
    with Meter() as meter:
        with meter.stage("small"):
            pass
        with meter.stage("large"):
            held = bytearray(LARGE)
            held[::4096] = bytes(len(held[::4096])).replace(b"\0", b"\1")
            time.sleep(3 * SAMPLED)
            del held
        time.sleep(2 * SAMPLED)
    assert meter.memory["large"] >= before + LARGE // 2
    assert meter.memory["small"] < meter.memory["large"]
    assert meter.seconds["large"] >= 3 * SAMPLED


def test_stages_add_up_and_go_on() -> None:
    meter = Meter()
    for _ in range(2):
        with pytest.raises(ValueError, match="x"), meter.stage("walk"):
            raise ValueError("x")
    first = meter.seconds["walk"]
    meter.add(seconds={"walk": 100.0, "plan": 1.0}, memory={"walk": 1 << 50})
    assert meter.seconds == {"walk": 100.0 + first, "plan": 1.0}
    assert meter.memory["walk"] == 1 << 50
