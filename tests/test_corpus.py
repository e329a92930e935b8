from __future__ import annotations

import hashlib
import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge import documents
from qmerge.corpus import Corpus, Role, load_corpus, overlap
from qmerge.documents import read_text_recipe, text_recipes
from qmerge.errors import CorpusError

S = 16  # tokens in a window
CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant') %}{{ raise_exception('role?') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}"
)
TALK = [{"role": "user", "content": "hello " * 20}, {"role": "assistant", "content": "yes " * 20}]


def make_tokenizer(**options: Any) -> Any:
    """One token a byte, with `<s>` put first as Llama's tokenizers do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(["<s>", *alphabet])}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", model_max_length=32, **options
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def chatty() -> Any:
    return make_tokenizer(chat_template=CHATML)


def load(
    spec: object,
    tokenizer: Any,
    *,
    sequence_length: int = S,
    role: Role = "general",
    windows: int | None = None,
    seed: int = 0,
) -> Corpus:
    return load_corpus(
        str(spec),
        tokenizer,
        sequence_length=sequence_length,
        role=role,
        name="text",
        windows=windows,
        seed=seed,
    )


def text_of(corpus: Corpus, tokenizer: Any) -> str:
    """What the windows say, the start token left out."""
    text: str = tokenizer.decode(corpus.tokens.flatten().tolist(), skip_special_tokens=True)
    return text


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


# The protocol.


def test_windows_follow_one_another_and_the_tail_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(chr(33 + number % 90) for number in range(1000))
    (tmp_path / "a.txt").write_text(text)
    found = load(tmp_path / "a.txt", tokenizer)
    ids = [0, *(tokenizer.convert_tokens_to_ids(symbol) for symbol in text)]
    expected = [ids[start : start + S] for start in range(0, len(ids) - S + 1, S)]
    assert found.tokens.tolist() == expected
    assert found.tokens.dtype == torch.int64
    assert (found.name, found.documents, found.windows_available) == ("text", 1, 1001 // S)
    flat = [token for window in expected for token in window]
    assert found.sha256 == hashlib.sha256(struct.pack(f"<{len(flat)}q", *flat)).hexdigest()
    assert found.text_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert load(tmp_path / "a.txt", tokenizer, windows=3).tokens.tolist() == expected[:3]
    assert load(tmp_path / "a.txt", tokenizer, windows=999).tokens.tolist() == expected


def test_documents_are_joined_with_an_empty_line_empty_ones_too(
    tmp_path: Path, tokenizer: Any
) -> None:
    documents = ["one " * 9, "", "two " * 9]
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": document} for document in documents])
    found = load(file, tokenizer, sequence_length=1)
    assert text_of(found, tokenizer) == "\n\n".join(documents)
    assert found.documents == 3


def test_the_start_token_comes_once(tmp_path: Path, tokenizer: Any, chatty: Any) -> None:
    (tmp_path / "a.txt").write_text("<s>hello world, hello")
    assert load(tmp_path / "a.txt", tokenizer).tokens.flatten().tolist().count(0) == 1
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}] * 3)
    found = load(file, chatty)
    assert found.tokens.flatten().tolist().count(0) == 1
    assert found.tokens[0, 0] == 0


def test_a_long_text_is_tokenized_whole_and_without_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "a.txt").write_text("x" * 100_000)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        found = load(tmp_path / "a.txt", make_tokenizer(), sequence_length=100)
    assert len(found.tokens) == 1000
    assert not caplog.records
    assert not list(recwarn)


def test_calibration_is_drawn_without_replacement_by_seed(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{number:07d}," for number in range(500)))
    whole = load(tmp_path / "a.txt", tokenizer, role="calibration")
    everything = [tuple(window) for window in whole.tokens.tolist()]
    assert everything == [
        tuple(window) for window in load(tmp_path / "a.txt", tokenizer).tokens.tolist()
    ]

    def drawn(seed: int) -> list[tuple[int, ...]]:
        tokens = load(
            tmp_path / "a.txt", tokenizer, role="calibration", windows=20, seed=seed
        ).tokens
        return [tuple(window) for window in tokens.tolist()]

    assert drawn(0) == drawn(0) != drawn(1)
    places = [everything.index(window) for window in drawn(0)]
    assert places == sorted(set(places))
    assert len(places) == 20 < max(places)


def test_too_short_a_text_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("x" * (S - 2))
    with pytest.raises(CorpusError, match=r"a\.txt: 15 tokens do not fill one window of 16"):
        load(tmp_path / "a.txt", tokenizer)
    (tmp_path / "a.txt").write_text("x" * (S - 1))
    assert load(tmp_path / "a.txt", tokenizer).tokens.shape == (1, S)


# Files.


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_are_named_or_the_usual_ones(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    write = write_jsonl if kind == "jsonl" else write_parquet
    story, other = "a story " * 5, "something else " * 5
    both = write(tmp_path / f"both.{kind}", [{"other": other, "text": story}])
    only = write(tmp_path / f"only.{kind}", [{"story": story}])
    two = write(tmp_path / f"two.{kind}", [{"a": other, "b": story}])
    for spec in (both, only, f"{two}:b", f"{both}:text"):
        assert text_of(load(spec, tokenizer), tokenizer) in story
    assert text_of(load(f"{both}:other", tokenizer), tokenizer) in other
    with pytest.raises(CorpusError, match="which column") as caught:
        load(two, tokenizer)
    assert "a, b" in (caught.value.hint or "")
    with pytest.raises(CorpusError, match="no column 'c'"):
        load(f"{two}:c", tokenizer)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_messages_go_through_the_chat_template(
    tmp_path: Path, tokenizer: Any, chatty: Any, kind: str
) -> None:
    write = write_jsonl if kind == "jsonl" else write_parquet
    file = write(tmp_path / f"chat.{kind}", [{"messages": TALK}, {"messages": TALK[:1]}])
    said = [f"<user>{'hello ' * 20}<assistant>{'yes ' * 20}", f"<user>{'hello ' * 20}"]
    found = load(file, chatty, sequence_length=1)
    assert text_of(found, chatty) == "\n\n".join(said)
    with pytest.raises(CorpusError, match=r"row 1: holds messages, and the tokenizer has no chat"):
        load(file, tokenizer)


def test_a_template_that_refuses_is_named_with_its_row(tmp_path: Path, chatty: Any) -> None:
    rows = [{"messages": TALK}, {"messages": [{"role": "oracle", "content": "?"}]}]
    with pytest.raises(CorpusError, match=r"row 2: the chat template refuses it: role\?"):
        load(write_jsonl(tmp_path / "a.jsonl", rows), chatty)


@pytest.mark.parametrize("forgetful", [False, True])
def test_thoughts_are_kept_whatever_the_template_does(tmp_path: Path, forgetful: bool) -> None:
    """Many templates cut what was thought from every answer, the last one included."""
    cut = "message.content.split('</think>')[-1]"
    template = CHATML.replace("message.content", cut) if forgetful else CHATML
    talk = [
        {"role": "user", "content": "6 × 7?"},
        {"role": "assistant", "content": '<think>\n"6" times 7\n</think>42'},
    ]
    thinking = make_tokenizer(chat_template=template)
    found = load(
        write_jsonl(tmp_path / "a.jsonl", [{"messages": talk}]), thinking, sequence_length=1
    )
    expected = '<user>6 × 7?<assistant><think>\n"6" times 7\n</think>42'
    assert text_of(found, thinking) == expected


def test_a_file_that_exists_wins_over_a_column(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"b.txt": "column"}\n')
    (tmp_path / "a.jsonl:b.txt").write_text("from the file itself")
    assert "from the file" in text_of(load(tmp_path / "a.jsonl:b.txt", tokenizer), tokenizer)


BAD_FILES: dict[str, tuple[bytes | None, str]] = {
    "gone.txt": (None, "no such file"),
    "gone.jsonl:text": (None, "no such file"),
    "wikitext": (None, "neither a recipe nor"),
    "a.csv": (b"a,b", "neither a recipe nor"),
    "x" * 5000 + ".txt": (None, "no such file"),
    "latin.txt": ("größe".encode("latin-1") * 50, "cannot be read"),
    "empty.txt": (b"", "do not fill"),
    "empty.jsonl": (b"\n\n", "do not fill"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "list.jsonl": (b"[1]\n", "row 1 is not an object"),
    "number.jsonl": (b'{"text": 3}\n', "row 1: column 'text' is neither"),
    "null.jsonl": (b'{"text": "a"}\n{"text": null}\n', "row 2: column 'text' is neither"),
    "other.jsonl": (b'{"text": "a"}\n{"txt": "a"}\n', "row 2 has no column 'text'"),
    "none.jsonl": (b"{}\n", "row 1: which column"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "surrogate"),
    "bad.parquet": (b"PAR1 and more", "not a parquet file"),
    "empty.parquet": (b"", "not a parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES, ids=lambda name: name[:20])
def test_a_bad_file_is_one_clear_error(tmp_path: Path, tokenizer: Any, name: str) -> None:
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        load(tmp_path / name, tokenizer)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("gone.txt", "recipes are"), ("latin.txt", "UTF-8"), ("a.csv", "recipes are")],
)
def test_what_to_do_about_a_bad_file(tmp_path: Path, tokenizer: Any, name: str, hint: str) -> None:
    content, _ = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        load(tmp_path / name, tokenizer)
    assert hint in str(caught.value.hint)


def test_text_has_no_column(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(CorpusError, match="no column 'text'"):
        load(f"{tmp_path / 'a.txt'}:text", tokenizer)


# The hub.


def test_hub_texts_come_through_datasets(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real library, on a dataset that lies in a folder of the hub's name."""
    import datasets

    folder = tmp_path / "org" / "stories"
    folder.mkdir(parents=True)
    rows = [{"story": f"story {number} " * 4} for number in range(5)]
    write_parquet(folder / "part.parquet", rows)
    configs = "configs:\n- config_name: short\n  data_files:\n  - {split: test, path: part.parquet}"
    (folder / "README.md").write_text(f"---\n{configs}\n---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = load("hub:org/stories/short/test[1:3]:story", tokenizer, sequence_length=1)
    assert text_of(found, tokenizer) == "\n\n".join(row["story"] for row in rows[1:3])
    assert found.source == "hub:org/stories/short/test[1:3]:story"
    with pytest.raises(CorpusError, match="hub:org/stories/long/test"):
        load("hub:org/stories/long/test", tokenizer)


@pytest.mark.parametrize(
    ("spec", "call"),
    [
        ("hub:a/b/c/d", ("a/b", "c", "d", None)),
        ("hub:a/b@v1.0/c/d:text", ("a/b", "c", "d", "v1.0")),
        ("hub:a/b@refs/pr/3/c/train[:10%]:text", ("a/b", "c", "train[:10%]", "refs/pr/3")),
        ("hub:a/b/c/train[5:]+test[:9]:my text", ("a/b", "c", "train[5:]+test[:9]", None)),
        ("hub:a/b/c/train[5:", None),
        ("hub:a/b/c", None),
        ("hub:b", None),
        ("hub:a/b/c/", None),
    ],
)
def test_what_is_asked_of_the_hub(
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    call: tuple[str, str, str, str | None] | None,
) -> None:
    import datasets

    def asked(path: str, config: str, *, split: str, revision: str, data_files: None) -> Any:
        assert (path, config, split, revision) == call
        raise ConnectionError("Couldn't reach the hub\nand so on")

    monkeypatch.setattr(datasets, "load_dataset", asked)
    with pytest.raises(CorpusError) as caught:
        load(spec, tokenizer)
    offline = "pydoc" in (caught.value.hint or "")
    assert offline == (call is not None)
    assert spec in str(caught.value)


# Recipes.


def test_every_recipe_is_complete_and_has_its_own_evaluation_part() -> None:
    names = text_recipes()
    readme = (next(iter(names.values())).parent / "README.md").read_text()
    assert {"pydoc", "pydoc-eval", "wikitext2", "wikitext2-eval", "c4"} <= set(names)
    for name in names:
        recipe = read_text_recipe(name)
        assert recipe.licence, name
        assert recipe.description.endswith("."), name
        assert (recipe.column is None) or (recipe.template is None), name
        assert f"`{name}`" in readme, name
        if not name.endswith("-eval"):
            other = read_text_recipe(f"{name}-eval")
            apart = (recipe.split, recipe.data_files) != (other.split, other.data_files)
            assert apart, name


def test_recipes_are_found_in_a_wheel_before_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "__file__", str(tmp_path / "qmerge" / "documents.py"))
    for folder, name in (("calibration", "foreign"), ("qmerge/calibration", "own")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.yaml").touch()
    assert list(text_recipes()) == ["own"]
    for content in ("", "- a list", "{", "rows: 3"):
        (tmp_path / "qmerge/calibration/own.yaml").write_text(content)
        with pytest.raises(CorpusError, match="not a text recipe"):
            read_text_recipe("own")


def test_the_offline_recipe_works_and_keeps_its_parts_apart(tokenizer: Any) -> None:
    calibration = load("pydoc", tokenizer, sequence_length=512, role="calibration")
    evaluation = load("pydoc-eval", tokenizer, sequence_length=512)
    assert len(calibration.tokens) > 3 * len(evaluation.tokens) > 200
    assert evaluation.licence == "PSF-2.0"
    assert overlap(calibration, evaluation, width=128) == 0.0
    paragraphs = [
        {" ".join(paragraph.split()) for text in documents._pydoc(part) for paragraph in
         text.split("\n\n")}
        for part in ("calibration", "evaluation")
    ]  # fmt: skip
    assert not paragraphs[0] & paragraphs[1]


def test_recipes_for_the_hub_ask_for_their_part(
    tokenizer: Any, chatty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows: dict[str, list[dict[str, Any]]] = {
        "openai/gsm8k": [{"question": "1 + 1 {now}?", "answer": "it is 2"}],
        "HuggingFaceH4/ultrachat_200k": [{"prompt": "x", "messages": TALK}],
        "allenai/c4": [{"text": "a page of the web", "url": "x", "timestamp": "y"}],
    }
    asked = []

    def load_dataset(path: str, config: str | None, **options: Any) -> Any:
        asked.append((path, config, options["split"], options["data_files"]))
        return datasets.Dataset.from_list(rows[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load("gsm8k-eval", tokenizer, sequence_length=1)
    assert text_of(found, tokenizer) == "Question: 1 + 1 {now}?\nAnswer: it is 2"
    assert found.licence == "MIT"
    assert text_of(load("ultrachat", chatty), chatty).startswith("<user>hello")
    assert load("c4-eval", tokenizer).tokens.shape == (1, S)
    assert asked == [
        ("openai/gsm8k", "main", "test", None),
        ("HuggingFaceH4/ultrachat_200k", None, "train_sft[:2048]", None),
        ("allenai/c4", None, "train[:1100]", "en/c4-validation.00000-of-00008.json.gz"),
    ]
    rows["openai/gsm8k"] = [{"q": "?"}]
    with pytest.raises(CorpusError, match="gsm8k: the dataset has no column 'question'"):
        load("gsm8k", tokenizer)


def test_a_python_without_pydoc_says_so(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusError, match="without pydoc_data"):
        load("pydoc", tokenizer)


# Overlap.


def corpus_of(tokens: list[list[int]]) -> Corpus:
    return Corpus(
        name="x", source="x", role="general", tokens=torch.tensor(tokens), documents=1,
        windows_available=len(tokens), sha256="", text_sha256="", licence=None,
    )  # fmt: skip


def naive_overlap(known: list[list[int]], asked: list[list[int]], width: int) -> float:
    runs = {tuple(w[at : at + width]) for w in known for at in range(len(w) - width + 1)}
    blocks = [
        tuple(w[at : at + width]) for w in asked for at in range(0, len(w) - width + 1, width)
    ]
    return sum(block in runs for block in blocks) / len(blocks)


@pytest.mark.parametrize(("width", "vocabulary"), [(1, 50), (3, 4), (5, 2), (8, 2)])
def test_overlap_equals_a_search_by_hand(width: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(width)
    known = torch.randint(vocabulary, (7, 20), generator=generator).tolist()
    asked = torch.randint(vocabulary, (9, 23), generator=generator).tolist()
    found = overlap(corpus_of(known), corpus_of(asked), width=width)
    assert 0 < found <= 1
    assert found == pytest.approx(naive_overlap(known, asked, width))


def test_shared_text_is_found_wherever_it_stands(tmp_path: Path, tokenizer: Any) -> None:
    shared = "".join(chr(33 + (number * number) % 89) for number in range(400))
    (tmp_path / "a.txt").write_text("before, at another place " * 9 + shared)
    (tmp_path / "b.txt").write_text("else " * 100 + shared)
    (tmp_path / "c.txt").write_text("nothing of that; " * 100)
    a, b, c = (load(tmp_path / f"{name}.txt", tokenizer, sequence_length=200) for name in "abc")
    assert 0.2 < overlap(a, b) < 0.8
    assert overlap(a, c) == 0
    assert overlap(a, a) == 1


# Real text.


def test_the_published_protocol_on_real_text(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "original")
    file = shared / "data" / "shakespeare-eval.txt"
    found = load(file, tokenizer, sequence_length=256, windows=64)
    ids = tokenizer(file.read_text("utf-8"), return_tensors="pt", verbose=False).input_ids
    expected = torch.stack([ids[0, start : start + 256] for start in range(0, 64 * 256, 256)])
    assert torch.equal(found.tokens, expected)
    start = (shared / "data" / "shakespeare-train.txt").read_text("utf-8")[:100_000]
    (tmp_path / "train.txt").write_text(start)
    training = load(tmp_path / "train.txt", tokenizer, sequence_length=256)
    assert overlap(training, found) == 0
