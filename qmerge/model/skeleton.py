"""The model as transformers builds it, on the meta device: names and shapes, no weights.

Nothing here knows an architecture. transformers makes the modules and says how checkpoint keys are
renamed; the list of decoder layers is the one whose length the configuration states.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from qmerge.errors import ModelError
from qmerge.formats.base import StoredWeight
from qmerge.model.experts import Fusion, find_fusions, open_experts
from qmerge.names import WEIGHT, NameMap, Unit, common_unit, join, module_of, under

TIED = "tie_word_embeddings"
OLD_CACHE = re.compile(r"rotary_emb\.inv_freq$")
"""What older models stored and every model computes."""
OLD_MASKS = {"bias": 4, "causal_mask": 4, "masked_bias": 0}
"""What attention stored before transformers computed it, and its dimensions: a causal mask
[1, 1, N, N], and the one value that stood for minus infinity (GPT-2, GPT-J, GPT-Neo, CodeGen)."""
WHOLE_HINT = (
    "load it with transformers and save it with save_pretrained(..., save_original_format=False):"
    " that folder holds what transformers makes"
)
REMOTE_CODE_HINT = "give --trust-remote-code if you trust the Python files in that folder"


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A causal language model on the meta device and where its decoder layers are."""

    model: Any
    """As it is walked and stored: each expert's linears are linears, and so is a Conv1D."""
    fused: Any
    """As transformers builds it, which is what adapters are made for; the same model where nothing
    differs."""
    fusions: tuple[Fusion, ...]
    """What differs between the two, beside `turned`."""
    layers_path: str
    layer_count: int
    restated: Mapping[str, Any] = field(default_factory=dict)
    """What its configuration says otherwise than the checkpoint's own."""
    turned: frozenset[str] = frozenset()
    """Weights that transformers keeps as [I, O] (GPT-2's Conv1D), and that linears of `model` keep
    as [O, I]."""

    def layer_path(self, index: int) -> str:
        return f"{self.layers_path}.{index}"

    def turn(self, path: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the module at `path`, by relative name, with those that `model` and `fused`
        keep transposed to each other as the other one has them."""
        own = {name for name in tensors if join(path, name) in self.turned}
        return {name: tensor.T if name in own else tensor for name, tensor in tensors.items()}

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(text_config(self.model.config).hidden_size)

    def layer(self, index: int) -> nn.Module:
        """A fresh copy of one decoder layer: parameters on meta, computed buffers real."""
        layer: nn.Module = copy.deepcopy(self.model.get_submodule(self.layer_path(index)))
        return layer.eval()

    def parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter and saved buffer by name; tied ones once, under their first name."""
        aliases = self.tied()
        return {name: t for name, t in self.model.state_dict().items() if name not in aliases}

    def tied(self) -> dict[str, str]:
        """Parameters that are another one under a second name, such as a tied head."""
        first: dict[int, str] = {}
        aliases: dict[str, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owner = first.setdefault(id(parameter), name)
            if owner != name:
                aliases[name] = owner
        return aliases

    def linears(self) -> dict[str, nn.Linear]:
        """Linear modules inside the decoder layers: what GPTQ can quantize."""
        inside = self.model.get_submodule(self.layers_path).named_modules()
        return {
            f"{self.layers_path}.{name}": module
            for name, module in inside
            if isinstance(module, nn.Linear)
        }

    def head(self) -> str:
        """The name of the output embedding."""
        head = self.model.get_output_embeddings()
        names = (name for name, module in self.model.named_modules() if module is head)
        return str(next(names))

    def quantizable(self) -> dict[str, nn.Linear]:
        """The linears inside the layers, and the output embedding."""
        return {**self.linears(), self.head(): self.model.get_output_embeddings()}

    def replaceable(self, *, head: bool = False) -> tuple[str, ...]:
        """Linears that transformers replaces where it loads a model in 4 or 8 bits: those of the
        plain class, wherever they are; the `head` where it is asked for and not tied."""
        output, tied = self.model.get_output_embeddings(), self.head() + WEIGHT in self.tied()
        return tuple(
            name
            for name, module in self.model.named_modules()
            if type(module) is nn.Linear and (module is not output or (head and not tied))
        )

    def states(self) -> tuple[str, ...]:
        """What the layers hold beside linears, norms and biases, by name relative to a layer: the
        convolutions and states of linear attention, routers, experts that stay fused."""
        linears = self.linears()
        names: dict[str, None] = {}
        for index in range(self.layer_count):
            layer = self.model.get_submodule(self.layer_path(index))
            for name, parameter in layer.named_parameters():
                path, _, leaf = name.rpartition(".")
                plain = leaf == "bias" or (leaf == "weight" and parameter.ndim == 1)
                if not plain and f"{self.layer_path(index)}.{path}" not in linears:
                    names[name] = None
        return tuple(names)

    def tower(self) -> frozenset[str]:
        """Parameters that only other inputs than text pass through: vision tower and projector."""
        config = self.model.config
        if text_config(config) is config:
            return frozenset()
        language = (self.model.get_decoder(), self.model.get_output_embeddings())
        paths = [name for name, module in self.model.named_modules() if module in language]
        return frozenset(n for n in self.parameters() if not any(under(n, p) for p in paths))

    def matrices(self) -> tuple[str, ...]:
        """Modules inside the decoder layers whose weight is a matrix, linears and others such as
        routers, which servers run as linears."""
        inside = f"{self.layers_path}."
        return tuple(
            module_of(name)
            for name, tensor in self.parameters().items()
            if name.startswith(inside) and name.endswith(WEIGHT) and tensor.dim() == 2
        )

    def stacks(self) -> tuple[str, ...]:
        """Modules inside the decoder layers that hold the weights of experts in one parameter."""
        inside = f"{self.layers_path}."
        found = {
            module_of(name): None
            for name, tensor in self.parameters().items()
            if name.startswith(inside)
            and tensor.dim() == 3
            and not isinstance(self.model.get_submodule(module_of(name)), _ConvNd)
        }
        return tuple(found)

    def units(self) -> tuple[Unit, ...]:
        """The walk's order: what comes before the layers, each layer, and what comes after."""
        paths = [self.layer_path(index) for index in range(self.layer_count)]
        owned: dict[str | None, list[str]] = {}
        embedding = {id(p) for p in self.model.get_input_embeddings().parameters()}
        tower = self.tower()
        first: list[str] = []
        for name, tensor in self.parameters().items():
            parameter = (
                self.model.get_parameter(name) if _is_parameter(self.model, name) else tensor
            )
            if id(parameter) in embedding:
                first.append(name)
            else:
                owned.setdefault(common_unit(name, paths), []).append(name)
        middle = [
            Unit(kind="layer", path=path, index=index, parameters=tuple(owned.get(path, ())))
            for index, path in enumerate(paths)
        ]
        rest = owned.get(None, ())
        seeing = tuple(name for name in rest if name in tower)
        return (
            Unit(kind="embedding", path="", index=-1, parameters=tuple(first)),
            *((Unit(kind="vision", path="", index=-1, parameters=seeing),) if seeing else ()),
            *middle,
            Unit(
                kind="head",
                path="",
                index=-1,
                parameters=tuple(name for name in rest if name not in tower),
            ),
        )


def _is_parameter(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(path)._parameters


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint, without its quantization."""
    from transformers import AutoConfig

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if raw.get("auto_map") and not trust_remote_code:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if raw.get("model_type") not in CONFIG_MAPPING:
            raise ModelError(
                f"{folder / 'config.json'}: model type {raw.get('model_type')!r} needs own code",
                hint=REMOTE_CODE_HINT,
            )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"{folder / 'config.json'}: transformers cannot read it: {first_line(error)}",
            hint="check model_type and the version of transformers that it needs",
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def build_skeleton(
    config: Any, *, trust_remote_code: bool = False, model_class: Any = None
) -> Skeleton:
    """Build the language model of `config` on the meta device in float32, eyes included.

    Computed buffers (rotary frequencies, embedding scales) are real, because some of them are
    never in a checkpoint. `model_class` spares looking for the class where it is known.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    config.use_cache = False
    try:
        with init_empty_weights(include_buffers=False):
            if model_class is not None:
                model = model_class(config)
            else:
                model = auto_class(config).from_config(
                    config, dtype=torch.float32, trust_remote_code=trust_remote_code
                )
            # The loop over experts in float32; grouped kernels want bf16 and a device of their own.
            model.set_experts_implementation("eager")
    except Exception as error:
        raise ModelError(
            f"model type {config.model_type!r} cannot be built as a language model: "
            f"{first_line(error)}",
            hint="qmerge walks decoder-only language models that transformers knows",
        ) from error
    model.eval()
    model.tie_weights()
    count = int(text_config(config).num_hidden_layers)
    fusions = find_fusions(model)
    opened = copy.deepcopy(model) if fusions or _conv1ds(model) else model
    open_experts(opened, fusions)
    return Skeleton(
        model=opened,
        fused=model,
        fusions=fusions,
        layers_path=_find_layers(model, count),
        layer_count=count,
        turned=_turn(opened),
    )


def rebuilt(skeleton: Skeleton, restated: Mapping[str, Any]) -> Skeleton:
    """The same model with some keys of its configuration `restated`."""
    config = copy.deepcopy(skeleton.model.config)
    for part in (config, text_config(config)):
        for key, value in restated.items():
            if hasattr(part, key):
                setattr(part, key, value)
    built = build_skeleton(config, model_class=type(skeleton.model))
    return replace(built, restated={**skeleton.restated, **restated})


def _conv1ds(model: nn.Module) -> list[tuple[str, Any]]:
    """Linears that keep their weight transposed, by name."""
    from transformers.pytorch_utils import Conv1D

    return [(name, m) for name, m in model.named_modules() if isinstance(m, Conv1D)]


def _turn(model: nn.Module) -> frozenset[str]:
    """Put linears in place of linears that keep their weight transposed; those weights' names."""
    turned = _conv1ds(model)
    for name, module in turned:
        linear = nn.Linear(module.nx, module.nf, device="meta", dtype=module.weight.dtype)
        model.set_submodule(name, linear)
    return frozenset(f"{name}{WEIGHT}" for name, _ in turned)


def auto_class(config: Any) -> Any:
    """The family of classes that has the one the checkpoint names: with eyes, or for text alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as known

    seeing = known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    blind = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = config.architectures or ()
    if seeing is not None and (blind is None or seeing in named):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    return config.get_text_config(decoder=True)


def _find_layers(model: Any, count: int) -> str:
    """Path of the decoder's module list with `count` entries that holds most parameters."""
    inside = set(model.get_decoder().modules())
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside
    ]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of {count} decoder layers",
            hint="qmerge walks models made of one list of decoder layers",
        )
    name: str = max(lists)[1]
    return name


def map_names(skeleton: Skeleton, stored: Mapping[str, StoredWeight]) -> NameMap:
    """Match stored names to the model's parameters as transformers itself would load them.

    A tied parameter may be stored under its second name alone. ModelError for one that transformers
    makes of several tensors, other than of experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = skeleton.model
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    apart = {tuple(fusion.converter.source_patterns) for fusion in skeleton.fusions}
    converters = [
        entry
        for entry in mapping
        if isinstance(entry, WeightConverter) and tuple(entry.source_patterns) not in apart
    ]
    fusions = {fusion.parameter for fusion in skeleton.fusions}
    known = {**model.state_dict(), **dict.fromkeys(fusions)}
    parameters = skeleton.parameters()
    aliases = skeleton.tied()
    found: dict[str, str] = {}
    second: dict[str, str] = {}
    fused: dict[str, str] = {}
    made: dict[str, list[str]] = {}
    unknown, ignored = [], []
    for name in stored:
        target, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, known
        )
        if target not in known:
            target, converted = rename_source_key(name, [], [], model.base_model_prefix, known)
        if converted is None and target in parameters:
            found[target] = name
        elif converted is None and target in aliases:
            second[target] = name
        elif target in fusions:
            fused[target] = name
        elif converted is not None and target in parameters:
            made.setdefault(target, []).append(name)
        elif _is_ignored(model, name, target) or _is_old_mask(stored[name]):
            ignored.append(name)
        elif not OLD_CACHE.search(name):
            unknown.append(name)
    owned = {aliases[alias]: name for alias, name in second.items() if aliases[alias] not in found}
    missing = tuple(name for name in parameters if name not in found | owned)
    for target, names in made.items():
        if target in missing:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"transformers makes {target} of {', '.join(names[:3])}{rest} as it loads them,"
                " which qmerge does not do",
                hint=WHOLE_HINT,
            )
        unknown += names
    return NameMap(
        stored=found | owned,
        unknown=tuple(unknown),
        ignored=tuple(ignored),
        missing=missing,
        written={name: name for name in owned},
        fused=fused,
        twice={a: (found[aliases[a]], n) for a, n in second.items() if aliases[a] in found},
    )


def _is_ignored(model: Any, *names: str) -> bool:
    """Whether transformers leaves this tensor out of the model (layers that only draft, say)."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def _is_old_mask(stored: StoredWeight) -> bool:
    """Whether a tensor that the model does not know is a mask that older models stored."""
    *path, leaf = stored.name.split(".")
    if OLD_MASKS.get(leaf) != len(stored.shape) or not any("att" in part for part in path):
        return False
    return not stored.shape or stored.shape == (1, 1, *stored.shape[-1:] * 2)


def first_line(error: BaseException) -> str:
    """What an error says first, and what it announces where that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
