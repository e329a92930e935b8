"""An adapter's folder: its configuration, names and shapes in its file, tensors on demand."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters.kinds import (
    BOUND_INITS,
    QUANTIZED_INIT,
    SPLIT_INITS,
    TRAINING_ONLY,
    base_init,
    bound_kind,
    refusal,
)
from qmerge.adapters.spelling import bare
from qmerge.errors import AdapterError, CheckpointError
from qmerge.results import UNPROVEN
from qmerge.storage.headers import TensorInfo, read_header
from qmerge.storage.pickled import PickledFile

CONFIG_NAME = "adapter_config.json"
SAFE_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
RETRY_HINT = "copy the adapter again from where training saved it, as safetensors where you can"
OF_THE_TRAINER = re.compile(
    r"adapter_model\..*|optimizer.*|scheduler.*|scaler.*|rng_state.*|random_states.*|training_args.*"
    r"|sampler.*|dataloader.*|reference_adapter.*|value_head.*|v_head.*"
)
"""Files beside an adapter that hold no weights of a language model."""
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
EMBEDDING_NAMES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
NAMES_OF_MODULES = ("target_modules", "target_parameters", "modules_to_save")
SHOWN_OPTIONS = (
    "use_rslora",
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "exclude_modules",
    "trainable_token_indices",
    "ensure_weight_tying",
)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter as it lies in its folder. Only headers have been read."""

    path: Path
    kind: str
    """PEFT's `peft_type`."""
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    refusal: str | None
    """Why it cannot be merged, or None."""
    notes: tuple[str, ...] = ()
    """What a reader should know: options that the installed PEFT ignores and the like."""
    held: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    """Tensors of an adapter that was made in memory and lies in no file."""

    @property
    def rank(self) -> int | None:
        return self.config.get("r") if isinstance(self.config.get("r"), int) else None

    @property
    def targets(self) -> tuple[str, ...]:
        """Module names or the one pattern that the adapter applies to, as training was told."""
        names = self.config.get("target_modules") or ()
        parameters = self.config.get("target_parameters") or ()
        return (*((names,) if isinstance(names, str) else sorted(names)), *sorted(parameters))

    @property
    def base_name(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None

    @property
    def base_revision(self) -> str | None:
        return self.config.get("revision") or None

    def base_mismatch(self, *folders: Path) -> str | None:
        """What to warn of where none of `folders` is the base it was trained on, by name and, for
        a folder in the hub's cache, by revision."""
        name = (self.base_name or "").rstrip("/").rpartition("/")[2]
        if not name:
            return None
        revision = f" at revision {self.base_revision}" if self.base_revision else ""
        said = f"{self.path / CONFIG_NAME} names the base {self.base_name}{revision}"
        commits = [commit for folder, commit in map(_identity, folders) if folder == name]
        if not commits:
            called = " or ".join(sorted({folder.name for folder in folders}))
            return f"{said}, and the folder is called {called}, which proves nothing: {UNPROVEN}"
        if _is_commit(self.base_revision) and self.base_revision not in commits:
            return said if not any(commits) else f"{said}, and this is {commits[0]}"
        return f"{said}: {UNPROVEN}" if revision and not any(commits) else None

    @property
    def beside(self) -> tuple[str, ...]:
        """Files of weights in its folder that are not the adapter's, and nobody reads."""
        if self.held is not None:
            return ()
        files = (p.name for p in self.path.iterdir() if p.suffix in WEIGHT_FILES and p.is_file())
        return tuple(sorted(name for name in files if not OF_THE_TRAINER.fullmatch(name)))

    @property
    def base_reason(self) -> str | None:
        """What the adapter's start means for the base it is merged onto, or None."""
        init = base_init(self.config)
        return init[1] if init else bound_kind(self.config)

    @property
    def bound_to_base(self) -> bool:
        """Whether only the base it was trained on is right, so that no original may replace it."""
        init = base_init(self.config)
        return bool(init and init[0] in BOUND_INITS) or bool(bound_kind(self.config))

    @property
    def misfit(self) -> str | None:
        """Why a base in few bits cannot be the one it was trained on, or None where it can be.

        PEFT starts PiSSA on 16 bits only; OLoRA quantizes what it leaves once more, and that lies
        in no file.
        """
        init = base_init(self.config)
        return init[1] if init and init[0] in SPLIT_INITS else None

    @property
    def vocabulary(self) -> int | None:
        """Rows of a whole embedding or head that the adapter brings, or None where it has none."""
        return rows_of_vocabulary(self.tensors)

    @property
    def last_token(self) -> int:
        """The highest token whose row was trained by itself, -1 where none was."""
        trained = self.config.get("trainable_token_indices") or []
        if self.kind == "TRAINABLE_TOKENS":
            trained = self.config.get("token_indices") or []
        lists = trained.values() if isinstance(trained, dict) else [trained]
        return max((int(token) for tokens in lists for token in tokens), default=-1)

    @property
    def summary(self) -> dict[str, Any]:
        """What `inspect` prints; plain values only."""
        return {
            "kind": self.kind,
            "rank": self.rank,
            "alpha": self.config.get("lora_alpha"),
            "targets": list(self.targets),
            "modules_to_save": list(self.config.get("modules_to_save") or ()),
            "options": [name for name in SHOWN_OPTIONS if self.config.get(name)],
            "base": self.base_name,
            "tensors": len(self.tensors),
            "parameters": sum(math.prod(tensor.shape) for tensor in self.tensors.values()),
            "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in self.tensors.values()}),
            "refusal": self.refusal,
            "notes": list(self.notes),
        }

    def peft_config(self) -> Any:
        """A fresh PEFT configuration object, set for inference."""
        return _peft_config(self.config, self.path)[0]

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors in their stored dtype, backed by the mapped file where it is safetensors."""
        if self.held is not None:
            return dict(self.held)
        found = read_tensors(weights_file(self.path))
        return {name: found[name] for name in self.tensors}


def open_adapter(path: str | Path) -> Adapter:
    """Read an adapter folder's configuration and the header of its weights.

    Raises AdapterError for a folder that is no adapter, is damaged, or hides code in a pickle. A
    kind that cannot be merged is no error here: it stands in `refusal`.
    """
    folder = Path(path)
    config = _read_config(folder)
    reason = refusal(config)
    notes: tuple[str, ...] = ()
    if reason is None:
        _, notes = _peft_config(config, folder)
    tensors = read_headers(weights_file(folder)) if reason is None else _whatever(folder)
    for option, infix in TRAINING_ONLY:
        if config.pop(option, None):
            tensors = {name: t for name, t in tensors.items() if infix not in name.split(".")}
            notes += (f"{option}: it draws at random in training and is plain LoRA afterwards",)
    return Adapter(
        path=folder,
        kind=str(config["peft_type"]),
        config=config,
        tensors=tensors,
        refusal=reason,
        notes=notes,
    )


def _whatever(folder: Path) -> dict[str, TensorInfo]:
    """Headers of an adapter that will be refused; nothing where its file cannot be read."""
    try:
        return read_headers(weights_file(folder))
    except AdapterError:
        return {}


def weights_file(folder: Path) -> Path:
    """The file that PEFT would load: safetensors first."""
    for name in (SAFE_NAME, PICKLE_NAME):
        if (folder / name).is_file():
            return folder / name
    raise AdapterError(f"{folder}: neither {SAFE_NAME} nor {PICKLE_NAME} is there", hint=RETRY_HINT)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise AdapterError(f"{folder}: {what}", hint="give the folder that PEFT saved")
    if not file.is_file():
        raise AdapterError(f"{folder}: no {CONFIG_NAME}", hint=_where_else(folder))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{file}: not readable as JSON: {error}", hint=RETRY_HINT) from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{file}: no peft_type", hint="give the folder that PEFT saved")
    for key in NAMES_OF_MODULES:
        names = config.get(key) or []
        if not isinstance(names, str) and not _is_names(names):
            raise AdapterError(f"{file}: {key} is neither a name nor a list", hint=RETRY_HINT)
    return config


def _where_else(folder: Path) -> str:
    """What to give instead of a folder that holds no adapter."""
    configs = [*folder.glob(f"*/{CONFIG_NAME}"), *folder.glob(f"*/*/{CONFIG_NAME}")]
    inner = sorted((str(config.parent.relative_to(folder)) for config in configs), key=_by_number)
    if inner:
        return f"give one of its folders: {', '.join(inner)}"
    if (folder / "config.json").is_file():
        return "this is a whole model, not an adapter: `qmerge quantize` takes it"
    return "give the folder that PEFT saved"


def _by_number(name: str) -> tuple[str | int, ...]:
    """checkpoint-500 before checkpoint-1000."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def _identity(folder: Path) -> tuple[str, str | None]:
    """A base's name, and its commit where the folder is one of the hub's cache."""
    where = folder.resolve()
    if where.parent.name == "snapshots":
        return where.parent.parent.name.rpartition("--")[2], where.name
    return where.name, None


def _is_commit(revision: str | None) -> bool:
    return bool(revision and re.fullmatch(r"[0-9a-f]{40}", revision))


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _peft_config(config: Mapping[str, Any], path: Path) -> tuple[Any, tuple[str, ...]]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    values = {key: value for key, value in config.items() if key != "runtime_config"}
    init = base_init(config)
    if init and init[0] == QUANTIZED_INIT:
        # The base in hand is the quantized one already; PEFT would quantize it once more.
        values["init_lora_weights"] = True
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = kind.from_peft_type(**kind.check_kwargs(**values))
    except Exception as error:
        raise AdapterError(
            f"{path / CONFIG_NAME}: PEFT refuses this configuration: {error}",
            hint="check the option it names, or the version of PEFT it was saved with",
        ) from error
    made.inference_mode = True
    if hasattr(made, "progressbar"):
        made.progressbar = False
    return made, tuple(dict.fromkeys(str(warning.message) for warning in caught))


def rows_of_vocabulary(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Rows of the whole embeddings and heads among `tensors`, or None where there are none."""
    whole = (t.shape[0] for name, t in tensors.items() if t.shape and _is_embedding(name))
    return max(whole, default=None)


def read_headers(file: Path) -> dict[str, TensorInfo]:
    """Names and shapes in a safetensors file or a pickle; errors as `read_tensors`."""
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise AdapterError(f"{file}: {what}", hint="give the file that training saved")
    with _as_adapter_error():
        found = read_header(file) if _is_safe(file) else PickledFile(file).header()
    if not found:
        raise AdapterError(f"{file}: holds no tensors", hint=RETRY_HINT)
    return dict(sorted(found.items()))


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a safetensors file or a pickle, mapped rather than read; float8, which torch
    can hardly compute with, as float32.

    Raises AdapterError for a file that is missing, damaged, or could run code.
    """
    from safetensors.torch import load_file

    header = read_headers(file)
    with _as_adapter_error():
        pickled = None if _is_safe(file) else PickledFile(file)
        found = load_file(file) if pickled is None else {n: pickled.get_tensor(n) for n in header}
    return {
        name: t.float() if t.is_floating_point() and t.itemsize == 1 else t
        for name, t in found.items()
    }


def _is_safe(file: Path) -> bool:
    return file.suffix == ".safetensors"


@contextmanager
def _as_adapter_error() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise AdapterError(error.message, hint=RETRY_HINT) from error


def _is_embedding(name: str) -> bool:
    *_, module, leaf = ("", *(part for part in bare(name).split(".") if part != "base_layer"))
    return leaf == "weight" and module in EMBEDDING_NAMES
