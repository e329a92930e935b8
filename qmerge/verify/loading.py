"""Whether transformers loads a release and finds the perplexity that its report says."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from qmerge.corpus import Corpus, load_corpus
from qmerge.errors import InputError, QmergeError
from qmerge.results import CorpusRecord, RunResult
from qmerge.storage.files import read_json
from qmerge.texts import load_tokenizer
from qmerge.verify.findings import Findings

WINDOWS = 4
"""Windows of each text that are scored again."""
FAR = 0.01
"""Nats per token that a kernel's own arithmetic may bring: in float32 it is below 0.001, with
16-bit kernels about ten times that."""
PACKAGES = {"gptq": ("gptqmodel", "optimum"), "compressed-tensors": ("compressed_tensors",)}
LAST_WORDS = 3


def require_loader(method: str) -> None:
    """`InputError` where what transformers loads such a release with is not installed."""
    missing = [p for p in PACKAGES.get(method, ()) if importlib.util.find_spec(p) is None]
    if missing:
        packages = " and ".join(missing).replace("_", "-")
        raise InputError(
            f"--load: transformers needs {packages} to load this release",
            hint="pip install 'qmerge[verify]'" if method == "gptq" else f"pip install {packages}",
        )


def check_loading(
    folder: Path, result: RunResult, findings: Findings, *, trust_remote_code: bool
) -> None:
    differ = [key for key in overrides_of(folder) if not key.startswith("-:")]
    if differ:
        text = "transformers gives all linears the same bits and groups, and `dynamic` has others"
        findings.add("loads", "skip", text)
        return
    corpora = text_at_hand(folder, result, findings, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="qmerge-") as scratch:
        tokens, answer = Path(scratch, "tokens.pt"), Path(scratch, "answer.json")
        torch.save({c.name: c.tokens[:WINDOWS].clone() for c in corpora}, tokens)
        command = [
            sys.executable,
            "-m",
            "qmerge.verify.loaded",
            str(folder),
            str(tokens),
            str(answer),
            *(["trusted"] if trust_remote_code else []),
        ]
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        if ended.returncode or not answer.is_file():
            said = "; ".join(ended.stderr.strip().splitlines()[-LAST_WORDS:])
            findings.add("loads", "fail", f"transformers does not load it: {said}")
            return
        findings.add("loads", "pass", "transformers loads it")
        found: dict[str, list[float]] = json.loads(answer.read_text(encoding="utf-8"))
    for name, windows in found.items():
        _compare(name, windows, result, findings)


def overrides_of(folder: Path) -> Iterable[str]:
    """The patterns of `dynamic` in a GPTQ release."""
    settings = read_json(folder / "config.json").get("quantization_config", {})
    return tuple(settings.get("dynamic") or ())


def text_at_hand(
    folder: Path, result: RunResult, findings: Findings, *, trust_remote_code: bool
) -> list[Corpus]:
    """The evaluation texts that can be had again, token for token; a skip for each other one."""
    found = []
    for name, record in result.corpora.evaluation.items():
        try:
            tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
            corpus = load_corpus(
                record.source,
                tokenizer,
                sequence_length=record.sequence_length,
                windows=record.windows,
                name=name,
                role="general",
            )
        except QmergeError as error:
            findings.add(f"perplexity-{name}", "skip", f"the text is not at hand: {error.message}")
            continue
        if is_same_text(corpus, record):
            found.append(corpus)
        else:
            text = (
                f"{record.source} is not the text that was scored: its tokens have another digest"
            )
            findings.add(f"perplexity-{name}", "skip", text)
    return found


def is_same_text(corpus: Corpus, record: CorpusRecord) -> bool:
    return corpus.sha256 == record.sha256


def _compare(name: str, windows: list[float], result: RunResult, findings: Findings) -> None:
    reported = result.arms["release"][name].window_nll[: len(windows)]
    mean, expected = sum(windows) / len(windows), sum(reported) / len(reported)
    text = (
        f"perplexity {math.exp(mean):.4g} on the first {len(windows)} windows of {name},"
        f" {math.exp(expected):.4g} in the report"
    )
    near = abs(mean - expected) <= FAR
    findings.add(f"perplexity-{name}", "pass" if near else "fail", text)
