"""Several adapters: one after the other, weighed, combined; and partial states."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qmerge.adapters import Chain, Change, combine, inject, open_adapter, overlay
from qmerge.errors import AdapterError, PlanError, RecipeError
from qmerge.recipe import Combination
from tests.adapters import tiny

Tensors = dict[str, torch.Tensor]


def lora(folder: Path, seed: int, **options: Any) -> Path:
    made = LoraConfig(**{"target_modules": ["q_proj", "up_proj"], **options})
    return tiny.train(tiny.model(), made, folder, seed=seed)


def weighed(base: Any, folder: Path, weight: float) -> Tensors:
    """PEFT's merge with the scale of every layer multiplied."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    live = tiny.trained(base, folder)
    for module in live.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(weight)
    return dict(live.merge_and_unload().state_dict())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_weight(options: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.model()
    folder = lora(tmp_path, 1, **options)
    injection = inject(tiny.skeleton(), open_adapter(folder), weight=0.3)
    assert injection.faults == ()
    assert tiny.differing(tiny.merged(injection, base), weighed(base, folder, 0.3)) == set()


def test_weight_on_experts(tmp_path: Path) -> None:
    base = tiny.model("qwen3_moe")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    made = LoraConfig(target_modules=["q_proj"], target_parameters=targets)
    folder = tiny.train(base, made, tmp_path)
    injection = inject(tiny.skeleton("qwen3_moe"), open_adapter(folder), weight=0.3)
    assert tiny.differing(tiny.merged(injection, base), weighed(base, folder, 0.3)) == set()


def test_weight_that_means_nothing(tmp_path: Path) -> None:
    made = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    folder = tiny.train(tiny.model(), made, tmp_path)
    (fault,) = inject(tiny.skeleton(), open_adapter(folder), weight=0.5).faults
    assert "a weight of 0.5 means nothing for IA3" in fault.message


def chain(*changes: Change) -> Chain:
    return Chain(links=changes)


def test_one_after_the_other(tmp_path: Path) -> None:
    """The second adapter is of another kind and takes the norm of what the first one left."""
    base = tiny.model()
    first = lora(tmp_path / "a", 1, use_dora=True, modules_to_save=["lm_head"])
    made = LoHaConfig(target_modules=["q_proj", "down_proj"])
    second = tiny.train(base, made, tmp_path / "b", seed=2)
    third = lora(tmp_path / "c", 3, use_dora=True, target_modules=["q_proj", "lm_head"])
    links = [inject(tiny.skeleton(), open_adapter(folder)) for folder in (first, second, third)]
    whole = copy.deepcopy(base)
    for folder in (first, second, third):
        state = tiny.reference(whole, folder)
        whole.load_state_dict(state)
    got = chain(*links)
    assert got.faults == ()
    assert tiny.differing(tiny.merged(got, base), state) == set()
    assert got.touched == tiny.differing(base.state_dict(), state)


def test_last_of_a_chain_is_live(tmp_path: Path) -> None:
    base = tiny.model()
    folders = [lora(tmp_path / "a", 1), lora(tmp_path / "b", 2)]
    got = chain(*(inject(tiny.skeleton(), open_adapter(folder)) for folder in folders))
    between = tiny.reference(base, folders[0])
    path = "model.layers.0.self_attn.q_proj"
    live = got.live(path)
    got.fill(live, tiny.under(base.state_dict(), path))
    middle = copy.deepcopy(base)
    middle.load_state_dict(between)
    whole = tiny.trained(middle, folders[1]).base_model.model.get_submodule(path)
    X = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(live(X), whole(X))


def peft_combined(base: Any, folders: list[Path], weights: list[float], **options: Any) -> Tensors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="a0")
        for i, folder in enumerate(folders[1:], 1):
            model.load_adapter(folder, f"a{i}")
        torch.manual_seed(0)
        names = [f"a{i}" for i in range(len(folders))]
        model.add_weighted_adapter(names, weights, "combined", **options)
        model.set_adapter("combined")
        return dict(model.merge_and_unload().state_dict())


DENSE = ("linear", "cat", "svd")


@pytest.mark.parametrize("method", get_args(Combination))
def test_combined_as_peft_combines(method: Combination, tmp_path: Path) -> None:
    base = tiny.model()
    folders = [
        lora(tmp_path / "a", 1, target_modules=["q_proj", "up_proj", "embed_tokens"]),
        lora(tmp_path / "b", 2, target_modules=["q_proj", "down_proj"], lora_alpha=3),
    ]
    density = None if method in DENSE else 0.6
    want = peft_combined(base, folders, [0.7, -0.4], combination_type=method, density=density)
    adapters = [open_adapter(folder) for folder in folders]
    made = combine(tiny.skeleton(), adapters, [0.7, -0.4], method, density=density)
    injection = inject(tiny.skeleton(), made)
    assert injection.faults == ()
    assert tiny.differing(tiny.merged(injection, base), want) == set()


def test_combined_ranks(tmp_path: Path) -> None:
    base = tiny.model()
    folders = [lora(tmp_path / "a", 1, r=3), lora(tmp_path / "b", 2, r=5)]
    want = peft_combined(base, folders, [1.0, 0.5], combination_type="cat")
    adapters = [open_adapter(folder) for folder in folders]
    made = combine(tiny.skeleton(), adapters, [1.0, 0.5], "cat")
    assert tiny.differing(tiny.merged(inject(tiny.skeleton(), made), base), want) == set()
    with pytest.raises(AdapterError, match="same r value"):
        combine(tiny.skeleton(), adapters, [1.0, 0.5], "linear")


def test_combined_rank_stabilized_keep_their_scale(tmp_path: Path) -> None:
    """By `cat` the combination is the weighed sum of both updates, to rounding."""
    base = tiny.model()
    folders = [lora(tmp_path / "a", 1, use_rslora=True), lora(tmp_path / "b", 2, use_rslora=True)]
    made = combine(tiny.skeleton(), [open_adapter(f) for f in folders], [1.0, 0.5], "cat")
    assert [note for note in made.notes if "rank-stabilized" in note] == list(made.notes)
    got = tiny.merged(inject(tiny.skeleton(), made), base)
    one, half = tiny.reference(base, folders[0]), weighed(base, folders[1], 0.5)
    for name, start in base.state_dict().items():
        torch.testing.assert_close(got[name], one[name] + half[name] - start, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "olora"},
    ],
)
def test_nothing_is_lost_in_a_combination(options: dict[str, Any], tmp_path: Path) -> None:
    adapters = [
        open_adapter(lora(tmp_path / "a", 1)),
        open_adapter(lora(tmp_path / "b", 2, **options)),
    ]
    with pytest.raises(AdapterError, match="cannot be combined") as raised:
        combine(tiny.skeleton(), adapters, [1, 1], "cat")
    assert "one after the other" in str(raised.value.hint)


def test_different_embeddings_are_not_combined(tmp_path: Path) -> None:
    folders = [lora(tmp_path / name, 1, target_modules=["embed_tokens"]) for name in "ab"]
    file = folders[1] / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**load_file(file), name: torch.ones(64, 32)}, file)
    with pytest.raises(AdapterError, match=r"different values of model\.embed_tokens\.weight"):
        combine(tiny.skeleton(), [open_adapter(f) for f in folders], [1, 1], "cat")


def test_no_layer_is_lost_in_a_combination(tmp_path: Path) -> None:
    folders = [lora(tmp_path / "a", 1, layers_to_transform=[0]), lora(tmp_path / "b", 2)]
    with pytest.raises(AdapterError, match=r"leaves out model\.layers\.1"):
        combine(tiny.skeleton(), [open_adapter(f) for f in folders], [1, 1], "cat")


def test_combination_needs_sound_adapters(tmp_path: Path) -> None:
    folders = [lora(tmp_path / "a", 1), lora(tmp_path / "b", 2)]
    for folder in folders:
        file = folder / "adapter_model.safetensors"
        save_file({n: t * torch.nan for n, t in load_file(file).items()}, file)
    adapters = [open_adapter(folder) for folder in folders]
    with pytest.raises(PlanError) as raised:
        combine(tiny.skeleton(), adapters, [1, 1], "cat")
    assert [fault.where for fault in raised.value.faults] == [str(f) for f in folders]


def test_each_part_of_a_combination_does_something(tmp_path: Path) -> None:
    zero = tiny.train(tiny.model(), LoraConfig(target_modules=["q_proj"]), tmp_path / "b", scale=0)
    folders = [lora(tmp_path / "a", 1, target_modules=["q_proj"]), zero]
    adapters = [open_adapter(folder) for folder in folders]
    for weights, idle in (([1, 1], folders[1:]), ([0, 1], folders)):
        with pytest.raises(PlanError) as raised:
            combine(tiny.skeleton(), adapters, weights, "cat")
        assert [fault.where for fault in raised.value.faults] == [str(f) for f in idle]
    assert combine(tiny.skeleton(), adapters, [1, 1], "cat", allow_noop=True).refusal is None


def test_combination_that_needs_a_density(tmp_path: Path) -> None:
    adapters = [open_adapter(lora(tmp_path / "a", 1))]
    with pytest.raises(RecipeError, match="density"):
        combine(tiny.skeleton(), adapters, [1], "ties")


@pytest.mark.parametrize("form", ["pickle", "safetensors", "wrapped"])
def test_partial_state(form: str, tmp_path: Path) -> None:
    base = tiny.model()
    names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    new = {name: torch.randn_like(base.state_dict()[name]) for name in names}
    file = tmp_path / ("state.safetensors" if form == "safetensors" else "state.bin")
    if form == "safetensors":
        save_file(new, file)
    elif form == "wrapped":
        spelled = {
            f"module.base_model.model.{n.replace('up_proj', 'up_proj.base_layer')}": t
            for n, t in new.items()
        }
        torch.save(spelled, file)
    else:
        torch.save(new, file)
    made = overlay(tiny.skeleton(), file)
    assert made.faults == ()
    assert made.touched == set(names)
    assert bool(made.renamed) == (form == "wrapped")
    assert tiny.differing(tiny.merged(made, base), {**base.state_dict(), **new}) == set()


@pytest.mark.parametrize("generation", ["language_model.model.", "model."])
def test_partial_state_of_a_vision_language_model(generation: str, tmp_path: Path) -> None:
    """Merger, last layer and head, named as older libraries and PEFT named them."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(tiny.vision_language())
    names = {
        "visual.merger.mlp.0.weight": "model.visual.merger.mlp.0.weight",
        f"{generation}layers.1.mlp.up_proj.weight": (
            "model.language_model.layers.1.mlp.up_proj.weight"
        ),
        f"{generation}norm.weight": "model.language_model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    places = dict(model.named_parameters())
    new = {f"base_model.model.{old}": torch.randn(places[n].shape) for old, n in names.items()}
    torch.save(new, tmp_path / "non_lora_state_dict.bin")
    made = overlay(model, tmp_path / "non_lora_state_dict.bin")
    assert made.faults == ()
    assert made.touched == set(names.values())
    assert all(
        torch.equal(made.values[name], new[f"base_model.model.{old}"])
        for old, name in names.items()
    )


def test_partial_state_under_an_adapter(tmp_path: Path) -> None:
    base = tiny.model()
    name = "model.layers.1.self_attn.q_proj.weight"
    new = torch.randn(32, 32)
    torch.save({name: new}, tmp_path / "state.pt")
    folder = lora(tmp_path / "a", 1, use_dora=True)
    changed = copy.deepcopy(base)
    changed.load_state_dict({name: new}, strict=False)
    got = chain(
        overlay(tiny.skeleton(), tmp_path / "state.pt"),
        inject(tiny.skeleton(), open_adapter(folder)),
    )
    assert tiny.differing(tiny.merged(got, base), tiny.reference(changed, folder)) == set()


def test_partial_state_of_a_tied_model(tmp_path: Path) -> None:
    new = torch.randn(64, 32)
    torch.save({"model.embed_tokens.weight": new}, tmp_path / "one.pt")
    both = {"model.embed_tokens.weight": new, "lm_head.weight": new + 1}
    torch.save(both, tmp_path / "two.pt")
    skeleton = tiny.skeleton(tie_word_embeddings=True)
    one, two = overlay(skeleton, tmp_path / "one.pt"), overlay(skeleton, tmp_path / "two.pt")
    assert one.touched == two.touched == set(both)
    assert (one.unties, two.unties) == (False, True)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.visual.x.weight": torch.ones(2)}, "no place in this model: model.visual.x.weight"),
        ({"model.norm.weight": torch.ones(7)}, "model.norm.weight is [7], the model has [32]"),
        ({"model.norm.weight": torch.full((32,), torch.nan)}, "not finite"),
        ({"norm.weight": torch.ones(32), "model.norm.weight": torch.zeros(32)}, "two values"),
    ],
)
def test_partial_state_faults(tensors: Tensors, message: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "state.pt")
    (fault,) = overlay(tiny.skeleton(), tmp_path / "state.pt").faults
    assert message in fault.message


@pytest.mark.parametrize("moved", [False, True])
def test_partial_state_that_holds_the_adapter_too(moved: bool, tmp_path: Path) -> None:
    """`torch.save` of all that required gradients: PEFT's parameters, and those beside them."""
    torch.manual_seed(1)
    options = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    live = get_peft_model(copy.deepcopy(tiny.model()), options)
    live.base_model.model.model.norm.weight.requires_grad_(True)
    trained = {name: p for name, p in live.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data += torch.randn_like(parameter) * 0.1
    live.save_pretrained(tmp_path)
    if moved:
        next(p for name, p in trained.items() if "lora_A" in name).data += 1
    torch.save(trained, tmp_path / "state.pt")
    adapter = open_adapter(tmp_path)
    made = overlay(tiny.skeleton(), tmp_path / "state.pt", adapters=[adapter])
    if moved:
        (fault,) = made.faults
        assert "no place in this model: model.layers.0.self_attn.q_proj.lora_A" in fault.message
        return
    assert made.faults == ()
    assert "4 tensors in it are the adapter's own" in made.notes
    got = tiny.merged(chain(inject(tiny.skeleton(), adapter), made), tiny.model())
    assert tiny.differing(got, dict(live.merge_and_unload().state_dict())) == set()


def test_partial_state_with_something_else_in_it(tmp_path: Path) -> None:
    torch.save({"step": 3}, tmp_path / "state.pt")
    with pytest.raises(AdapterError, match="not a plain tensor"):
        overlay(tiny.skeleton(), tmp_path / "state.pt")
    with pytest.raises(AdapterError, match="no such file"):
        overlay(tiny.skeleton(), tmp_path / "absent.pt")
