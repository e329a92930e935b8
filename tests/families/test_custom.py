"""Models whose code lies in their folder: refused by name, or run where the user says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from qmerge.pipeline import run
from qmerge.plan import make_plan
from tests import checkpoints
from tests.families import rig
from tests.families.test_dense import SMALL

CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class Loud(nn.Module):
    def forward(self, hidden):
        return hidden.abs()


class LoudConfig(LlamaConfig):
    model_type = "loud_llama"


class LoudModel(LlamaModel):
    config_class = LoudConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp.act_fn = Loud()


class LoudForCausalLM(LlamaForCausalLM):
    config_class = LoudConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LoudModel(config)
        self.post_init()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a class that only its own file knows, and an adapter on it."""
    cache = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    code, tokenizer = tmp_path / "code", tmp_path / "tokenizer"
    code.mkdir()
    (code / "loud.py").write_text(CODE)
    classes = {"AutoConfig": "loud.LoudConfig", "AutoModelForCausalLM": "loud.LoudForCausalLM"}
    settings = {**SMALL, "model_type": "loud_llama", "auto_map": classes}
    (code / "config.json").write_text(json.dumps(settings))
    checkpoints.write_tokenizer(tokenizer)
    config = AutoConfig.from_pretrained(code, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    rig.write_model(tmp_path / "base", model, tokenizer)
    saved = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**saved, "auto_map": classes}))
    (tmp_path / "base" / "loud.py").write_text(CODE)
    rig.write_adapter(tmp_path / "adapter", model.float())
    return tmp_path


def test_own_code_is_refused_by_name(folder: Path, eval_text: Path) -> None:
    recipe = rig.recipe(folder / "base", folder / "adapter", folder / "release", eval_text)
    (fault,) = make_plan(recipe).faults
    assert "'loud_llama' needs own code" in fault.message
    assert "--trust-remote-code" in str(fault.hint)


def test_own_code_is_run_where_it_is_trusted(folder: Path, eval_text: Path) -> None:
    base, adapter, out = (folder / name for name in ("base", "adapter", "release"))
    result = run(rig.recipe(base, adapter, out, eval_text, trust_remote_code=True))
    assert (out / "loud.py").read_text() == CODE

    class Trusting:
        @staticmethod
        def from_pretrained(path: Path, **options: object) -> object:
            return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)

    release = rig.reopened(out, folder / "decoded", Trusting)
    tokens = rig.windows(base, eval_text)
    rig.check_arms(result, rig.dense(base, Trusting), adapter, release, tokens)
