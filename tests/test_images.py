"""Rows with images become windows that hold each image whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge.corpus import Corpus
from qmerge.errors import CorpusError
from qmerge.images import image_rows, load_images
from tests import checkpoints

SIDE, PATCH = 16, 4
PLACES = (SIDE // PATCH) ** 2
"""Tokens that stand for one image."""
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)


def write_processor(tokenizer: Path, folder: Path) -> Any:
    """LLaVA's processor around a tokenizer, saved as transformers saves it."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    inner = AutoTokenizer.from_pretrained(tokenizer)
    inner.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer=inner,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return processor


def write_rows(file: Path, text: str, *, count: int = 40, length: int = 60) -> None:
    """Rows of some text each, every other one with an image of its own."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        row = {"text": text[number * length : (number + 1) * length]}
        if number % 2:
            row["image"] = f"{number}.png"
            pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=generator).byte()
            Image.fromarray(pixels.numpy()).save(file.parent / row["image"])
        rows.append(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("processor")
    checkpoints.write_tokenizer(folder)
    return write_processor(folder, folder)


def load(file: Path, processor: Any, length: int = 48, windows: int = 8) -> Corpus:
    rows = image_rows(str(file))
    assert rows is not None
    return load_images(
        str(file),
        rows,
        processor,
        sequence_length=length,
        windows=windows,
        name="calibration",
        role="calibration",
        seed=0,
    )


def test_every_window_has_places_for_its_images(processor: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", checkpoints.texts()[0])
    corpus = load(tmp_path / "rows.jsonl", processor)
    assert corpus.tokens.shape == (8, 48)
    places = (corpus.tokens == processor.image_token_id).sum(1).tolist()
    shown = [len(own.get("pixel_values", ())) for own in corpus.inputs]
    assert places == [PLACES * images for images in shown]
    assert sum(shown) >= 4
    again = load(tmp_path / "rows.jsonl", processor)
    assert again.sha256 == corpus.sha256


def test_a_row_is_what_the_processor_makes_of_it(processor: Any, tmp_path: Path) -> None:
    from PIL import Image

    write_rows(tmp_path / "rows.jsonl", checkpoints.texts()[0])
    message = {"role": "user", "content": "What is <image> this? " * 1 + "word " * 40}
    row = {"messages": [message], "images": ["1.png"]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    corpus = load(tmp_path / "chat.jsonl", processor, windows=1)
    text = "[user]What is <image> this? " + "word " * 40
    expected = processor(text=[text], images=[Image.open(tmp_path / "1.png")], return_tensors="pt")
    assert torch.equal(corpus.tokens[0], expected["input_ids"][0, :48])
    assert torch.equal(corpus.inputs[0]["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "image": "gone.png"}, r"gone\.png is no image"),
        ({"text": "<image> <image>", "image": "1.png"}, "1 images and 2 places"),
        ({"a": "a", "b": "b", "image": "1.png"}, "which column is the text"),
        ({"text": "short", "image": "1.png"}, "do not fill one window"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(
    row: dict[str, str], message: str, processor: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", checkpoints.texts()[0], count=2)
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(CorpusError, match=message):
        load(tmp_path / "bad.jsonl", processor)


def test_files_without_images_are_plain_text(tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_text('{"text": "a"}\n')
    assert image_rows(str(tmp_path / "plain.jsonl")) is None
    assert image_rows("pydoc") is None
