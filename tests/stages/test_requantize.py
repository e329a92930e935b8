"""Waiting for a linear and running up to it anew are the same calibration, and what is gathered
there is what the reference has and the release lacks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from greenlet import getcurrent
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from qmerge import precision
from qmerge.gptq import Drift, GridSpec, Hessian
from qmerge.job import Settings
from qmerge.model.frame import Frame
from qmerge.model.layer import fill, linears, run
from qmerge.model.paused import Forward
from qmerge.precision import reduced_precision
from qmerge.stages.requantize import (
    Calibration,
    Moments,
    Pair,
    ReadWindows,
    Requantizer,
    Weight,
)
from tests.model.test_frame import State, layer_weights, parts

WINDOWS = 6
SETTINGS = Settings(
    spec=GridSpec(group_size=-1),
    order="group",
    damping=0.01,
    format="gptq",
    grid="auto",
    unit_survival=True,
    refine=True,
    asymmetric=True,
)


def requantized(
    name: str, settings: Settings, *, waiting: bool
) -> tuple[Requantizer, list[torch.Tensor], torch.nn.Module, torch.Tensor]:
    """Layer 0 of a random model, its calibration outputs, and the layer as it came out."""
    model, skeleton = parts(name)
    weights = layer_weights(model, skeleton.layer_path(0))
    hidden, calls = Frame(skeleton, State(model)).enter(torch.arange(96).reshape(WINDOWS, 16) % 90)
    drifted = hidden + 0.01 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    layer, reference = skeleton.layer(0), skeleton.layer(0)
    fill(layer, weights)
    fill(reference, weights)
    work = Requantizer(
        layer,
        reference,
        {
            name: Weight(
                merged_OI=m.weight, origin_OI=m.weight * 0.9, base=None, spec=settings.spec
            )
            for name, m in linears(reference).items()
        },
        settings,
    )

    def reader(states: torch.Tensor) -> ReadWindows:
        return lambda start, stop: (states[start:stop], calls[0])

    calibration = Calibration(
        read=reader(drifted),
        read_reference=reader(hidden) if settings.asymmetric else None,
        sample=(drifted[:1], calls[0]),
        windows=WINDOWS,
        at_once=4,
        waiting=waiting,
    )
    outputs = [own for own, _ in work.run(calibration)]
    with reduced_precision(settings.reduced):
        return work, outputs, layer, run(layer, drifted, calls[0])


@pytest.fixture(params=["asymmetric", "symmetric"])
def settings(request: pytest.FixtureRequest) -> Settings:
    return replace(SETTINGS, asymmetric=request.param == "asymmetric")


@pytest.mark.parametrize("name", ["Qwen3", "Phi3", "GPTNeoX"])
def test_both_ways_give_the_same_codes(name: str, settings: Settings) -> None:
    once, outputs, layer, plain = requantized(name, settings, waiting=True)
    anew, *_ = requantized(name, settings, waiting=False)
    assert once.packed.keys() == linears(layer).keys()
    for linear, weight in once.packed.items():
        assert torch.equal(weight.codes_OI, anew.packed[linear].codes_OI), linear
        assert torch.equal(weight.scales_OG, anew.packed[linear].scales_OG), linear
    assert torch.allclose(torch.cat(outputs), plain, atol=1e-5)


@pytest.mark.parametrize("waiting", [True, False])
def test_forwards_beside_a_reference_are_in_float32(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, waiting: bool
) -> None:
    """They are compared with one another; the others only make moments, which can be rounded."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    monkeypatch.setattr(precision, "_backends", lambda: {"cpu": (matmul, "bf16")})
    seen, forward = set(), Qwen3MLP.forward

    def told(self: Qwen3MLP, x: torch.Tensor) -> torch.Tensor:
        if isinstance(getcurrent(), Forward):
            seen.add(matmul.fp32_precision)
        return forward(self, x)

    before = matmul.fp32_precision
    monkeypatch.setattr(Qwen3MLP, "forward", told)
    requantized("Qwen3", settings, waiting=waiting)
    assert seen == {before if settings.asymmetric else "bf16"}
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("waiting", [True, False])
def test_a_reference_goes_ahead_of_the_release_where_it_holds_less(
    monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    """Behind the linears that end a block, and only where it would wait beside the release."""
    seen, send_on = set(), Pair.send_on

    def told(self: Pair) -> None:
        assert self.reference is not None
        before = self.reference.at
        send_on(self)
        seen.add((before, self.reference.at, self.release.at))

    monkeypatch.setattr(Pair, "send_on", told)
    requantized("Qwen3", SETTINGS, waiting=waiting)
    ahead = {
        ("self_attn.o_proj", "mlp.gate_proj", "self_attn.o_proj"),
        ("mlp.down_proj", None, "mlp.down_proj"),
    }
    assert seen == (ahead if waiting else set())


def waiting_at(name: str, inputs: torch.Tensor, stream: torch.Tensor) -> Forward:
    found = Forward(lambda: stream, ())
    found.at, found.inputs, found.streams = name, inputs, {name: stream}
    return found


def test_the_drift_of_a_residual_stream_is_taken_behind_the_linear() -> None:
    torch.manual_seed(0)
    merged_OI, (x, reference_x) = torch.randn(5, 7), torch.randn(2, 2, 6, 7)
    stream, reference_stream = 50 * torch.randn(2, 2, 6, 5)
    pair = Pair(
        release=waiting_at("o_proj", x, stream),
        reference=waiting_at("o_proj", reference_x, reference_stream),
        reduced=False,
    )
    moments = Moments(hessian=Hessian(7), residual=(Drift(5, 7), merged_OI))
    moments.add(pair)

    expected = torch.zeros(2, 5, 7, dtype=torch.float64)
    for window in range(2):
        for token in range(6):
            own, theirs = x[window, token].double(), reference_x[window, token].double()
            behind = stream[window, token].double() + merged_OI.double() @ own
            aimed = reference_stream[window, token].double() + merged_OI.double() @ theirs
            for out in range(5):
                expected[window, out] += (aimed - behind)[out] * own / 6
    assert moments.residual is not None
    assert torch.allclose(moments.residual[0].mean().double(), expected, rtol=1e-4, atol=1e-4)
