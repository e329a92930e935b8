"""Forwards that wait are the forwards that they would have been."""

from __future__ import annotations

import pytest
import torch

from qmerge.model.frame import Frame
from qmerge.model.layer import Call, fill, forward, linears, run
from qmerge.model.paused import Forward, watched
from tests.model.test_frame import State, layer_weights, parts

STOPS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture
def layer() -> torch.nn.Module:
    model, skeleton = parts("Qwen3")
    layer = skeleton.layer(0)
    fill(layer, layer_weights(model, skeleton.layer_path(0)))
    return layer


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, Call]]:
    model, skeleton = parts("Qwen3")
    frame = Frame(skeleton, State(model))
    entered = [frame.enter(torch.arange(start, start + 8)[None]) for start in (0, 8, 16)]
    return [(hidden, calls[0]) for hidden, calls in entered]


def test_forwards_that_wait_for_one_another(
    layer: torch.nn.Module, batches: list[tuple[torch.Tensor, Call]]
) -> None:
    expected = [run(layer, *batch) for batch in batches]
    modules, stops = linears(layer), set(STOPS)
    with watched(layer, {name: modules[name] for name in STOPS}, {}):
        waiting = [Forward(lambda b=batch: forward(layer, *b), stops) for batch in batches]  # type: ignore[misc]
        for name in STOPS:
            assert [each.reach(name) for each in waiting] == [True] * 3
            assert [each.reach(name) for each in waiting] == [True] * 3
            stops.remove(name)
        found = [each.finish() for each in waiting]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not torch.is_inference_mode_enabled()


def test_a_linear_changed_while_forwards_wait_before_it_is_the_one_that_runs(
    layer: torch.nn.Module, batches: list[tuple[torch.Tensor, Call]]
) -> None:
    down = linears(layer)["mlp.down_proj"]
    with watched(layer, {"mlp.down_proj": down}, {}):
        waiting = Forward(lambda: forward(layer, *batches[0]), {"mlp.down_proj"})
        assert waiting.reach("mlp.down_proj")
        down.weight = torch.nn.Parameter(down.weight * 2, requires_grad=False)
        found = waiting.finish()
    assert torch.equal(found, run(layer, *batches[0]))


def test_an_error_in_a_forward_reaches_whoever_drives_it(layer: torch.nn.Module) -> None:
    wrong = Forward(lambda: forward(layer, torch.zeros(1, 8, 3), Call()), ())
    with pytest.raises((RuntimeError, TypeError)):
        wrong.reach("mlp.down_proj")


def test_a_dropped_forward_ends_where_it_waits(
    layer: torch.nn.Module, batches: list[tuple[torch.Tensor, Call]]
) -> None:
    ran = []
    handle = layer.get_submodule("mlp.down_proj").register_forward_hook(lambda *_: ran.append(1))
    name = "self_attn.o_proj"
    with watched(layer, {name: layer.get_submodule(name)}, {}):
        waiting = Forward(lambda: forward(layer, *batches[0]), {name})
        assert waiting.reach(name)
        waiting.drop()
    handle.remove()
    assert waiting.dead
    assert not ran
