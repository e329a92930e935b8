"""The texts of a job: which tokenizer, how long a window, and the corpora cut by them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qmerge.corpus import Corpus, load_corpus, overlap
from qmerge.documents import check_spec
from qmerge.errors import CorpusError, QmergeError
from qmerge.images import image_rows, load_images
from qmerge.job import Faults
from qmerge.model.skeleton import REMOTE_CODE_HINT, Skeleton, first_line, text_config
from qmerge.recipe import Scoring
from qmerge.specs import EvalText
from qmerge.storage.files import read_json

LONGEST_WINDOW = 2048
OFFLINE_EVALUATION = EvalText(name="pydoc", spec="pydoc-eval", role="in_domain")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
TOKENIZER_HINT = "the folder needs the tokenizer files that came with the model"
ROWS_HINT = "save the adapter again with save_embedding_layers=True, or give --partial-state"
TOKENS_AT_ONCE = 4096
"""Tokens that go through a layer at once, the micro-batch of every arm and of calibration."""
LENS_WINDOWS, LENS_TOKENS = 16, 256
"""What is looked at behind each layer: enough to see where a divergence begins."""
LOGIT_BYTES = 1 << 27
"""Logits of all arms on one slice of the vocabulary that are held at one time; at least those of
one window."""


def tokenizer_home(base: Path, *trained: Path | None) -> Path:
    """The last folder where training saved a tokenizer of its own, else the base's."""
    for folder in reversed(trained):
        if folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    return base


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder; `CorpusError` where transformers cannot make one of it, or makes
    one of the config alone, which knows no token but special ones."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CorpusError(
            f"{folder}: transformers cannot open the tokenizer: {first_line(error)}",
            hint=REMOTE_CODE_HINT
            if _has_own_code(folder) and not trust_remote_code
            else TOKENIZER_HINT,
        ) from error
    if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}:
        raise CorpusError(f"{folder}: holds no tokenizer", hint=TOKENIZER_HINT)
    return tokenizer


def has_tokenizer(folder: Path, *, trust_remote_code: bool) -> bool:
    """Whether there is one; transformers is asked only where no file has a usual name."""
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return True
    try:
        load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except CorpusError:
        return False
    return True


def load_processor(folder: Path, *, trust_remote_code: bool) -> Any:
    """Turns images and text into the inputs of the model; `CorpusError` where a folder has none."""
    from transformers import AutoProcessor

    hint = "the folder needs the processor files that came with the model"
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if importlib.util.find_spec("torchvision") is None:
            hint = (
                "transformers makes the processors of many models with torchvision: install the"
                " version that belongs to this torch, built for a CPU where torch is"
            )
        raise CorpusError(
            f"{folder}: transformers cannot open the processor: {first_line(error)}", hint=hint
        ) from error
    if not hasattr(processor, "image_token_ids"):
        raise CorpusError(
            f"{folder}: the text has images, and the model takes none",
            hint="leave them out, or give a vision-language model with its processor files",
        )
    return processor


def calibration_text(
    spec: str, tokenizer: Any, length: int, windows: int, seed: int, processor: Callable[[], Any]
) -> Corpus:
    """The calibration windows, with images where the rows have them."""
    rows = image_rows(spec)
    chosen: dict[str, Any] = {
        "sequence_length": length,
        "windows": windows,
        "name": "calibration",
        "role": "calibration",
        "seed": seed,
    }
    if rows is None:
        return load_corpus(spec, tokenizer, **chosen)
    return load_images(spec, rows, processor(), **chosen)


def check_tokens(tokenizer: Any, home: Path, base: Path, rows: int, *, trust: bool) -> None:
    """Whether the model has an embedding for each token that training added to the tokenizer.

    Raises `CorpusError` where it has none; tokens that the base's own tokenizer has beyond its
    embeddings are the base's affair.
    """
    beyond = {token: n for token, n in tokenizer.get_vocab().items() if n >= rows}
    if not beyond or home == base:
        return
    known = load_tokenizer(base, trust_remote_code=trust).get_vocab()
    added = [
        token
        for token in sorted(beyond, key=beyond.__getitem__)
        if known.get(token) != beyond[token]
    ]
    if added:
        more = f" and {len(added) - 1} more" if len(added) > 1 else ""
        raise CorpusError(
            f"{home}: the tokenizer has {added[0]!r}{more} beyond the model's {rows} embeddings,"
            " and training saved none for it",
            hint=ROWS_HINT,
        )


def stray_templates(home: Path, trained: Iterable[Path]) -> Iterator[str]:
    """Chat templates that lie where something was trained, and do not come with its tokenizer."""
    for folder in trained:
        if folder != home and (folder / TEMPLATE).is_file():
            yield f"{folder / TEMPLATE} is not taken: the tokenizer is that of {home}"


def tokenizer_notes(tokenizer: Any, home: Path, base: Path, *, trust: bool) -> Iterator[str]:
    """Where `tokenizer`, which training saved, does not go with what is taken from the base: a
    chat template that is lost, another token at the end of an answer."""
    try:
        own = load_tokenizer(base, trust_remote_code=trust) if home != base else None
    except CorpusError:
        return
    if own is None:
        return
    if own.chat_template and not tokenizer.chat_template:
        yield f"the base has a chat template, and the tokenizer of {home}, which is taken, has none"
    file, ends = _ends(base)
    if ends and tokenizer.eos_token_id not in (None, own.eos_token_id, *ends):
        yield (
            f"training ended texts with {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), and"
            f" {file}, which is taken, ends them with {', '.join(map(str, ends))}: what generates"
            " from the release may not stop where it was taught to"
        )


def _ends(base: Path) -> tuple[Path, list[Any]]:
    """The tokens at which generation stops, and the file of a base that says so."""
    for file in (base / GENERATION, base / "config.json"):
        with suppress(QmergeError):
            ends = read_json(file).get("eos_token_id")
            if ends is not None:
                return file, ends if isinstance(ends, list) else [ends]
    return base, []


def _has_own_code(folder: Path) -> bool:
    """Whether a tokenizer's settings name Python files."""
    try:
        return "auto_map" in read_json(folder / "tokenizer_config.json")
    except QmergeError:
        return False


def window_length(asked: int | None, skeleton: Skeleton) -> int:
    """`--sequence-length`: at most what the model has positions for."""
    limit = getattr(text_config(skeleton.model.config), "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else None
    if asked is not None and limit is not None and asked > limit:
        raise CorpusError(
            f"--sequence-length {asked} is longer than the model's {limit} positions",
            hint=f"use at most {limit}",
        )
    return asked or min(LONGEST_WINDOW, limit or LONGEST_WINDOW)


def evaluation_texts(
    scoring: Scoring, tokenizer: Any, length: int, faults: Faults
) -> tuple[Corpus, ...]:
    """The evaluation corpora, one fault for each that cannot be had."""
    windows = None if scoring.eval_windows == "all" else scoring.eval_windows
    found = []
    for text in scoring.eval_texts() or (OFFLINE_EVALUATION,):
        with faults.at(f"--eval {text.spec}"):
            _refuse_images(text.spec)
            found.append(
                load_corpus(
                    text.spec,
                    tokenizer,
                    sequence_length=length,
                    windows=windows,
                    name=text.name,
                    role=text.role,
                )
            )
    return tuple(found)


def check_texts(scoring: Scoring, faults: Faults) -> None:
    """What can be seen of the evaluation texts where there is no tokenizer for them."""
    for text in scoring.eval_texts():
        with faults.at(f"--eval {text.spec}"):
            _refuse_images(text.spec)
            check_spec(text.spec)


def check_calibration(spec: str) -> None:
    """As `check_texts`, of calibration text; rows with images are left to their processor."""
    if image_rows(spec) is None:
        check_spec(spec)


def _refuse_images(spec: str) -> None:
    if image_rows(spec) is not None:
        raise CorpusError(
            f"{spec} holds images, and only calibration text may",
            hint="score on text; the rows of a file without the images will do",
        )


def overlap_notes(calibration: Corpus, evaluation: tuple[Corpus, ...]) -> Iterator[str]:
    """How much of the evaluation text the quantizer sees in calibration."""
    for corpus in evaluation:
        if share := overlap(calibration, corpus):
            yield (
                f"evaluation text {corpus.name}: {100 * share:.3g}% of its tokens stand in the"
                " calibration text, to which the release is fitted"
            )


def window_notes(scoring: Scoring, evaluation: tuple[Corpus, ...]) -> Iterator[str]:
    """Evaluation texts that hold less than was asked for."""
    if scoring.eval_windows != "all":
        for corpus in evaluation:
            yield from fewer(corpus, scoring.eval_windows)


def fewer(corpus: Corpus, asked: int) -> Iterator[str]:
    """A note where a text does not hold the windows that were asked for."""
    held, length = corpus.windows_available, corpus.tokens.shape[1]
    if held < asked:
        windows = f"{held} window{'s' * (held != 1)} of {length} tokens"
        yield f"{corpus.source} holds {windows}, {asked} were asked for"
