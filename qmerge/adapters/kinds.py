"""Which adapters can become weights. The list is the installed PEFT's; the reasons are ours.

A kind is refused by name where what it adds depends on the input, the prompt or the task, so that
no weight can hold it. Everything else PEFT merges itself, and `inject` proves on a small sample
that it does before it is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROMPT_REASON = "it learns vectors that are put before the prompt or into the cache, not weights"

REFUSED_KINDS = (
    ("ADAPTION_PROMPT", "it adds gated prompt tokens inside attention, not weights"),
    ("LILY", "a router chooses among its matrices for each input"),
    ("POLY", "it mixes its skills by a task number given at run time"),
    ("SHADOW", "it steers hidden states beside the model, not weights"),
    ("XLORA", "it weighs several adapters anew for every token"),
)
"""Kinds whose effect is no change of weights, beside those that PEFT marks as prompt learning."""

BASE_SHAPED_KINDS = (
    (
        "ADAMSS",
        "it does not save which rows of a weight it changes: PEFT draws and clusters the base anew"
        " to find them, and on another device or release the same adapter lands on other rows",
    ),
)
"""Kinds that the saved adapter and its base do not determine. ADAMSS saves blocks B of rows without
their places; a second draw of `svd_lowrank` on one weight put 317 of 512 rows into other clusters.
"""

SETTLING_KINDS = ("ADALORA", "FROD", "SHIRA", "UNILORA")
"""Kinds that compute with values while they are injected, which meta cannot or forgets."""

DRAWN_OPTION = "save_projection"
"""Where this is false PEFT draws what all layers share again from a seed, which meta cannot."""

REFUSED_OPTIONS = (
    ("alora_invocation_tokens", "aLoRA is active only after its invocation tokens"),
    ("arrow_config", "an Arrow router weighs several adapters anew for every token"),
    ("use_qalora", "QALoRA pools the layer's input, and PEFT cannot merge it"),
    ("use_qa_lora", "ms-swift's QA-LoRA pools the layer's input, and PEFT does not know it"),
    ("use_merged_linear", "ms-swift's merged linears leave out a part that PEFT does not know of"),
    ("megatron_config", "it belongs to Megatron's parallel layers"),
    ("layer_replication", "it repeats decoder layers, so one weight would need several updates"),
)
"""LoRA options with the same fault."""

PLAIN_STARTS = ("gaussian", "orthogonal", "mica", "eva")
"""Starts that leave the base as it is, beside true and false; EVA and MiCA only look at it."""

TRAINING_ONLY = (("monteclora_config", "lora_monteclora_sampler"),)
"""LoRA options that draw at random while training and do nothing afterwards, and their tensors."""

BASE_INITS = (
    ("corda", "CorDA took a part out of the base that only its calibration data can find again"),
    (
        "lora_ga",
        "LoRA-GA took a part out of the base that only its gradients can find again, so it needs"
        " the base saved after that step",
    ),
    ("loftq", "LoftQ starts from the quantization error of its base, so it needs that base"),
    (
        "pissa",
        "PiSSA moved a part of the base into the adapter; merge onto the base it started from",
    ),
    (
        "olora",
        "OLoRA moved a part of the base into the adapter; merge onto the base it started from",
    ),
)
"""LoRA starts that change the base. Prefixes of `init_lora_weights`."""

UNREPEATABLE_INIT = "corda"
QUANTIZED_INIT = "loftq"
BOUND_INITS = (QUANTIZED_INIT, "lora_ga")
"""Starts after which base and adapter belong together: the original is another model."""
SPLIT_INITS = ("pissa", "olora")
"""Starts that PEFT makes again from the base's own 16-bit weights when it loads the adapter."""
BOUND_KINDS = (
    (
        "FROD",
        "FRoD scales directions that it takes from the weights of its base, and saves no others",
    ),
    ("OSF", "OSF keeps the smaller singular values of its base in the adapter"),
    ("PSOFT", "PSOFT turns singular directions of its base, which it does not save"),
)
"""Kinds that mean something on the base they were trained on only. On one that differed by 3% of
its deviation, the update of FRoD and PSOFT became another one, and a tenth of OSF's."""
PLACES_OPTION = (
    "save_precomputed_indices",
    "it changes the largest values of its base, and does not save which",
)
"""Where this is false the places of what is sparse are looked up in the base."""


def kind_refusal(kind: str) -> str | None:
    """Why adapters of this kind cannot be merged, or None. `kind` is PEFT's `peft_type`."""
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    reasons = dict((*REFUSED_KINDS, *BASE_SHAPED_KINDS))
    if kind in reasons:
        return reasons[kind]
    known = {peft_type.value: peft_type for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING}
    if kind not in known:
        return "the installed PEFT does not know it"
    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[known[kind]], PromptLearningConfig):
        return PROMPT_REASON
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[known[kind]]
    if not hasattr(tuner, "merge_and_unload"):
        return "the installed PEFT has no merge for it"
    return None


def settles(config: Mapping[str, Any]) -> bool:
    """Whether PEFT computes with values while it injects the adapter of this configuration."""
    return config["peft_type"] in SETTLING_KINDS or not config.get(DRAWN_OPTION, True)


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why the adapter with this `adapter_config.json` cannot be merged, or None."""
    reason = kind_refusal(str(config.get("peft_type")))
    if reason:
        return reason
    if config["peft_type"] == "FROD" and not config.get(DRAWN_OPTION, True):
        return "its projections were not saved; they follow from the weights of all layers at once"
    for option, why in REFUSED_OPTIONS:
        if config.get(option):
            return f"{option}: {why}"
    start, init = config.get("init_lora_weights"), base_init(config)
    if init and init[0] == UNREPEATABLE_INIT:
        return f"init_lora_weights {start!r}: {init[1]}"
    if init and init[0] in (*SPLIT_INITS, QUANTIZED_INIT) and config.get("target_parameters"):
        return f"target_parameters: {start!r} changed the base under them, which is not made again"
    if isinstance(start, str) and not init and start.lower() not in PLAIN_STARTS:
        return f"init_lora_weights {start!r}: a start that is not known, which may change the base"
    return None


def bound_kind(config: Mapping[str, Any]) -> str | None:
    """Why an adapter of this kind means nothing on another base than its own, or None."""
    option, why = PLACES_OPTION
    return why if config.get(option) is False else dict(BOUND_KINDS).get(config["peft_type"])


def base_init(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The start that changed the base, as (name, what that means for merging), or None."""
    start = config.get("init_lora_weights")
    if not isinstance(start, str):
        return None
    return next((entry for entry in BASE_INITS if start.lower().startswith(entry[0])), None)
