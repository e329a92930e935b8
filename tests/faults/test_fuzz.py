"""Settings, adapters, tokenizers and recipes, mutated from real ones: our own errors only.

Headers, indexes, pickles and journals are in tests/storage/test_fuzz.py.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge.adapters import inject, open_adapter
from qmerge.errors import QmergeError
from qmerge.formats import open_format
from qmerge.model.opening import open_model
from qmerge.options import build
from qmerge.recipe import Recipe
from qmerge.storage.checkpoint import Checkpoint
from qmerge.texts import load_tokenizer
from tests.storage.test_fuzz import cut_or_spliced, odd_json

SECONDS = 30  # for one case, on a machine with other work to do
MEMORY = 300 * 2**20  # bytes that all cases together may add
RECIPE = """\
base: models/base
adapter: [models/adapter@0.5, models/other]
out: release
original: null
strategy: auto
calibration: pydoc
calibration_samples: 128
eval: [in_domain=a.txt, b.jsonl:text]
eval_windows: all
sequence_length: 512
bits: 4
group_size: 128
symmetric: true
act_order: group
damping: 0.01
memory: 4GiB
only: ['*.mlp.*', 're:.*q_proj']
seed: 0
"""

Action = Callable[[], object]


@contextmanager
def deadline() -> Iterator[None]:
    def too_long(*_: object) -> None:
        pytest.fail(f"took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*")}


def fuzz(file: Path, act: Action, cases: int, seed: int, *, least_refused: float) -> None:
    """Mutate `file` again and again; `act` reads what lies in its folder."""
    act()
    original, draw, refused = file.read_bytes(), random.Random(seed), 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ways = (cut_or_spliced,) if file.suffix == ".yaml" else (cut_or_spliced, odd_json, odd_json)
    for case in range(cases):
        file.write_bytes(draw.choice(ways)(original, draw))
        before = stamps(file.parent)
        try:
            with deadline(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                act()
        except QmergeError:
            refused += 1
        except BaseException as error:
            error.add_note(f"case {case} of seed {seed}: {file.read_bytes()[:2000]!r}")
            raise
        assert stamps(file.parent) == before
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < MEMORY / 1024
    assert refused > cases * least_refused


@pytest.fixture
def folders(
    tiny_original: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> dict[str, Path]:
    """Copies to be mutated; the GPTQ and compressed-tensors ones are written here."""
    places = {"original": tiny_original, "nf4": tiny_nf4, "adapter": tiny_adapter}
    copies = {n: Path(shutil.copytree(p, tmp_path / n)) for n, p in places.items()}
    for form in ("gptq", "compressed-tensors"):
        copies[form] = packed(tiny_original, tmp_path / form, form)
    return copies


def packed(original: Path, folder: Path, form: Any) -> Path:
    """The original with every linear of its layers rounded to nearest."""
    from qmerge.formats.integer import IntegerWeight
    from qmerge.formats.writing import pack, quantization_config
    from qmerge.storage.shards import write_shard

    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    names = []
    with Checkpoint.open(original) as opened:
        config = dict(opened.config)
        for name in opened.tensors:
            weight = opened.read(name)
            if not name.endswith("_proj.weight"):
                tensors[name] = weight.clone()
                continue
            scales = weight.float().view(len(weight), -1, 32).abs().amax(2) / 7
            codes = weight.float() / scales.repeat_interleave(32, 1)
            grid = IntegerWeight(
                codes_OI=(codes.round() + 8).to(torch.uint8),
                scales_OG=scales.half(),
                zeros_OG=torch.full_like(scales, 8, dtype=torch.int32),
                g_idx_I=None,
                bits=4,
                group_size=32,
                symmetric=True,
            )
            module = name.removesuffix(".weight")
            names.append(module)
            tensors |= {f"{module}.{suffix}": t for suffix, t in pack(grid, form).items()}
    config["quantization_config"] = quantization_config(
        form,
        bits=4,
        group_size=32,
        symmetric=True,
        order="none",
        damping=0.01,
        writer="test",
        quantized=dict.fromkeys(names, (4, 32)),
        kept=[],
    )
    write_shard(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check_adapters(folders: dict[str, Path], cases: int, seed: int) -> None:
    skeleton, _ = open_model(folders["original"])

    def act() -> None:
        adapter = open_adapter(folders["adapter"])
        inject(skeleton.fused, adapter, allow_noop=True)

    file = folders["adapter"] / "adapter_config.json"
    fuzz(file, act, cases, seed, least_refused=0.3)


def check_settings(folders: dict[str, Path], cases: int, seed: int) -> None:
    """`quantization_config` alone, so that most of the damage is in it."""
    for form in ("nf4", "gptq", "compressed-tensors"):
        file = folders[form] / "config.json"
        whole = json.loads(file.read_text())
        own = {"quantization_config": whole["quantization_config"]}
        file.write_text(json.dumps(own))

        def act(folder: Path = folders[form]) -> None:
            with Checkpoint.open(folder) as opened:
                found = open_format(opened)
                for weight in list(found.weights.values())[:8]:
                    found.dense(weight.name)

        fuzz(file, act, cases, seed, least_refused=0.2)


def check_models(folders: dict[str, Path], cases: int, seed: int) -> None:
    """The whole of config.json, as far as a skeleton."""
    file = folders["gptq"] / "config.json"
    fuzz(file, lambda: open_model(folders["gptq"]), cases, seed, least_refused=0.3)


def check_tokenizers(folders: dict[str, Path], cases: int, seed: int) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = folders["original"]

        def act(folder: Path = folder) -> None:
            tokenizer = load_tokenizer(folder, trust_remote_code=False)
            tokenizer.get_vocab()

        kept = (folder / name).read_bytes()
        fuzz(folder / name, act, cases, seed, least_refused=0.1)
        (folder / name).write_bytes(kept)


def check_recipes(folders: dict[str, Path], cases: int, seed: int) -> None:
    file = folders["original"].parent / "recipe" / "recipe.yaml"
    file.parent.mkdir()
    file.write_text(RECIPE)

    def act() -> None:
        recipe = build(Recipe, {}, file=file)
        recipe.faults()
        recipe.to_yaml()

    fuzz(file, act, 10 * cases, seed, least_refused=0.3)


CHECKS = (check_adapters, check_settings, check_models, check_tokenizers, check_recipes)
Check = Callable[[dict[str, Path], int, int], None]


@pytest.mark.parametrize("check", CHECKS)
def test_mutated_files(folders: dict[str, Path], check: Check) -> None:
    check(folders, 15, 0)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_many_mutated_files(folders: dict[str, Path], check: Check) -> None:
    """4,000 cases and more: 250 a file, ten times as many of the recipe."""
    check(folders, 250, 1)
