"""The moments of single experts against loops over the model's own routing.

T: tokens, I: in features, O: out features.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qmerge.gptq import GridSpec
from qmerge.job import Settings
from qmerge.model.experts import ENOUGH, opened
from qmerge.model.layer import Call, fill
from qmerge.model.skeleton import Skeleton, build_skeleton
from qmerge.results import FEW_TOKENS
from qmerge.stages.requantize import Calibration, Requantizer, Weight

WIDTH, INNER, EXPERTS, WINDOWS, LENGTH = 64, 32, 4, 6, 40
SHUNNED = 2
SPEC = GridSpec(bits=4, group_size=32, symmetric=True)
BLOCK = "mlp.experts"


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    return build_skeleton(
        transformers.Qwen3MoeConfig(
            hidden_size=WIDTH,
            intermediate_size=96,
            moe_intermediate_size=INNER,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=64,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
        )
    )


@pytest.fixture(scope="module")
def fused(skeleton: Skeleton) -> Any:
    """transformers' own layer; hardly a token chooses the expert SHUNNED."""
    layer = copy.deepcopy(skeleton.fused.get_submodule(skeleton.layer_path(0)))
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(meta.shape, generator=generator) / meta.shape[-1] ** 0.5
        if meta.dim() > 1
        else torch.ones(meta.shape)
        for name, meta in layer.state_dict().items()
    }
    state["mlp.gate.weight"][SHUNNED] = 0.02 * state["mlp.gate.weight"][SHUNNED] - 0.12
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    return layer.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    noise = torch.randn(WINDOWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    return noise + 0.5


@pytest.fixture(scope="module")
def call() -> Call:
    rotary = (torch.ones(1, LENGTH, 16), torch.zeros(1, LENGTH, 16))
    return Call(kwargs={"position_embeddings": rotary, "attention_mask": None})


def routing(fused: Any, hidden: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' own experts get: tokens [T, I] and the experts chosen [T, 2]."""
    got: list[Any] = []
    handle = fused.mlp.experts.register_forward_pre_hook(lambda _m, inputs: got.append(inputs))
    fused(hidden, **call.kwargs)
    handle.remove()
    return got[0][0], got[0][1]


def requantized(
    skeleton: Skeleton, fused: nn.Module, hidden: torch.Tensor, call: Call, waiting: bool
) -> tuple[Requantizer, torch.Tensor]:
    own = opened(skeleton.fusions, skeleton.layer_path(0), fused.state_dict())
    layers = [skeleton.layer(0), skeleton.layer(0)]
    for layer in layers:
        fill(layer, own)
    weights = {
        name.removesuffix(".weight"): Weight(
            merged_OI=tensor, origin_OI=tensor, base=None, spec=SPEC
        )
        for name, tensor in own.items()
        if name.startswith(BLOCK)
    }
    settings = Settings(
        spec=SPEC,
        order="none",
        damping=0.01,
        format="gptq",
        grid="fresh",
        unit_survival=True,
        refine=True,
        asymmetric=True,
    )
    work = Requantizer(layers[0], layers[1], weights, settings)
    calibration = Calibration(
        read=lambda start, stop: (hidden[start:stop], call),
        read_reference=lambda start, stop: (hidden[start:stop], call),
        sample=(hidden[:1], call),
        windows=WINDOWS,
        at_once=2,
        waiting=waiting,
    )
    outputs = [output for output, _ in work.run(calibration)]
    return work, torch.cat(outputs)


@pytest.mark.parametrize("waiting", [True, False])
def test_experts_are_judged_by_the_tokens_that_chose_them(
    skeleton: Skeleton, fused: Any, hidden: torch.Tensor, call: Call, waiting: bool
) -> None:
    tokens_TI, chosen = routing(fused, hidden, call)
    work, output = requantized(skeleton, fused, hidden, call, waiting)
    own = opened(skeleton.fusions, skeleton.layer_path(0), fused.state_dict())
    shunned = int((chosen == SHUNNED).sum())
    assert shunned < WIDTH // ENOUGH < LENGTH * WINDOWS // EXPERTS
    for expert in range(EXPERTS):
        mine = (chosen == expert).any(dim=1)
        few = int(mine.sum()) < WIDTH // ENOUGH
        assert few == (expert == SHUNNED)
        inputs = (tokens_TI if few else tokens_TI[mine]).double()
        made: dict[str, torch.Tensor] = {}
        for name in ("gate_proj", "up_proj", "down_proj"):
            full = f"{BLOCK}.{expert}.{name}"
            result = work.results[full]
            weight_OI = own[f"{full}.weight"].double()
            packed_OI = work.packed[full].dense().double()
            if name == "down_proj":
                gate = torch.nn.functional.silu(inputs @ made["gate_proj"].T)
                inputs = gate * (inputs @ made["up_proj"].T)
            made[name] = packed_OI
            lost = (inputs @ (weight_OI - packed_OI).T).square().sum()
            error = float(lost / (inputs @ weight_OI.T).square().sum())
            assert result.error == pytest.approx(error, rel=1e-3)
            assert result.tokens == int(mine.sum())
            assert result.fallback == (FEW_TOKENS if few else None)
    release = skeleton.layer(0)
    packed = {f"{name}.weight": weight.dense() for name, weight in work.packed.items()}
    fill(release, {**own, **packed})
    torch.testing.assert_close(output, release(hidden, **call.kwargs))
