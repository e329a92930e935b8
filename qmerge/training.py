"""How training loaded its base, from the files that trainers leave beside an adapter.

Only text is read: `training_args.bin` is a pickle that `weights_only` cannot open, and what it
says of the base stands in the others. Files of the run lie beside the adapter, or one folder up
where the adapter is a `checkpoint-N`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from qmerge.errors import RecipeError
from qmerge.formats.base import FormatSummary
from qmerge.formats.simulated import DTYPES, BaseQuant, parse_base_quant
from qmerge.results import DOUBT

LIMIT = 1 << 20
"""Bytes of the largest file that a trainer would write."""
CARD_SENTENCE = "quantization config was used during training:"
QUANTIZED_NAMES = ("bnb-4bit", "bnb-8bit", "gptq", "awq", "fp8", "int4", "int8", "w4a16", "w8a8")
HEAD = "lm_head"
"""Left alone where nothing else is named."""
MIXED_NAME = "unsloth-bnb-4bit"
HINT = "say how training loaded the base: --base-quant nf4,double, or none for as it is stored"

Said = BaseQuant | str | None
Q = TypeVar("Q", bound="Said")
"""A base in 4 or 8 bits, in words where it cannot be made again, or None for as it is stored."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one file says."""

    file: Path
    quant: Said
    needed: bool = False
    """Whether the adapter is wrong on any other base."""

    @property
    def words(self) -> str:
        if self.quant is None:
            return "as it is stored"
        return f"in {self.quant.option if isinstance(self.quant, BaseQuant) else self.quant}"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How the base is to be taken, and what a reader should know of it."""

    quant: BaseQuant | None
    notes: tuple[str, ...]


def decide(asked: str | None, summary: FormatSummary, adapters: tuple[Path, ...]) -> Decision:
    """How training loaded the base: as asked, else as the files beside the adapters say.

    RecipeError for an option that a base stored in few bits has no use for, and for files that
    contradict one another where nothing was asked.
    """
    told = [each for folder in adapters for each in read_told(folder)]
    if summary.quantized:
        return _stored(asked, summary, told)
    if asked is not None:
        quant = parse_base_quant(asked)
        alike = [each for each in told if _agree(each.quant, quant)]
        other = [each for each in told if each not in alike]
        notes = tuple(_against(f"--base-quant {asked}", other))
        return Decision(quant=_fullest(alike, quant), notes=notes)
    return _dense(told, bool(adapters))


def _stored(asked: str | None, summary: FormatSummary, told: list[Told]) -> Decision:
    if asked is not None and parse_base_quant(asked) is not None:
        raise RecipeError(
            f"--base-quant is for a dense base; this one is stored as {summary.checkpoint_format}",
            hint="leave it out: the base is decoded from its own codes",
        )
    other = [
        each
        for each in told
        if isinstance(each.quant, BaseQuant) and not _is_like(each.quant, summary)
    ]
    where = f"the base is stored as {summary.checkpoint_format} and decoded from its own codes"
    return Decision(quant=None, notes=tuple(_against(where, other)))


def _is_like(quant: BaseQuant, summary: FormatSummary) -> bool:
    """What a stored base does not say of itself, the modules left out, is not compared."""
    same = (summary.method, summary.checkpoint_format) == ("bitsandbytes", quant.kind)
    return same and (quant.bits == 8 or quant.double == summary.double_quantization)


def _dense(told: list[Told], adapted: bool) -> Decision:
    if not adapted:
        return Decision(quant=None, notes=())
    # A run that loaded its base as stored may have loaded one that is stored in few bits.
    found = [each for each in told if each.quant is not None] or told
    known = _fullest(found, found[0].quant if found else None)
    if not all(_agree(each.quant, known) for each in found):
        said = ", ".join(f"{each.file} {each.words}" for each in found)
        raise RecipeError(f"training loaded the base in different ways: {said}", hint=HINT)
    if not found:
        note = (
            "the base is dense and is taken as it is stored: no file beside the adapter says how"
            f" training loaded it; if it did so in 4 or 8 bits, {DOUBT}: say so, as in"
            " --base-quant nf4,double"
        )
        return Decision(quant=None, notes=(note,))
    first = found[0]
    said = f"{first.file} says that training loaded the base {first.words}"
    if isinstance(known, BaseQuant):
        note = f"{said}: so it is here (otherwise: --base-quant none)"
        return Decision(quant=known, notes=(note,))
    if first.needed:
        raise RecipeError(
            f"{said}, and needs that very base: what LoftQ left of it is in no other file",
            hint="give the base that was saved after it; if this is that one: --base-quant none",
        )
    if first.quant is None:
        return Decision(quant=None, notes=(f"{said}: the base is dense and so it is taken here",))
    note = (
        f"{said}, which is another base than this dense one, and {DOUBT}: give that very base as"
        " --base, or say --base-quant"
    )
    return Decision(quant=None, notes=(note,))


def _agree(one: Said, other: Said) -> bool:
    """Whether two say the same, or one of them does not say the dtype."""
    if isinstance(one, BaseQuant) and isinstance(other, BaseQuant):
        dtypes = {one.dtype, other.dtype} - {None}
        return len(dtypes) < 2 and replace(one, dtype=None) == replace(other, dtype=None)
    return one == other


def _fullest(told: list[Told], otherwise: Q) -> Q:
    """What was said by all, the dtype too where one of them says it."""
    if isinstance(otherwise, BaseQuant) and otherwise.dtype is None:
        said = [each.quant.dtype for each in told if isinstance(each.quant, BaseQuant)]
        return replace(otherwise, dtype=next(filter(None, said), None))
    return otherwise


def _against(where: str, told: list[Told]) -> Iterator[str]:
    for each in told:
        yield f"{each.file} says that training loaded the base {each.words}; {where}"


def read_told(folder: Path) -> tuple[Told, ...]:
    """What the files of one training run say, the most telling first; unreadable ones say nothing.

    The name of the base counts only where no file tells.
    """
    own = folder / "adapter_config.json"
    config = _json(_text(own))
    start = [Told(file=own, quant=said, needed=True) for said in _from_start(config)]
    return (*start, *(_beside(folder) or (Told(file=own, quant=s) for s in _from_name(config))))


def _beside(folder: Path) -> tuple[Told, ...]:
    folders = [folder]
    if re.fullmatch(r"checkpoint-\d+", folder.resolve().name):
        folders.append(folder.resolve().parent)
    for home in folders:
        found = [
            Told(file=home / name, quant=said)
            for name, read in SOURCES
            for said in _heard(home / name, read)
        ]
        if found:
            return tuple(found)
    return ()


def _heard(file: Path, read: Callable[[str], tuple[Said, ...]]) -> tuple[Said, ...]:
    text = _text(file)
    return read(text) if text else ()


def _text(file: Path) -> str:
    try:
        if not file.is_file() or file.stat().st_size > LIMIT:
            return ""
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(text: str) -> Mapping[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# One reader for each file: nothing where it does not speak of the base.


def _from_config(text: str) -> tuple[Said, ...]:
    """The model's config.json, which axolotl and unsloth save beside the adapter."""
    found = _json(text).get("quantization_config")
    if not isinstance(found, Mapping):
        return ()
    if "load_in_4bit" not in found and "load_in_8bit" not in found:
        # A base that was stored in few bits, and so it was loaded.
        return (str(found.get("quant_method") or "few bits"),)
    whole = _json(text)
    dtype = whole.get("dtype") or whole.get("torch_dtype")
    return tuple(_loaded(said, dtype) for said in _bitsandbytes(found))


def _from_swift(text: str) -> tuple[Said, ...]:
    """args.json of ms-swift 3, sft_args.json of ms-swift 2."""
    found = _json(text)
    bits = found.get("quant_bits", found.get("quantization_bit"))
    if "quant_method" not in found and bits is None:
        return ()
    if not bits:
        return (None,)
    method = str(found.get("quant_method") or "bnb")
    kind = str(found.get("bnb_4bit_quant_type") or "nf4")
    said = _quant(method, bits, kind, found.get("bnb_4bit_use_double_quant", True))
    return (_loaded(said, found.get("torch_dtype") or found.get("dtype")),)


def _from_factory(text: str) -> tuple[Said, ...]:
    """training_args.yaml of LLaMA-Factory, and llamaboard_config.yaml, whose keys begin `top.`."""
    found = {key.removeprefix("top."): value for key, value in _yaml(text).items() if key}
    if "finetuning_type" not in found:
        return ()
    bits = found.get("quantization_bit")
    if bits in (None, "none", "None", ""):
        return (None,)
    method = str(found.get("quantization_method") or "bnb")
    kind = str(found.get("quantization_type") or "nf4")
    said = _quant(method, bits, kind, found.get("double_quantization", True))
    board = str(found.get("train.compute_type") or "").removeprefix("pure_")
    return (_loaded(said, board or _of_switches(found, ("bf16", "pure_bf16"), ("fp16",))),)


def _from_card(text: str) -> tuple[Said, ...]:
    """PEFT's model card lists the settings; axolotl's holds its configuration."""
    _, found, after = text.rpartition(CARD_SENTENCE)
    if found:
        pairs = re.findall(r"^- (\w+): (.*?)\s*$", after.split("\n#")[0], re.MULTILINE)
        said = _bitsandbytes({key: _yaml(f"x: {value}").get("x") for key, value in pairs})
        if said:
            return said
    for block in re.findall(r"^```ya?ml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        said = _axolotl(_yaml(block))
        if said:
            return said
    return ()


def _from_axolotl(text: str) -> tuple[Said, ...]:
    return _axolotl(_yaml(text))


def _axolotl(found: Mapping[str, Any]) -> tuple[Said, ...]:
    """axolotl quantizes in nf4 with double quantization unless its configuration says otherwise."""
    if "base_model" not in found or "adapter" not in found:
        return ()
    own = found.get("bnb_config_kwargs")
    defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    kept = {key: found.get(key) for key in ("load_in_4bit", "load_in_8bit")}
    dtype = _of_switches(found, ("bf16", "bfloat16"), ("fp16", "float16"))
    settings = defaults | kept | (dict(own) if isinstance(own, Mapping) else {})
    return tuple(_loaded(said, dtype) for said in _bitsandbytes(settings))


def _of_switches(
    found: Mapping[str, Any], bfloat16: tuple[str, ...], float16: tuple[str, ...]
) -> str | None:
    """The dtype that a trainer's switches turn on; `auto` is bf16 on every GPU of today."""
    if any(found.get(key) in (True, "auto", "full") for key in bfloat16):
        return "bfloat16"
    return "float16" if any(found.get(key) is True for key in float16) else None


def _loaded(said: Said, dtype: object) -> Said:
    """What was `said`, with the dtype that weights were loaded in, where `dtype` names one."""
    name = str(dtype).removeprefix("torch.").lower()
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name)
    return replace(said, dtype=name) if isinstance(said, BaseQuant) and name in DTYPES else said


def _bitsandbytes(found: Mapping[str, Any]) -> tuple[Said, ...]:
    """`BitsAndBytesConfig` as transformers writes it, with its defaults."""
    if found.get("load_in_4bit") is True:
        kind = str(found.get("bnb_4bit_quant_type") or "fp4")
        said = _quant("bnb", 4, kind, found.get("bnb_4bit_use_double_quant"))
    elif found.get("load_in_8bit") is True:
        said = _quant("bnb", 8, "", double=False)
    else:
        return (None,)
    skipped = found.get("llm_int8_skip_modules")
    names = tuple(map(str, skipped)) if isinstance(skipped, list) and skipped != [HEAD] else ()
    return (replace(said, skip=names) if isinstance(said, BaseQuant) else said,)


def _quant(method: str, bits: Any, kind: str, double: Any) -> BaseQuant | str:
    """bitsandbytes' 4 and 8 bits; anything else in words."""
    if not method.lower().startswith(("bnb", "bitsandbytes")) or str(bits) not in ("4", "8"):
        return f"{bits} bits of {method}"
    if str(bits) == "8":
        return BaseQuant(kind="int8")
    if kind == "nf4":
        return BaseQuant(kind="nf4", double=bool(double))
    return BaseQuant(kind="fp4", double=bool(double)) if kind == "fp4" else f"4 bits of {kind}"


def _from_start(config: Mapping[str, Any]) -> tuple[Said, ...]:
    """LoftQ quantizes the base itself: in one step as bitsandbytes does it alone."""
    own = config.get("loftq_config")
    if config.get("init_lora_weights") != "loftq" or not isinstance(own, Mapping):
        return ()
    bits, steps = own.get("loftq_bits", 4), own.get("loftq_iter", 1)
    if steps == 1:
        return (_quant("bnb", bits, "nf4", double=False),)
    return (f"{bits} bits by LoftQ in {steps} steps",)


def _from_name(config: Mapping[str, Any]) -> tuple[Said, ...]:
    """unsloth names its nf4 copies; names of other quantized bases only warn."""
    name = str(config.get("base_model_name_or_path") or "").rstrip("/").lower()
    last = name.rpartition("/")[2]
    if name.startswith("unsloth/") and last.endswith("bnb-4bit") and MIXED_NAME not in last:
        return (BaseQuant(kind="nf4", double=True),)
    if any(word in re.split(r"[^a-z0-9]", last) or word in last for word in QUANTIZED_NAMES):
        return (f"few bits under the name {config['base_model_name_or_path']}",)
    return ()


SOURCES: tuple[tuple[str, Callable[[str], tuple[Said, ...]]], ...] = (
    ("args.json", _from_swift),
    ("sft_args.json", _from_swift),
    ("training_args.yaml", _from_factory),
    ("llamaboard_config.yaml", _from_factory),
    ("axolotl_config.yaml", _from_axolotl),
    ("axolotl_config.yml", _from_axolotl),
    ("config.json", _from_config),
    ("README.md", _from_card),
)
"""What is looked for in a folder, and who can read it."""
