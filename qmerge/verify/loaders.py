"""What transformers and vLLM demand of a configuration before they load a release.

Each demand is a check of its own. One that the recipe itself chose against (an asymmetric grid for
vLLM, say) is a note, not a failure.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import QmergeError
from qmerge.model.experts import blocks_of
from qmerge.model.skeleton import Skeleton, first_line
from qmerge.model.weights import Weights
from qmerge.names import WEIGHT, join, module_of
from qmerge.results import InputRecord, RunResult
from qmerge.storage.files import read_json
from qmerge.texts import load_tokenizer
from qmerge.verify.findings import Findings, Outcome

PACKED = "pack-quantized"
VLLM_BITS = (4, 8)
VLLM_GROUPS = (-1, 32, 64, 128)
MARLIN_TILE = (64, 128)
"""Outputs and inputs that vLLM's fastest kernel takes at a time; others go through a slower one."""
EXPERTS = ".experts"
VLLM_EXPERT = re.compile(r".+\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
"""What vLLM's loaders of mixtures look for: one scheme of names or the other."""
TOKENIZER_FILES = re.compile(r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|spiece)")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A release that could be opened as a model."""

    folder: Path
    result: RunResult
    skeleton: Skeleton
    weights: Weights
    settings: Mapping[str, Any]
    """`quantization_config` of config.json."""

    @property
    def release(self) -> InputRecord:
        assert self.result.release is not None
        return self.result.release

    def linears(self) -> tuple[list[str], list[str]]:
        """Linears of the layers by stored module name: those packed, and those kept."""
        packed: list[str] = []
        kept: list[str] = []
        for name in self.skeleton.linears():
            stored = module_of(self.weights.names.stored[name + WEIGHT])
            (packed if self.weights.is_quantized(name + WEIGHT) else kept).append(stored)
        return packed, kept

    def packs_head(self) -> bool:
        name = self.skeleton.head() + WEIGHT
        return name in self.weights.names.stored and self.weights.is_quantized(name)


def check_settings(opened: Opened, findings: Findings) -> None:
    """The settings against the report, against themselves, and against the loaders."""
    settings, details = opened.settings, opened.release.details
    summary = opened.weights.format.summary
    found = {
        "bits": summary.bits,
        "group_size": summary.group_size,
        "symmetric": summary.symmetric,
        "quant_method": settings.get("quant_method"),
    }
    differing = [
        f"{key} is {value}, and {details.get(key)} in the report"
        for key, value in found.items()
        if value != details.get(key)
    ]
    findings.say("settings", differing, "config.json says what the report says")
    _check_transformers(opened, findings)
    if settings.get("quant_method") == "gptq":
        _check_gptq(opened, findings)
    else:
        _check_compressed(opened, findings)
    _check_experts(opened, findings)
    _check_tiles(opened, findings)


def check_tokenizer(opened: Opened, findings: Findings, *, trust_remote_code: bool) -> None:
    """It opens, its numbers fit the embedding, and its files are those it came with."""
    with findings.at("tokenizer"):
        tokenizer = load_tokenizer(opened.folder, trust_remote_code=trust_remote_code)
        numbers = tokenizer.get_vocab().values()
        rows = opened.skeleton.model.get_input_embeddings().weight.shape[0]
        most = max(numbers, default=0)
        beyond = [f"it numbers tokens up to {most}, the embedding has {rows} rows"]
        well = f"opens; {len(numbers)} tokens, {rows} rows in the embedding"
        findings.say("tokenizer", beyond if most >= rows else [], well)
    files = opened.release.files
    own = {name: digest for name, digest in files.items() if TOKENIZER_FILES.match(name)}
    homes = [record.files for role, record in opened.result.inputs.items() if _is_home(role)]
    changed = [n for n, digest in own.items() if all(home.get(n) != digest for home in homes)]
    well = "its files are byte for byte those of the base or the adapter"
    findings.say("tokenizer-files", [f"{name} is no input's" for name in changed], well)


def _is_home(role: str) -> bool:
    return role in ("base", "partial state") or role.startswith("adapter")


def _check_transformers(opened: Opened, findings: Findings) -> None:
    config = opened.weights.checkpoint.config
    named = config.get("architectures")
    lacking = [] if isinstance(named, list) and named else ["config.json names no architectures"]
    findings.say("transformers-architectures", lacking, f"config.json names {named}")
    head = opened.skeleton.head()
    # A head that differs from what the config ties it to is opened as one of its own.
    tied = head + WEIGHT in opened.skeleton.tied() or bool(config.get("tie_word_embeddings"))
    extra = [name for name in opened.weights.format.weights if module_of(name) == head and tied]
    well = "the head is stored where it is not tied, and nowhere else"
    findings.say("transformers-tied-head", [f"{n} is stored, and is tied" for n in extra], well)
    _check_parsed(opened.settings, findings)


def _check_parsed(settings: Mapping[str, Any], findings: Findings) -> None:
    """The settings in the very class that transformers makes of them."""
    name = "transformers-settings"
    compressed = settings.get("quant_method") == "compressed-tensors"
    if compressed and importlib.util.find_spec("compressed_tensors") is None:
        findings.add(
            name, "skip", "transformers reads these with compressed-tensors: not installed"
        )
        return
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        made = AutoQuantizationConfig.from_dict(dict(settings))
    except PackageNotFoundError as error:
        findings.add(name, "skip", f"transformers reads these with {error.name}: not installed")
        return
    except Exception as error:
        findings.add(name, "fail", f"transformers refuses the settings: {first_line(error)}")
        return
    findings.add(name, "pass", f"transformers makes a {type(made).__name__} of the settings")


def _check_gptq(opened: Opened, findings: Findings) -> None:
    settings, recipe = opened.settings, opened.result.recipe
    beside = opened.folder / "quantize_config.json"
    try:
        same = read_json(beside) == dict(settings)
        apart = [] if same else ["quantize_config.json and config.json differ"]
    except QmergeError as error:
        apart = [error.message]
    findings.say("settings-twice", apart, "quantize_config.json says what config.json says")
    missing = [k for k in ("bits", "group_size", "desc_act", "sym") if k not in settings]
    findings.say("vllm-keys", missing, "bits, group_size, desc_act and sym are there")
    bits, group, symmetric = settings.get("bits"), settings.get("group_size"), settings.get("sym")
    form = settings.get("checkpoint_format")
    for name, holds, text, chosen in (
        ("vllm-bits", bits in VLLM_BITS, f"{bits} bits", recipe.get("bits") == bits),
        (
            "vllm-group-size",
            group in VLLM_GROUPS,
            f"group size {group}",
            recipe.get("group_size") == group,
        ),
        (
            "vllm-symmetric",
            symmetric is True,
            "symmetric" if symmetric else "asymmetric",
            recipe.get("symmetric") == symmetric,
        ),
        ("vllm-format", form == "gptq", f"format {form}", recipe.get("format") == form),
    ):
        takes = "vLLM takes this" if holds else "vLLM's GPTQ loader does not take this"
        findings.add(name, _outcome(holds, chosen), f"{text}: {takes}")
    findings.say("vllm-head", list(_head_faults(opened)), "the head is stored as the settings say")
    findings.say(
        "kept-modules", list(_kept_faults(opened)), "`dynamic` keeps out what is not packed"
    )
    findings.say("act-order", _order_faults(opened), "the column groups are those desc_act says")
    _check_dtypes(opened, ("scales",), findings)


def _outcome(holds: bool, chosen: bool) -> Outcome:
    if holds:
        return "pass"
    return "note" if chosen else "fail"


def _head_faults(opened: Opened) -> Iterator[str]:
    claimed = bool(opened.settings.get("lm_head", False))
    name, packed = opened.skeleton.head(), opened.packs_head()
    if packed and not claimed:
        yield f"{name} is packed, and lm_head is not true"
    if claimed and not packed:
        yield f"{name} is not packed, and lm_head is true"


def _kept_faults(opened: Opened) -> Iterator[str]:
    """gptqmodel and vLLM take every linear for packed that `dynamic` does not keep out."""
    dynamic = opened.settings.get("dynamic") or {}
    keeping = [key.removeprefix("-:") for key in dynamic if str(key).startswith("-:")]
    packed, kept = opened.linears()
    for module in kept:
        if not any(re.match(pattern, module) for pattern in keeping):
            yield f"{module} is not packed, and `dynamic` does not say so"
    for module in packed:
        if any(re.match(pattern, module) for pattern in keeping):
            yield f"{module} is packed, and `dynamic` keeps it out"


def _order_faults(opened: Opened) -> list[str]:
    """Without desc_act servers do not look at g_idx: it must be the trivial one."""
    if opened.settings.get("desc_act"):
        return []
    wrong = []
    for name, info in opened.weights.checkpoint.tensors.items():
        if name.endswith(".g_idx"):
            steps = opened.weights.checkpoint.tensors[f"{module_of(name)}.scales"]
            columns = info.shape[0] // steps.shape[0]
            trivial = torch.arange(info.shape[0], dtype=torch.int32) // columns
            if not torch.equal(opened.weights.checkpoint.read(name).int(), trivial):
                wrong.append(f"{name} is not in order, and desc_act is false")
    return wrong


def _check_dtypes(opened: Opened, suffixes: tuple[str, ...], findings: Findings) -> None:
    """The GPTQ kernels read steps of 16 bits and codes in words of 32."""
    wanted: dict[str, tuple[torch.dtype, ...]] = {}
    wanted |= dict.fromkeys(suffixes, (torch.float16, torch.bfloat16))
    wanted |= dict.fromkeys(("qweight", "qzeros", "g_idx", "weight_packed"), (torch.int32,))
    wrong = [
        f"{name} is {info.dtype}"
        for name, info in opened.weights.checkpoint.tensors.items()
        if info.dtype not in wanted.get(name.rpartition(".")[2], (info.dtype,))
    ]
    findings.say("kernel-dtypes", wrong, "steps are of 16 bits, words of 32")


def _check_compressed(opened: Opened, findings: Findings) -> None:
    settings, recipe = opened.settings, opened.result.recipe
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [s.get("weights") or {} for s in schemes if isinstance(s, Mapping)]
    demands = (
        ("format", settings.get("format") == PACKED, f"format {settings.get('format')}"),
        (
            "status",
            settings.get("quantization_status") == "compressed",
            f"quantization_status {settings.get('quantization_status')}",
        ),
        (
            "strategy",
            all(
                w.get("strategy") == ("group" if w.get("group_size") else "channel")
                for w in weights
            ),
            "the strategy fits the group size",
        ),
    )
    for name, holds, text in demands:
        findings.say(f"compressed-{name}", [] if holds else [text], text)
    bits = [w.get("num_bits") for w in weights]
    served = all(each in VLLM_BITS for each in bits)
    text = f"{bits} bits: vLLM {'takes this' if served else 'has no kernel for it'}"
    findings.add("vllm-bits", _outcome(served, [recipe.get("bits")] == bits), text)
    packed, kept = opened.linears()
    ignored = settings.get("ignore") or []
    wrong = [f"{m} is not packed, and `ignore` does not name it" for m in kept if m not in ignored]
    wrong += [f"{m} is packed, and `ignore` names it" for m in packed if m in ignored]
    head, named = opened.skeleton.head(), opened.skeleton.head() in ignored
    if opened.packs_head() and named:
        wrong.append(f"{head} is packed, and `ignore` names it")
    if not opened.packs_head() and not named:
        wrong.append(f"`ignore` does not name {head}")
    findings.say("kept-modules", wrong, "`ignore` names what is not packed")
    _check_dtypes(opened, ("weight_scale",), findings)


def _check_experts(opened: Opened, findings: Findings) -> None:
    """vLLM runs the experts of a block as one, and asks `dynamic` for it by the block's name."""
    wrong: list[str] = []
    blocks = dict(blocks_of(opened.skeleton.model))
    for path, block in blocks.items():
        names = [join(path, name) for name, _ in block.named_parameters()]
        stored = [module_of(opened.weights.names.stored[name]) for name in names]
        wrong += [
            f"{each} is no name that it knows" for each in stored if not VLLM_EXPERT.fullmatch(each)
        ]
        home, _, _ = stored[0].rpartition(f"{EXPERTS}.")
        said = _said(opened.settings, home + EXPERTS)
        wrong += [
            f"`dynamic` says other things of {each} than of the block"
            for each in stored
            if _said(opened.settings, each) != said
        ]
    if blocks:
        count = sum(len(block.experts) for block in blocks.values())
        findings.say("vllm-experts", wrong, f"{count} experts are named and set as vLLM wants them")


def _said(settings: Mapping[str, Any], module: str) -> tuple[object, ...] | None:
    """Bits and group size that a GPTQ configuration gives a module; None keeps it out."""
    usual = (settings.get("bits"), settings.get("group_size"))
    for key, own in (settings.get("dynamic") or {}).items():
        if re.match(key.removeprefix("-:").removeprefix("+:"), module):
            keys = zip(("bits", "group_size"), usual, strict=True)
            return None if key.startswith("-:") else tuple(own.get(k, v) for k, v in keys)
    return usual


def _check_tiles(opened: Opened, findings: Findings) -> None:
    """Only a note: vLLM has slower kernels for widths that its fastest does not tile."""
    outs, ins = MARLIN_TILE
    linears = opened.skeleton.linears()
    odd = [
        name
        for name, module in linears.items()
        if module.out_features % outs or module.in_features % ins
    ]
    if odd:
        text = f"{len(odd)} of {len(linears)} linears are not in tiles of {outs} x {ins}:"
        findings.add("vllm-tiles", "note", f"{text} vLLM takes a slower kernel for them")
    else:
        findings.add("vllm-tiles", "pass", f"all linears are in tiles of {outs} x {ins}")
