"""A checkpoint's quantization settings, wherever they are kept and however they are spelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge.errors import CheckpointError
from qmerge.storage.checkpoint import Checkpoint
from qmerge.storage.files import read_json

# AutoGPTQ and gptqmodel, AutoAWQ, auto-round.
SIDE_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")

# Old spelling to today's.
SPELLINGS = {
    "method": "quant_method",
    "w_bit": "bits",
    "wbits": "bits",
    "q_group_size": "group_size",
    "groupsize": "group_size",
    "act_order": "desc_act",
    "symmetric": "sym",
}

# Two files that differ in one of these describe two different models.
DECISIVE = ("bits", "group_size", "checkpoint_format")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`method` in lower case (`none` for a dense model), and the rest under today's keys."""

    method: str
    file: str | None
    """The file they were found in."""
    values: Mapping[str, Any]

    def integer(self, key: str, default: int | None = None) -> int:
        """The whole number under `key`; CheckpointError where it is missing or is none."""
        found = self.values.get(key)
        found = default if found is None else found
        try:
            return int(found)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.file}: {key} is {found!r}, and a whole number is needed",
                hint=f"add {key} to the quantization settings",
            ) from error

    def text(self, key: str, default: str) -> str:
        """The word under `key` in lower case."""
        return str(self.values.get(key) or default).lower()

    @property
    def quantizer(self) -> str | None:
        """Who wrote the checkpoint, from `meta.quantizer`: a word or a list of them."""
        meta = self.values.get("meta")
        found = meta.get("quantizer") if isinstance(meta, Mapping) else None
        if found is None:
            return None
        return ", ".join(map(str, found)) if isinstance(found, list | tuple) else str(found)


def read_settings(checkpoint: Checkpoint) -> Settings:
    """The settings in config.json, else those in a file beside it.

    What config.json leaves out, and a file beside it says of the same method, counts too: who
    wrote the checkpoint, or what holds for some layers only.
    A side file alone counts only where the checkpoint holds packed tensors: transformers does not
    read it, and one left behind in a dense model must not turn it into a quantized one.
    """
    own = _in_config(checkpoint.config)
    side_name, side = _in_side_file(checkpoint.path)
    if own is not None:
        if side is not None:
            _refuse_conflict(own, side, side_name)
        return _settings(_filled(own, side or {}), "config.json")
    packed = any(name.endswith((".qweight", ".weight_packed")) for name in checkpoint.tensors)
    if side is not None and packed:
        return _settings(side, side_name)
    return Settings(method="none", file=None, values={})


def _in_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`quantization_config` of the model, or of the language model inside a multimodal one."""
    parts = [config, *(value for key, value in config.items() if key.endswith("_config"))]
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        found = part.get("quantization_config") or part.get("compression_config")
        if found is None:
            continue
        if not isinstance(found, Mapping):
            raise CheckpointError("config.json: quantization_config is not a table of settings")
        return modern(found)
    return None


def _in_side_file(folder: Path) -> tuple[str, dict[str, Any] | None]:
    for name in SIDE_FILES:
        path = folder / name
        if not path.is_file():
            continue
        return name, modern(read_json(path))
    return SIDE_FILES[0], None


def modern(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under today's keys; where both spellings are there, today's counts."""
    found = {SPELLINGS.get(key, key): value for key, value in values.items()}
    found |= {key: value for key, value in values.items() if key not in SPELLINGS}
    found.setdefault("checkpoint_format", found.get("format"))
    return found


def _settings(values: dict[str, Any], file: str) -> Settings:
    method = values.get("quant_method")
    if method is None:
        method = _guess_method(values)
    if method is None:
        raise CheckpointError(
            f"{file}: the quantization settings have no quant_method",
            hint='add one, for instance "quant_method": "gptq"',
        )
    return Settings(method=str(method).lower(), file=file, values=values)


def _guess_method(values: Mapping[str, Any]) -> str | None:
    """What settings written before `quant_method` existed are of."""
    if "load_in_4bit" in values or "load_in_8bit" in values:
        return "bitsandbytes"
    if "config_groups" in values:
        return "compressed-tensors"
    if "zero_point" in values and "bits" in values:
        return "awq"
    return "gptq" if "bits" in values else None


def _filled(own: dict[str, Any], side: Mapping[str, Any]) -> dict[str, Any]:
    methods = {
        str(each["quant_method"]).lower() for each in (own, side) if each.get("quant_method")
    }
    if len(methods) > 1:
        return own
    return {**side, **{key: value for key, value in own.items() if value is not None}}


def _refuse_conflict(own: Mapping[str, Any], side: Mapping[str, Any], side_name: str) -> None:
    for key in DECISIVE:
        ours, theirs = own.get(key), side.get(key)
        if ours is None or theirs is None or str(ours).lower() == str(theirs).lower():
            continue
        raise CheckpointError(
            f"config.json says {key} {ours} and {side_name} says {theirs}",
            hint=f"correct one of them, or remove {side_name}",
        )
