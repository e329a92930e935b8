"""Adapters that are damaged, incomplete or another model's: one clear fault each."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig
from safetensors.torch import load_file, save_file

from qmerge.adapters import Adapter, inject, open_adapter
from qmerge.errors import AdapterError
from tests.adapters import tiny

FILE = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    options = LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    return tiny.train(tiny.model(), options, tmp_path / "adapter")


def faults(folder: Path, **options: Any) -> list[str]:
    found = inject(tiny.skeleton(**options), open_adapter(folder)).faults
    assert all(fault.hint and fault.where == str(folder) for fault in found)
    return [fault.message for fault in found]


def edit(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
    change(tensors)
    save_file(tensors, folder / FILE)
    return folder


def test_a_good_adapter_has_no_fault(folder: Path) -> None:
    assert faults(folder) == []


def test_shared_matrix_of_another_model(tmp_path: Path) -> None:
    folder = tiny.train(tiny.model(), VeraConfig(target_modules=["q_proj"], r=4), tmp_path)
    edit(folder, lambda t: t.update({"base_model.vera_A": torch.ones(4, 33)}))
    (message,) = faults(folder)
    assert "vera_A.default is [4, 33], the model has [4, 32]" in message


def test_missing_factor(folder: Path) -> None:
    edit(folder, lambda t: t.pop(f"{Q0}.lora_A.weight"))
    (message,) = faults(folder)
    assert message.startswith("lacks tensors that this model needs: ")
    assert "layers.0.self_attn.q_proj.lora_A" in message


def test_missing_whole_module(folder: Path) -> None:
    edit(folder, lambda t: t.pop("base_model.model.lm_head.weight"))
    (message,) = faults(folder)
    assert "lacks tensors" in message
    assert "lm_head.weight" in message


def test_extra_tensors(folder: Path) -> None:
    extra = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    edit(folder, lambda t: t.update({extra: torch.ones(8, 32)}))
    (message,) = faults(folder)
    assert "no place in this model: model.layers.0.self_attn.k_proj.lora_A.weight" in message


def test_wrong_rank(folder: Path) -> None:
    edit(folder, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(5, 32)}))
    (message,) = faults(folder)
    assert "q_proj.lora_A.default.weight is [5, 32], the model has [8, 32]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    edit(folder, lambda t: t[f"{Q0}.lora_B.weight"].fill_(value))
    (message,) = faults(folder)
    assert message.startswith("holds values that are not finite: model.layers.0.self_attn.q_proj")


def test_whole_numbers_for_weights(folder: Path) -> None:
    edit(folder, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(8, 32, dtype=torch.int8)}))
    assert faults(folder)[0].startswith("holds whole numbers where weights belong: ")


def test_tensors_that_a_sharded_run_left_empty(folder: Path) -> None:
    edit(folder, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(0)}))
    (message,) = faults(folder)
    assert message.startswith("holds empty tensors, as a sharded run saves them: model.layers.0.")


def test_several_faults_at_once(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q0}.lora_A.weight"] = torch.ones(5, 32)
        tensors[f"{Q0}.lora_B.weight"].fill_(torch.nan)
        del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]

    edit(folder, change)
    assert [message.split(":")[0] for message in faults(folder)] == [
        "lacks tensors that this model needs",
        "holds tensors of another shape than this model's",
        "holds values that are not finite",
    ]


def test_a_wider_model(folder: Path) -> None:
    messages = faults(folder, hidden_size=64)
    assert any("layers.0.self_attn.q_proj" in m and "[8, 64]" in m for m in messages)


def test_a_deeper_model(folder: Path) -> None:
    (message,) = faults(folder, num_hidden_layers=3)
    assert "lacks tensors" in message
    assert "layers.2" in message


def test_a_shallower_model(folder: Path) -> None:
    (message,) = faults(folder, num_hidden_layers=1)
    assert "no place in this model" in message
    assert "layers.1" in message


def test_another_architecture(folder: Path) -> None:
    with pytest.raises(AdapterError, match="q_proj"):
        inject(tiny.skeleton("gpt2"), open_adapter(folder))


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_update_of_zero(factor: str, tmp_path: Path) -> None:
    options = LoraConfig(target_modules=["q_proj"])
    folder = tiny.train(tiny.model(), options, tmp_path)
    edit(folder, lambda t: [t[n].zero_() for n in t if factor in n])
    assert faults(folder) == ["its update is zero: merging changes nothing"]
    assert inject(tiny.skeleton(), open_adapter(folder), allow_noop=True).faults == ()


def test_scale_of_zero(tmp_path: Path) -> None:
    options = LoraConfig(target_modules=["q_proj"], lora_alpha=0)
    folder = tiny.train(tiny.model(), options, tmp_path)
    assert faults(folder) == ["its update is zero: merging changes nothing"]


def test_bias_without_a_place(tmp_path: Path) -> None:
    options = LoraConfig(target_modules=["q_proj"], lora_bias=True)
    (message,) = faults(tiny.train(tiny.model(), options, tmp_path))
    assert "base layer has no bias" in message


def test_modules_inside_one_another(tmp_path: Path) -> None:
    """PEFT saves them, and cannot load what it saved."""
    options = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"])
    folder = tiny.train(tiny.model(), options, tmp_path)
    with pytest.raises(KeyError):
        tiny.trained(tiny.model(), folder)
    with pytest.raises(AdapterError, match="PEFT cannot place this adapter's tensors"):
        inject(tiny.skeleton(), open_adapter(folder))


def test_nothing_selected(folder: Path) -> None:
    injection = inject(tiny.skeleton(), open_adapter(folder), selected=lambda _: False)
    assert [fault.message for fault in injection.faults] == ["nothing of it is selected"]


def broken(folder: Path) -> str:
    with pytest.raises(AdapterError) as raised:
        open_adapter(folder)
    assert raised.value.hint
    assert str(folder) in raised.value.message
    return raised.value.message


def test_truncated(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])
    assert "truncated" in broken(folder)


def test_empty_file(folder: Path) -> None:
    (folder / FILE).write_bytes(b"")
    assert FILE in broken(folder)


def test_no_tensors(folder: Path) -> None:
    save_file({}, folder / FILE)
    assert "holds no tensors" in broken(folder)


def test_no_weights(folder: Path) -> None:
    (folder / FILE).unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in broken(folder)


def test_a_kind_that_is_refused_needs_no_weights(folder: Path) -> None:
    """PEFT saves X-LoRA without any; what is said is why it cannot be merged."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "XLORA"}))
    save_file({}, folder / FILE)
    adapter = open_adapter(folder)
    assert adapter.summary["tensors"] == 0
    assert "several adapters anew for every token" in str(adapter.refusal)


def test_no_folder(folder: Path) -> None:
    assert broken(folder / "x") == f"{folder / 'x'}: no such folder"
    assert broken(folder / FILE) == f"{folder / FILE}: is a file"


def test_no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json" in broken(folder)


def test_parent_folder_names_the_adapters_inside(folder: Path) -> None:
    with pytest.raises(AdapterError) as raised:
        open_adapter(folder.parent)
    assert "adapter" in str(raised.value.hint)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": 8}', '{"peft_type": 3}'])
def test_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in broken(folder)


def test_config_that_peft_refuses(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": "COOKING"}))
    assert "PEFT refuses this configuration" in broken(folder)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trap-was-sprung"),))


def test_pickle_with_code_is_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / FILE).unlink()
    torch.save({"weight": Trap()}, folder / "adapter_model.bin")
    assert "more than plain tensors" in broken(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "not an archive of torch.save" in broken(folder)
    assert not (tmp_path / "trap-was-sprung").exists()


def test_plain_pickle_merges(folder: Path) -> None:
    base = tiny.model()
    want = tiny.reference(base, folder)
    torch.save(dict(load_file(folder / FILE)), folder / "adapter_model.bin")
    (folder / FILE).unlink()
    assert tiny.differing(tiny.merged(tiny.injected(folder), base), want) == set()


def test_headers_and_summary(folder: Path) -> None:
    adapter = open_adapter(folder)
    assert isinstance(adapter, Adapter)
    assert (adapter.kind, adapter.rank, adapter.targets) == ("LORA", 8, ("q_proj", "up_proj"))
    assert adapter.tensors[f"{Q0}.lora_A.weight"].shape == (8, 32)
    assert adapter.vocabulary == 64
    assert adapter.summary["modules_to_save"] == ["lm_head"]
    assert adapter.summary["tensors"] == len(adapter.tensors) == 9
    json.dumps(adapter.summary)
