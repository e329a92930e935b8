"""Formats: stored tensors on one side, the model's dense weights on the other."""

from __future__ import annotations

from qmerge.errors import CheckpointError
from qmerge.formats.awq import AwqReader
from qmerge.formats.base import Format, FormatSummary, StoredWeight
from qmerge.formats.bitsandbytes import BitsandbytesReader
from qmerge.formats.compressed_tensors import CompressedTensorsReader
from qmerge.formats.dense import DenseReader
from qmerge.formats.fp8 import Fp8Reader
from qmerge.formats.gptq import GptqReader
from qmerge.formats.integer import IntegerWeight
from qmerge.formats.mxfp4 import Mxfp4Reader
from qmerge.formats.settings import read_settings
from qmerge.storage.checkpoint import Checkpoint

__all__ = ["Format", "FormatSummary", "IntegerWeight", "StoredWeight", "open_format"]

READERS = (
    DenseReader,
    GptqReader,
    AwqReader,
    BitsandbytesReader,
    Fp8Reader,
    Mxfp4Reader,
    CompressedTensorsReader,
)


def open_format(checkpoint: Checkpoint) -> Format:
    """The reader for a checkpoint's format; headers and small tables only are read.

    CheckpointError for a method that qmerge does not read, and, with the tensor's name, for parts
    that are missing, do not fit the settings or belong to no weight.
    """
    settings = read_settings(checkpoint)
    for reader in READERS:
        if settings.method in reader.methods:
            return reader.open(checkpoint, settings)
    known = sorted(reader.methods[0] for reader in READERS if reader is not DenseReader)
    raise CheckpointError(
        f"{checkpoint.path}: quantized with {settings.method!r}, which qmerge does not read",
        hint=f"it reads {', '.join(known)} and models that are not quantized",
    )
