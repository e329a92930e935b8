"""Forwards that wait are the forwards that they would have been."""

from __future__ import annotations

import pytest
import torch

from qmerge.model.frame import Frame
from qmerge.model.layer import Call, fill, forward, linears, run
from qmerge.model.paused import Forward, held_bytes, lighter, most_held, watched
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


class Named(torch.nn.Module):
    """A layer of which it can be read off what it names before each of its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 8, bias=False)
        self.second = torch.nn.Linear(8, 4, bias=False)
        self.third = torch.nn.Linear(4, 4, bias=False)

    def forward(self, entered: torch.Tensor, *, shared: torch.Tensor) -> torch.Tensor:
        wide = self.first(entered)  # 4 of each token are named
        turned = wide.view_as(wide) * 2
        half = turned[..., ::2]  # a view: no bytes of its own
        narrow = self.second(turned)  # 4, 8 and 8
        del wide, half, turned
        total: torch.Tensor = self.third(narrow + shared)  # 4, 4 and what goes in, 4
        return total


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_waiting_forward_holds_what_its_frames_name(device: str) -> None:
    layer = Named().to(device)
    hidden = torch.zeros(2, 3, 4, device=device)
    call = Call(kwargs={"shared": torch.zeros(1, 3, 4, device=device)})
    modules = linears(layer)
    numbers = {"first": 4, "second": 4 + 8 + 8, "third": 4 + 4 + 4, "": 4}
    held = {stop: 4 * 2 * 3 * each for stop, each in numbers.items()}
    assert held_bytes(layer, hidden, call, modules) == held
    del held["first"], held["second"]
    assert held_bytes(layer, hidden, call, {"third": modules["third"]}) == held


def test_two_forwards_hold_least_where_one_goes_on_to_where_it_holds_less() -> None:
    held = {"q": 2, "o": 9, "gate": 3, "down": 7, "": 1}
    assert lighter(held) == {"o", "down"}
    assert most_held(held) == (9, 9 + 3)
    assert most_held(held | {"o": 3}) == (7, 7 + 1)
