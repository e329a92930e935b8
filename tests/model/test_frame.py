"""Walking a model layer by layer gives what its own forward gives, for every family at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from qmerge.errors import ModelError
from qmerge.model.experts import opened
from qmerge.model.frame import Frame
from qmerge.model.layer import Call, before_linears, fill, linears, move, run, sibling_groups
from qmerge.model.probe import probe
from qmerge.model.skeleton import Skeleton, build_skeleton

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
VOCAB = {"vocab_size": 300, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
HEAD = {"head_dim": 16}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
GPT = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads",)}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SMALL,
    "Mistral": {**SMALL, "sliding_window": 5},
    "Qwen2": {**SMALL, "tie_word_embeddings": True},
    "Qwen3": {**SMALL, **HEAD},
    "Gemma": {**SMALL, **HEAD},
    "Gemma2": {**SMALL, **HEAD, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "Gemma3Text": {**SMALL, **HEAD, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "Phi": SMALL,
    "Phi3": SMALL,
    "Cohere": SMALL,
    "Granite": SMALL,
    "Falcon": GPT,
    "GPTNeoX": GPT,
    "GPT2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300},
    "OPT": {**GPT, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "XGLM": {"d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4, **VOCAB},
    "Qwen3Moe": {**SMALL, **HEAD, **MOE},
    "Mixtral": {**SMALL, "num_local_experts": 4},
    "Qwen2Moe": {**SMALL, **MOE, "shared_expert_intermediate_size": 64},
    "DeepseekV2": {**SMALL, **MLA},
    "DeepseekV3": {**SMALL, **MLA, "n_group": 2, "topk_group": 1},
    "GptOss": {**SMALL, **HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def parts(name: str) -> tuple[Any, Skeleton]:
    """A model of real weights, and the skeleton of its configuration."""
    values = {k: v for k, v in FAMILIES[name].items() if name != "OPT" or k != "intermediate_size"}
    config = getattr(transformers, f"{name}Config")(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model, build_skeleton(config)


class State:
    """Outer weights from a state dictionary."""

    def __init__(self, model: Any) -> None:
        self.state = model.state_dict()

    def tensor(self, name: str) -> torch.Tensor:
        return self.state[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.state[name][start:stop]

    def row_count(self, name: str) -> int:
        return len(self.state[name])

    def holds(self, name: str) -> bool:
        return name in self.state


def layer_weights(model: Any, path: str) -> dict[str, torch.Tensor]:
    """As linears have them, also where the model keeps them transposed."""
    layer = model.get_submodule(path)
    turned = {n: m for n, m in layer.named_modules() if isinstance(m, Conv1D)}
    return layer.state_dict() | {f"{n}.weight": m.weight.T for n, m in turned.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_equals_forward(name: str) -> None:
    model, skeleton = parts(name)
    tokens = torch.randint(0, 300, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
    frame = Frame(skeleton, State(model))
    hidden, _ = frame.enter(tokens)
    for index, call in enumerate(frame.calls(tokens.shape[1])):
        layer = skeleton.layer(index)
        path = skeleton.layer_path(index)
        fill(layer, opened(skeleton.fusions, path, layer_weights(model, path)))
        hidden = run(layer, hidden, call)
    rows = frame.leave(hidden).flatten(0, 1)
    slices = [frame.logits(rows, at, frame.head_rows(at, at + 128)) for at in range(0, 300, 128)]
    torch.testing.assert_close(torch.cat(slices, 1).view_as(expected), expected)
    probe(skeleton)


@pytest.mark.parametrize("name", ["Zamba", "CpmAnt"])
def test_a_model_whose_layers_get_more_of_the_tokens_is_refused(name: str) -> None:
    zamba = {"layers_block_type": ["mamba", "mamba", "hybrid"], "tie_word_embeddings": False}
    settings: dict[str, dict[str, Any]] = {
        "Zamba": {**SMALL, **zamba},
        "CpmAnt": {**GPT, "dim_head": 16, "dim_ff": 96},
    }
    config = getattr(transformers, f"{name}Config")(**settings[name])
    with pytest.raises(ModelError, match="layer by layer") as caught:
        probe(build_skeleton(config))
    assert "more of the tokens" in str(caught.value.hint)


def test_a_model_that_cannot_be_made_with_few_layers_is_refused() -> None:
    """Zamba's hybrid layers share the weights of the first of them."""
    kinds = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
    skeleton = build_skeleton(transformers.ZambaConfig(**{**SMALL, **kinds}))
    with pytest.raises(ModelError, match="cannot be made with 2 layers") as caught:
        probe(skeleton)
    assert "layers that need others" in str(caught.value.hint)


def test_a_model_with_state_between_layers_is_refused() -> None:
    _, skeleton = parts("Llama")
    layer = type(skeleton.model.get_submodule(skeleton.layer_path(0)))
    forward = layer.forward

    def leaky(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adds what the layer before it saw, kept outside the hidden states."""
        before = getattr(leaky, "seen", None)
        leaky.seen = hidden  # type: ignore[attr-defined]
        same = before is not None and before.shape == hidden.shape and not before.is_meta
        return forward(self, hidden + before if same else hidden, *args, **kwargs)

    layer.forward = leaky
    try:
        with pytest.raises(ModelError, match="layer by layer"):
            probe(skeleton)
    finally:
        layer.forward = forward


def test_siblings_are_the_linears_that_read_one_tensor() -> None:
    model, skeleton = parts("Qwen3")
    frame = Frame(skeleton, State(model))
    hidden, calls = frame.enter(torch.arange(8)[None])
    layer = skeleton.layer(0)
    fill(layer, layer_weights(model, skeleton.layer_path(0)))
    assert sibling_groups(layer, hidden, calls[0], linears(layer)) == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )


def test_a_weight_changed_before_its_linear_runs_is_the_one_that_runs() -> None:
    model, skeleton = parts("Qwen3")
    frame = Frame(skeleton, State(model))
    hidden, calls = frame.enter(torch.arange(8)[None])
    layer = skeleton.layer(0)
    fill(layer, layer_weights(model, skeleton.layer_path(0)))
    down = layer.get_submodule("mlp.down_proj")

    def silence(_name: str, _inputs: torch.Tensor) -> None:
        down.weight = torch.nn.Parameter(torch.zeros(64, 96), requires_grad=False)

    full = run(layer, hidden, calls[0])
    with before_linears(layer, {"mlp.down_proj": down}, silence):
        silenced = run(layer, hidden, calls[0])
    assert not torch.equal(full, silenced)
    assert torch.equal(run(layer, hidden, calls[0]), silenced)


def test_a_layer_without_all_its_weights_is_an_error() -> None:
    model, skeleton = parts("Llama")
    weights = layer_weights(model, skeleton.layer_path(0))
    weights.pop("mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"mlp\.up_proj\.weight"):
        fill(skeleton.layer(0), weights)


def test_what_layers_share_is_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, moved, to = torch.ones(3), [], torch.Tensor.to

    def counted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(tensor)
        return to(tensor, device)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    first, second = move([Call(args=(shared,), kwargs={"mask": shared})] * 2, torch.device("meta"))
    assert first.args[0] is second.kwargs["mask"]
    assert first.args[0].is_meta
    assert len(moved) == 1
