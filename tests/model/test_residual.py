"""Residual streams are found where a layer has them, and only there."""

from __future__ import annotations

import pytest
import torch

from qmerge.model.frame import Frame
from qmerge.model.layer import fill, forward, linears
from qmerge.model.paused import Forward, watched
from qmerge.model.residual import residual_places
from tests.model.test_frame import State, layer_weights, parts

PRE_NORM = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama", PRE_NORM),
        ("Qwen3", PRE_NORM),
        # Gemma 2 norms what a linear put out before it is added.
        ("Gemma2", {}),
    ],
)
def test_places(name: str, expected: dict[str, str]) -> None:
    model, skeleton = parts(name)
    hidden, calls = Frame(skeleton, State(model)).enter(torch.arange(8)[None])
    layer = skeleton.layer(1)
    fill(layer, layer_weights(model, skeleton.layer_path(1)))
    assert residual_places(layer, hidden, calls[1], linears(layer)) == expected


def test_what_is_read_is_what_the_output_is_added_to() -> None:
    model, skeleton = parts("Qwen3")
    hidden, calls = Frame(skeleton, State(model)).enter(torch.arange(8)[None])
    layer = skeleton.layer(0)
    fill(layer, layer_weights(model, skeleton.layer_path(0)))
    down = layer.get_submodule("mlp.down_proj")
    before = {name: layer.get_submodule(name) for name in PRE_NORM}
    with watched(layer, before, PRE_NORM):
        passing = Forward(lambda: forward(layer, hidden, calls[0]), before)
        assert passing.reach("self_attn.o_proj")
        assert passing.stream is hidden
        before.pop("self_attn.o_proj")
        assert passing.reach("mlp.down_proj")
        inputs, stream = passing.inputs, passing.stream
        last = passing.finish()
    assert torch.equal(stream + down(inputs), last)
