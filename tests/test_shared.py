"""The main job on larger checkpoints that other libraries wrote, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qmerge.pipeline import run
from qmerge.recipe import Recipe
from tests.test_pipeline import close, load, perplexity

LENGTH, WINDOWS = 256, 4


@pytest.mark.parametrize("kind", ["gptq", "nf4"])
def test_arms_and_release_equal_transformers(kind: str, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="opening a GPTQ base needs the extra 'verify'")
    from transformers import AutoTokenizer

    base, adapter = shared / "models" / f"base-{kind}", shared / "models" / f"adapter-{kind}"
    text = shared / "data" / "shakespeare-eval.txt"
    out = tmp_path / "release"
    result = run(
        Recipe(
            base=base,
            adapter=(str(adapter),),
            original=shared / "models" / "original",
            strategy="auto",
            out=out,
            calibration=str(shared / "data" / "shakespeare-train.txt"),
            calibration_samples=8,
            eval=(f"held_out={text}",),
            eval_windows=WINDOWS,
            sequence_length=LENGTH,
            group_size=64,
        )
    )
    ids = AutoTokenizer.from_pretrained(base)(text.read_text(), verbose=False)["input_ids"]
    tokens = torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
    scores = {arm: found["held_out"].perplexity for arm, found in result.arms.items()}
    assert close(scores["quantized_base"], perplexity(load(base), tokens), 1e-3)
    assert close(scores["trained"], perplexity(load(base, adapter), tokens), 1e-3)
    assert close(scores["original"], perplexity(load(shared / "models/original"), tokens), 1e-4)
    assert close(scores["release"], perplexity(load(out), tokens), 2e-3)
    assert result.strategy.chosen == "dequantize"
    assert abs(result.survival.survival - 1) < 0.03
