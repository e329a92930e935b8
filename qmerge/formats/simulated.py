"""A base that training quantized on the fly: the original, quantized by bitsandbytes and decoded.

`load_in_4bit` and `load_in_8bit` leave no quantized folder behind. bitsandbytes does here what it
did there, on the same weights in the same dtype, so the base that the adapter saw comes back.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.formats.base import ALL, Format, Reader, StoredWeight
from qmerge.storage.checkpoint import Checkpoint

Kind = Literal["nf4", "fp4", "int8"]
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
AS_STORED = "none"
HINT = "use nf4, fp4 or int8, then ,double and ,block=64 where training had them; or none"


@dataclass(frozen=True, kw_only=True)
class BaseQuant:
    """How training quantized its base; `block` elements share a scale (4 bits only)."""

    kind: Kind
    double: bool = False
    block: int = 64
    skip: tuple[str, ...] = ()
    """Modules left alone, named as for `llm_int8_skip_modules` of transformers."""

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
        parts += [f"block={self.block}"] if self.block != BLOCKS[0] else []
        return ",".join([*parts, *(f"skip={name}" for name in self.skip)])

    @property
    def bits(self) -> int:
        return 8 if self.kind == "int8" else 4

    def quantizes(self, module: str) -> bool:
        """Whether transformers would have replaced this linear by one of bitsandbytes."""
        from transformers.quantizers.quantizers_utils import should_convert_module

        return bool(should_convert_module(module, list(self.skip)))


def parse_base_quant(text: str) -> BaseQuant | None:
    """`nf4|fp4|int8[,double][,block=N][,skip=MODULE]`, or `none` for a base as it is stored;
    RecipeError for anything else."""
    if text.strip() == AS_STORED:
        return None
    kind, *options = (part.strip() for part in text.split(","))
    block, skip = BLOCKS[0], []
    for option in options:
        block_size, skipped = re.fullmatch(r"block=(\d{1,5})", option), option.startswith("skip=")
        if block_size:
            block = int(block_size[1])
        elif skipped:
            skip.append(option.removeprefix("skip="))
        elif option != "double":
            raise RecipeError(f"--base-quant: {option!r} is not known", hint=HINT)
    if kind not in ("nf4", "fp4", "int8") or block not in BLOCKS:
        raise RecipeError(f"--base-quant: {text!r} is not known", hint=HINT)
    if kind == "int8" and len(skip) < len(options):
        raise RecipeError(
            "--base-quant: int8 has neither blocks nor double quantization", hint=HINT
        )
    double = "double" in options
    return BaseQuant(kind=cast(Kind, kind), double=double, block=block, skip=tuple(skip))


class SimulatedReader(Reader):
    """A dense checkpoint some of whose linears read as bitsandbytes would decode them."""

    methods = ()

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
        self._quant = quant
        self._turned = frozenset(turned)

    def _decode(self, weight: StoredWeight, rows: slice, dtype: torch.dtype) -> Tensor:
        stored = self.checkpoint.read(weight.name)
        stored_OI = stored.T if weight.name in self._turned else stored
        decoded_OI = round_trip(stored_OI, self._quant)
        return (decoded_OI if rows == ALL else decoded_OI[rows]).to(dtype)


def round_trip(weight_OI: Tensor, quant: BaseQuant) -> Tensor:
    """Quantize a weight as bitsandbytes' layers do when a model is loaded, and decode it again.

    4 bits come back in the weight's dtype, as in its matrix products; int8 in float32.
    """
    import bitsandbytes.functional as bnb

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
