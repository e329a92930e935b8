"""A base that training quantized on the fly: the original, quantized by bitsandbytes and decoded.

`load_in_4bit` and `load_in_8bit` leave no quantized folder behind. bitsandbytes does here what it
did there, on the same weights in the same dtype, so the base that the adapter saw comes back.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.formats.base import Format, StoredWeight, Wrapper
from qmerge.formats.integer import ALL
from qmerge.recipe import Dtype
from qmerge.storage.checkpoint import Checkpoint

Kind = Literal["nf4", "fp4", "int8"]
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
USUAL_BLOCK = 64
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
AS_STORED = "none"
HINT = (
    "use nf4, fp4 or int8, then ,double, ,block=64 and ,dtype=bfloat16 where training had them; or"
    " none"
)


@dataclass(frozen=True, kw_only=True)
class BaseQuant:
    """How training quantized its base; `block` elements share a scale (4 bits only)."""

    kind: Kind
    double: bool = False
    block: int = USUAL_BLOCK
    skip: tuple[str, ...] = ()
    """Modules left alone, named as for `llm_int8_skip_modules` of transformers: where there are
    any, a head that is not among them is quantized too, unless it is tied."""
    dtype: str | None = None
    """What the weights were loaded in, and quantized from; None where it is as they are stored.
    From weights of fp16 rounded to bf16 first, nf4 differs by a quarter of its own error."""

    @property
    def name(self) -> str:
        double = ", double" if self.double else ""
        return f"{self.kind} simulated" + (
            f"{double}, block {self.block}" if self.bits == 4 else ""
        )

    @property
    def option(self) -> str:
        """What `parse_base_quant` reads."""
        parts = [self.kind, *(["double"] if self.double else [])]
        parts += [f"block={self.block}"] if self.block != USUAL_BLOCK else []
        parts += [f"dtype={self.dtype}"] if self.dtype else []
        return ",".join([*parts, *(f"skip={name}" for name in self.skip)])

    @property
    def bits(self) -> int:
        return 8 if self.kind == "int8" else 4

    def quantizes(self, module: str) -> bool:
        """Whether transformers would have replaced this linear by one of bitsandbytes."""
        from transformers.quantizers.quantizers_utils import should_convert_module

        return bool(should_convert_module(module, list(self.skip)))


def parse_base_quant(text: str) -> BaseQuant | None:
    """`nf4|fp4|int8[,double][,block=N][,dtype=DTYPE][,skip=MODULE]`, or `none` for a base as it is
    stored; RecipeError for anything else."""
    if text.strip() == AS_STORED:
        return None
    kind, *options = (part.strip() for part in text.split(","))
    block, dtype, skip = USUAL_BLOCK, None, []
    for option in options:
        key, _, value = option.partition("=")
        if key == "block" and re.fullmatch(r"\d{1,5}", value):
            block = int(value)
        elif key == "dtype" and value in DTYPES:
            dtype = value
        elif key == "skip" and value:
            skip.append(value)
        elif option != "double":
            raise RecipeError(f"--base-quant: {option!r} is not known", hint=HINT)
    if kind not in ("nf4", "fp4", "int8") or block not in BLOCKS:
        raise RecipeError(f"--base-quant: {text!r} is not known", hint=HINT)
    if kind == "int8" and any(option.startswith(("double", "block")) for option in options):
        raise RecipeError(
            "--base-quant: int8 has neither blocks nor double quantization", hint=HINT
        )
    return BaseQuant(
        kind=cast(Kind, kind),
        double="double" in options,
        block=block,
        skip=tuple(skip),
        dtype=dtype,
    )


def loaded_dtype(config: Mapping[str, Any], stored: torch.dtype) -> str:
    """What transformers loads a checkpoint in unless it is told: as config.json says, else as most
    of it is stored."""
    named = config.get("dtype") or config.get("torch_dtype")
    return named if named in DTYPES else str(stored).removeprefix("torch.")


class SimulatedReader(Wrapper):
    """A dense checkpoint some of whose linears read as bitsandbytes would decode them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dense: Format,
        names: Iterable[str],
        quant: BaseQuant,
        turned: Collection[str] = (),
    ) -> None:
        """`turned` weights lie as [I, O], and are turned before they are quantized."""
        chosen = frozenset(names)
        weights = [
            dataclasses.replace(
                weight,
                quantized=True,
                bits=quant.bits,
                shape=weight.shape[::-1] if weight.name in turned else weight.shape,
            )
            if weight.name in chosen
            else weight
            for weight in dense.weights.values()
        ]
        summary = dataclasses.replace(
            dense.summary,
            method="bitsandbytes",
            checkpoint_format=quant.name,
            bits=quant.bits,
            block_size=quant.block if quant.bits == 4 else None,
            double_quantization=quant.double if quant.bits == 4 else None,
            quantized=len(chosen),
            dense=len(weights) - len(chosen),
        )
        super().__init__(checkpoint, name=quant.name, weights=weights, summary=summary)
        self.inner = dense
        self._quant = quant
        self._turned = frozenset(turned)

    def _decode(self, weight: StoredWeight, rows: slice, dtype: torch.dtype) -> Tensor:
        stored = self.inner.dense(weight.name, weight.dtype)
        stored_OI = stored.T if weight.name in self._turned else stored
        decoded_OI = round_trip(stored_OI, self._quant)
        return (decoded_OI if rows == ALL else decoded_OI[rows]).to(dtype)


def round_trip(weight_OI: Tensor, quant: BaseQuant) -> Tensor:
    """Quantize a weight as bitsandbytes' layers do when a model is loaded in `quant.dtype`, and
    decode it again.

    4 bits come back in that dtype, as in its matrix products; int8 in float32.
    """
    import bitsandbytes.functional as bnb

    if quant.dtype:
        weight_OI = weight_OI.to(getattr(torch, quant.dtype))
    if quant.kind == "int8":
        codes_OI, scale_O, _ = bnb.int8_vectorwise_quant(weight_OI.to(torch.float16))
        decoded: Tensor = codes_OI.float() * (scale_O.float()[:, None] / 127)
        return decoded
    packed, state = bnb.quantize_4bit(
        weight_OI.contiguous(),
        blocksize=quant.block,
        compress_statistics=quant.double,
        quant_type=quant.kind,
    )
    unpacked: Tensor = bnb.dequantize_4bit(packed, state)
    return unpacked.view(weight_OI.shape)
