"""The whole job on a device of its own, which is pretended: see `tests.pretended`."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qmerge import pipeline
from qmerge.evaluate import evaluate
from qmerge.formats import open_format
from qmerge.recipe import EvaluateRecipe, Recipe
from qmerge.results import RunResult
from qmerge.storage.checkpoint import Checkpoint
from tests import checkpoints, pretended
from tests.families import rig
from tests.families.test_experts import FAMILIES as EXPERTS
from tests.families.test_hybrid import FAMILIES as HYBRID
from tests.test_reshaped import untie


def go_there() -> None:
    """What the process that pretends begins with."""
    device = pretended.pretend()
    for name in ("qmerge.plan", "qmerge.evaluate"):
        import_module(name).pick_device = lambda asked: device  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def there() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=go_there) as pool:
        yield pool


def perplexities(result: RunResult) -> dict[str, float]:
    return {arm: next(iter(score.values())).perplexity for arm, score in result.arms.items()}


def alike(here: Path, other: Path) -> float:
    """The share of codes that two releases have in common."""
    same = total = 0
    first, second = (open_format(Checkpoint.open(folder)) for folder in (here, other))
    for name in first.weights:
        one, two = first.integer(name), second.integer(name)
        if one is not None and two is not None:
            same += int((one.codes_OI == two.codes_OI).sum())
            total += one.codes_OI.numel()
    return same / total


def held(asked: Recipe, pool: ProcessPoolExecutor, folder: Path, *, release: float = 5e-3) -> None:
    """A run on the device makes of every arm what one on the CPU makes."""
    here = pipeline.run(replace(asked, out=folder / "here", device="cpu"))
    other = pool.submit(pipeline.run, replace(asked, out=folder / "there")).result()
    wanted, found = perplexities(here), perplexities(other)
    assert found.keys() == wanted.keys()
    for arm, value in wanted.items():
        near = release if arm.startswith("release") else 1e-4
        assert found[arm] == pytest.approx(value, rel=near), arm
    assert alike(folder / "here", folder / "there") > 0.7


@pytest.fixture
def asked(asked: Recipe, eval_text: Path) -> Recipe:
    return replace(asked, eval=(f"held_out={eval_text}",))


SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptq, 3 bits": {"bits": 3, "act_order": "full", "symmetric": False},
    "gptq, in micro-batches": {"memory": 1 << 20, "grid": "anchored"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_gptq_base(
    settings: dict[str, Any],
    asked: Recipe,
    tiny_gptq: Path,
    there: ProcessPoolExecutor,
    tmp_path: Path,
) -> None:
    held(replace(asked, base=tiny_gptq, **settings), there, tmp_path)


def test_a_dense_base(
    asked: Recipe, tiny_original: Path, there: ProcessPoolExecutor, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"objective": "symmetric", "format": "compressed-tensors"}
    held(replace(asked, base=tiny_original, adapter=(), **settings), there, tmp_path)


def test_both_strategies(
    asked: Recipe, tiny_nf4: Path, tiny_original: Path, there: ProcessPoolExecutor, tmp_path: Path
) -> None:
    held(replace(asked, base=tiny_nf4, original=tiny_original, strategy="auto"), there, tmp_path)


def test_a_quantized_head(
    asked: Recipe, tiny_original: Path, there: ProcessPoolExecutor, tmp_path: Path
) -> None:
    base = untie(tiny_original, tmp_path / "untied")
    settings: dict[str, Any] = {"override": ("lm_head=bits:8",), "act_order": "full"}
    held(replace(asked, base=base, **settings), there, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FalconH1", "Qwen3Moe"])
def test_buffers_of_a_layer_s_own_and_experts(
    name: str, eval_text: Path, there: ProcessPoolExecutor, tmp_path: Path
) -> None:
    settings = EXPERTS[name] if name in EXPERTS else HYBRID[name][0]
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base, adapter, tokenizer = (tmp_path / part for part in ("base", "adapter", "tokenizer"))
    checkpoints.write_tokenizer(tokenizer)
    rig.write_model(base, model, tokenizer)
    rig.write_adapter(adapter, model.float(), target_modules=["q_proj", "o_proj"])
    held(rig.recipe(base, adapter, tmp_path / "out", eval_text), there, tmp_path, release=0.05)


def test_scores_of_a_folder(
    tiny_gptq: Path, tiny_adapter: Path, eval_text: Path, there: ProcessPoolExecutor
) -> None:
    asked = EvaluateRecipe(
        models=(f"base={tiny_gptq}", f"tuned={tiny_gptq}+{tiny_adapter}"),
        reference="tuned",
        eval=(f"held_out={eval_text}",),
        eval_windows=2,
        sequence_length=64,
    )
    wanted = perplexities(evaluate(replace(asked, device="cpu")))
    assert perplexities(there.submit(evaluate, asked).result()) == pytest.approx(wanted, rel=1e-4)
