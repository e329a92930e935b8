"""Whether a release loads where users load it, and has the perplexity that its report says."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from qmerge.corpus import Corpus, load_corpus
from qmerge.errors import InputError, QmergeError
from qmerge.names import listed
from qmerge.results import RunResult
from qmerge.texts import load_tokenizer
from qmerge.verify.findings import LISTED, Findings
from qmerge.verify.loaders import Opened

WINDOWS = 4
"""Windows of each text that are scored again."""
FAR = 0.01
"""Nats per token that a kernel's own arithmetic may bring: in float32 it is below 0.001, with
16-bit kernels about ten times that."""
PACKAGES = {"gptq": ("gptqmodel", "optimum"), "compressed-tensors": ("compressed_tensors",)}
RUNTIMES = {
    "gptq": ("transformers", "gptqmodel"),
    "compressed-tensors": ("transformers",),
}
LAST_WORDS, LONGEST = 3, 200


def require_loader(method: str) -> None:
    """`InputError` where what transformers loads such a release with is not installed."""
    missing = [p for p in PACKAGES.get(method, ()) if importlib.util.find_spec(p) is None]
    if missing:
        packages = " and ".join(missing).replace("_", "-")
        raise InputError(
            f"--load: transformers needs {packages} to load this release",
            hint="pip install 'qmerge[verify]'" if method == "gptq" else f"pip install {packages}",
        )


def check_loading(opened: Opened, findings: Findings, *, trust_remote_code: bool) -> None:
    """By transformers; what it would leave random or misread, by gptqmodel itself."""
    folder, result = opened.folder, opened.result
    corpora = text_at_hand(folder, result, findings, trust_remote_code=trust_remote_code)
    told = [reason] if (reason := _misread(opened)) else []
    for runtime in RUNTIMES[str(opened.settings.get("quant_method"))][len(told) :]:
        found, fault = _load(runtime, folder, corpora, trust_remote_code=trust_remote_code)
        if found is None:
            told.append(f"{runtime} {fault}")
            continue
        findings.add("loads", "pass", "; ".join([f"{runtime} loads it", *told]))
        for name, windows in found.items():
            _compare(name, windows, result, findings)
        return
    findings.add("loads", "fail", "; ".join(told))


def _misread(opened: Opened) -> str | None:
    """Why transformers is not even asked to load a release: it would answer with a model."""
    if opened.settings.get("quant_method") != "gptq":
        return None
    if opened.packs_head():
        return "transformers has no place for a packed head"
    if any(not str(key).startswith("-:") for key in opened.settings.get("dynamic") or ()):
        return "transformers gives all linears the same bits and groups, and `dynamic` has others"
    parts = [part for fusion in opened.skeleton.fusions for part in fusion.parts]
    if any(opened.weights.is_quantized(part) for part in parts):
        return "transformers keeps experts fused, and leaves those of a gptq release random"
    return None


def _load(
    runtime: str, folder: Path, corpora: Sequence[Corpus], *, trust_remote_code: bool
) -> tuple[dict[str, list[float]] | None, str]:
    """Likelihoods of the windows by corpus; or None, and what became of the loading."""
    with tempfile.TemporaryDirectory(prefix="qmerge-") as scratch:
        tokens, answer = Path(scratch, "tokens.pt"), Path(scratch, "answer.json")
        torch.save({c.name: c.tokens[:WINDOWS].clone() for c in corpora}, tokens)
        command = [
            sys.executable,
            "-m",
            "qmerge.verify.loaded",
            runtime,
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
            return None, f"does not load it: {said}"
        told: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if "unfilled" in told:
        names = told["unfilled"]
        return None, f"finds nothing for {listed(names, LISTED)}, and leaves that random"
    if "error" in told:
        return None, f"does not load it: {shorten(told['error'].splitlines()[0], LONGEST)}"
    return told["nll"], ""


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
        if corpus.sha256 == record.sha256:
            found.append(corpus)
        else:
            text = (
                f"{record.source} is not the text that was scored: its tokens have another digest"
            )
            findings.add(f"perplexity-{name}", "skip", text)
    return found


def _compare(name: str, windows: list[float], result: RunResult, findings: Findings) -> None:
    reported = result.arms["release"][name].window_nll[: len(windows)]
    mean, expected = sum(windows) / len(windows), sum(reported) / len(reported)
    text = (
        f"perplexity {math.exp(mean):.4g} on the first {len(windows)} windows of {name},"
        f" {math.exp(expected):.4g} in the report"
    )
    near = abs(mean - expected) <= FAR
    findings.add(f"perplexity-{name}", "pass" if near else "fail", text)
