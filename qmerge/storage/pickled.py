"""Weights in pickles (`pytorch_model.bin`), through torch's weights-only reader and mapped."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.storage.files import expect_fetched, read_bytes, regular_status, translate
from qmerge.storage.headers import TensorInfo

_PICKLE_LIMIT = 64 * 2**20  # bytes of the pickle itself; the tensors lie outside it
_ZIP = b"PK\x03\x04"
_HINT = "convert the checkpoint to safetensors"


class PickledFile:
    """An opened pickle that is read like an opened safetensors file."""

    def __init__(self, path: Path) -> None:
        size = regular_status(path).st_size
        _check_archive(path, size)
        self._path = path
        self._tensors = _load(path)
        _check_storages(path, self._tensors, size)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> Tensor:
        return self._tensors[name]

    def header(self) -> dict[str, TensorInfo]:
        """As `headers.read_header` gives it for safetensors."""
        return {
            name: TensorInfo(
                name=name,
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                file=self._path,
                nbytes=tensor.numel() * tensor.element_size(),
            )
            for name, tensor in self._tensors.items()
        }


def _check_archive(path: Path, size: int) -> None:
    """torch.save writes a zip without compression; a compressed one could unpack to anything."""
    if size < len(_ZIP) or read_bytes(path, length=len(_ZIP)) != _ZIP:
        expect_fetched(path)
        raise CheckpointError(
            f"{path}: not an archive of torch.save (older than PyTorch 1.6, or damaged)", hint=_HINT
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            pickles = [member for member in members if member.filename.endswith("data.pkl")]
            whole = sum(member.file_size for member in members) <= size
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            fits = whole and stored and len(pickles) == 1 and pickles[0].file_size <= _PICKLE_LIMIT
            # The one allowed constructor that takes a length and fills that much memory.
            fits = fits and b"bytearray" not in archive.read(pickles[0])
    except OSError as error:
        raise translate(error, path) from error
    except Exception as error:  # zipfile raises many kinds on damaged archives
        raise CheckpointError(f"{path}: damaged archive: {error}", hint=_HINT) from error
    if not fits:
        raise CheckpointError(f"{path}: not an archive as torch.save writes it", hint=_HINT)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes provoke
        # Not torch's own words: they advise to switch the protection off.
        raise CheckpointError(
            f"{path}: damaged, or holds more than plain tensors",
            hint="such a pickle can run code when it is read; " + _HINT + " where you trust it",
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise CheckpointError(f"{path}: entry {str(name)[:100]!r} is not a plain tensor")
    return {name: value.detach() for name, value in state.items()}


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and not value.is_quantized
    )


def _check_storages(path: Path, tensors: dict[str, Tensor], size: int) -> None:
    """No tensor may claim more memory than the file has bytes, by strides of zero or otherwise."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors.values()}
    total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: tensor {name!r} is larger than its stored bytes")
    if total > size:
        raise CheckpointError(f"{path}: truncated: {total} bytes of tensors in a file of {size}")
