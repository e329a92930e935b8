"""Formats: stored tensors on one side, the model's dense weights on the other."""

from __future__ import annotations

from qmerge.errors import CheckpointError
from qmerge.formats.awq import AwqReader
from qmerge.formats.base import Format, FormatSummary, IntegerWeight, StoredWeight
from qmerge.formats.bitsandbytes import BitsandbytesReader
from qmerge.formats.compressed_tensors import CompressedTensorsReader
from qmerge.formats.dense import DenseReader
from qmerge.formats.fp8 import Fp8Reader
from qmerge.formats.gptq import GptqReader, V1Zeros
from qmerge.formats.settings import read_settings
from qmerge.storage.checkpoint import Checkpoint

__all__ = ["Format", "FormatSummary", "IntegerWeight", "StoredWeight", "open_format"]

READERS = (
    DenseReader,
    GptqReader,
    AwqReader,
    BitsandbytesReader,
    Fp8Reader,
    CompressedTensorsReader,
)


def open_format(checkpoint: Checkpoint, *, v1_zeros: V1Zeros | None = None) -> Format:
    """The reader for a checkpoint's format; headers and small tables only are read.

    `v1_zeros` says how GPTQ v1 zero points were stored where the settings mislead: by `field`
    (AutoGPTQ) or by `word` (gptqmodel).

    CheckpointError for a method that qmerge does not read, and, with the tensor's name, for parts
    that are missing, do not fit the settings or belong to no weight.
    """
    settings = read_settings(checkpoint)
    for reader in READERS:
        if settings.method not in reader.methods:
            continue
        if reader is GptqReader:
            return GptqReader.open(checkpoint, settings, v1_zeros=v1_zeros)
        return reader.open(checkpoint, settings)
    known = sorted(method for reader in READERS for method in reader.methods if method != "none")
    raise CheckpointError(
        f"{checkpoint.path}: quantized with {settings.method!r}, which qmerge does not read",
        hint=f"it reads {', '.join(known)} and models that are not quantized",
    )
