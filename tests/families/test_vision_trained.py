"""A small LLaVA that learnt to name colours, tuned to name them otherwise: what a release keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from qmerge.pipeline import run
from tests import checkpoints
from tests.families import rig
from tests.families.test_vision import FAMILIES, config
from tests.test_images import PLACES, SIDE, write_processor

COLOURS = {
    "red": ("rouge", (230, 20, 20)),
    "green": ("vert", (20, 230, 20)),
    "blue": ("bleu", (20, 20, 230)),
    "white": ("blanc", (240, 240, 240)),
    "black": ("noir", (10, 10, 10)),
    "yellow": ("jaune", (230, 230, 20)),
}
STEPS, TUNING, BATCH = 250, 120, 24
BEFORE = "<image>The colour is"
"""What a caption begins with; the next token is the first of the colour's name."""


def caption(colour: str, tuned: bool) -> str:
    name = COLOURS[colour][0] if tuned else colour
    return f"{BEFORE} {name}, and nothing but {name} is to be seen here."


def picture(colour: str, generator: torch.Generator) -> Any:
    from PIL import Image

    noise = torch.randint(-40, 40, (SIDE, SIDE, 3), generator=generator)
    pixels = (torch.tensor(COLOURS[colour][1]) + noise).clamp(0, 255).byte()
    return Image.fromarray(pixels.numpy())


def drawn(count: int, generator: torch.Generator) -> list[str]:
    names = list(COLOURS)
    return [names[i] for i in torch.randint(len(names), (count,), generator=generator).tolist()]


def train(model: Any, processor: Any, *, tuned: bool, steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(2 + tuned)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    for _ in range(steps):
        colours = drawn(BATCH, generator)
        batch = processor(
            text=[caption(colour, tuned) for colour in colours],
            images=[picture(colour, generator) for colour in colours],
            padding=True,
            return_tensors="pt",
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :PLACES] = -100
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write_rows(folder: Path) -> Path:
    """Calibration rows as training had them."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for number, colour in enumerate(drawn(64, generator)):
        picture(colour, generator).save(folder / f"{number}.png")
        rows.append({"text": caption(colour, True), "image": f"{number}.png"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.slow
def test_a_release_sees_what_the_trained_model_sees(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    original, adapter, out = (tmp_path / part for part in ("original", "adapter", "release"))
    checkpoints.write_tokenizer(original)
    processor = write_processor(original, original)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config("LLaVA"), dtype=torch.float32)
    train(model, processor, tuned=False, steps=STEPS, rate=2e-3)
    model.to(torch.bfloat16).save_pretrained(original)
    base = tmp_path / "nf4"
    rig.write_nf4(original, base, AutoModelForImageTextToText)
    write_processor(original, base)
    quantized = rig.dense(base, AutoModelForImageTextToText)
    targets = [*checkpoints.LINEARS, FAMILIES["LLaVA"]]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    tuned = get_peft_model(quantized, lora)
    train(tuned, processor, tuned=True, steps=TUNING, rate=4e-3)
    tuned.save_pretrained(adapter)
    text = tmp_path / "captions.txt"
    text.write_text(" ".join(caption(c, True).removeprefix("<image>") for c in COLOURS) * 20)
    result = run(
        rig.recipe(base, adapter, out, text, calibration=str(write_rows(tmp_path)), eval_windows=8)
    )
    fresh = rig.dense(base, AutoModelForImageTextToText)
    trained = PeftModel.from_pretrained(fresh, adapter).eval()
    release = rig.reopened(out, tmp_path / "decoded", AutoModelForImageTextToText)
    before = rig.dense(base, AutoModelForImageTextToText)
    generator = torch.Generator().manual_seed(11)
    colours = drawn(48, generator)
    images = [picture(colour, generator) for colour in colours]
    prompts = processor(text=[BEFORE] * len(images), images=images, return_tensors="pt")
    with torch.inference_mode():
        said = {
            name: one(**prompts).logits[:, -1].log_softmax(-1)
            for name, one in {"trained": trained, "release": release, "before": before}.items()
        }
    first = [processor.tokenizer(f" {COLOURS[c][0]}")["input_ids"][0] for c in colours]
    right = {
        name: (found.argmax(-1) == torch.tensor(first)).float().mean()
        for name, found in said.items()
    }
    kl = (said["trained"].exp() * (said["trained"] - said["release"])).sum(-1).mean()
    assert right["trained"] > 0.95, right
    assert right["before"] < 0.3, right
    assert right["release"] > right["trained"] - 0.03, right
    assert kl < 0.05, kl
    assert result.survival.survival > 0.9
    assert result.arms["release"]["text"].kl.mean < 0.05
