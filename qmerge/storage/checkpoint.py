"""A model folder as an index of lazily read tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.names import listed
from qmerge.storage.files import read_json, regular_status, translate
from qmerge.storage.headers import TensorInfo, read_header
from qmerge.storage.pickled import PickledFile

# A mapped file counts as memory in use, page by page, until its mapping goes. Mappings are dropped
# after this many bytes read, and those under living tensors go with the tensors.
_MAPPED_BYTES = 64 * 2**20

_WEIGHTS_OF_ANY_KIND = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|ggml|ot|tflite|npz)$|\.index\.json$"
)
_SHARD_NAME = re.compile(r"-\d+-of-\d+\.(safetensors|bin)$")
# Weights beside the model's own: an adapter, and the second copy some releases carry.
_OTHER_WEIGHTS = ("adapter_", "consolidated")


class _Opened(Protocol):
    """A mapped weight file: safetensors' `safe_open`, or `PickledFile`."""

    def get_tensor(self, name: str) -> Tensor: ...
    def get_slice(self, name: str) -> Any: ...


class Checkpoint:
    """The tensors and the configuration of one model folder; opening it reads headers only.

    `config` is config.json, empty where there is none. `tensors` is sorted by name. Tensors come
    in the dtype they are stored in, on the CPU, and are views of the mapped file: do not write
    into them.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def __init__(
        self, path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.path = path
        self.config = MappingProxyType(dict(config))
        self.tensors = MappingProxyType(dict(sorted(tensors.items())))
        self._opened: dict[Path, _Opened] = {}
        self._bytes_mapped = 0
        self._stamps = {file: _stamp(file) for file in {t.file for t in tensors.values()}}

    @classmethod
    def open(cls, path: str | Path, *, config_required: bool = False) -> Self:
        """Read the index and every header. Any structural fault is a CheckpointError.

        The folder may be a link, and so may the files in it (the hub's cache is made of links);
        a name in the index must be that of a file in this very folder.
        """
        folder = Path(path)
        try:
            if not folder.is_dir():
                raise CheckpointError(
                    f"{folder}: no such folder",
                    hint="give the local folder that holds config.json and the weights",
                )
            config = _read_config(folder, required=config_required)
            return cls(folder, config, _read_tensors(folder))
        except OSError as error:
            raise translate(error, folder) from error

    def read(self, name: str) -> Tensor:
        """The whole tensor, backed by the mapped file. CheckpointError if the file has changed."""
        info = self._info(name)
        tensor: Tensor = self._take(info, info.nbytes, None)
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of dimension 0; the rest of the tensor is not touched."""
        info = self._info(name)
        assert info.shape, f"{name} is a scalar and has no rows"
        assert 0 <= start <= stop <= info.shape[0], f"rows {start}:{stop} of {info.shape}"
        row_bytes = info.nbytes // max(info.shape[0], 1)
        return self._take(info, (stop - start) * row_bytes, slice(start, stop))

    def side_files(self) -> tuple[Path, ...]:
        """`folder_side_files` of the model's folder."""
        return folder_side_files(self.path)

    def close(self) -> None:
        """Let go of the mapped files; tensors already read stay valid."""
        self._opened.clear()
        self._bytes_mapped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}")
        return info

    def _take(self, info: TensorInfo, nbytes: int, rows: slice | None) -> Tensor:
        """Read through the library; a file that shrank under its mapping would kill the process."""
        try:
            if _stamp(info.file) != self._stamps[info.file]:
                raise CheckpointError(f"{info.file}: has changed since it was opened")
            opened = self._open(info.file)
            self._bytes_mapped += nbytes
            if rows is None:
                return opened.get_tensor(info.name)
            taken: Tensor = opened.get_slice(info.name)[rows]
            return taken
        except OSError as error:
            raise translate(error, info.file) from error
        except SafetensorError as error:
            raise CheckpointError(f"{info.file}: tensor {info.name!r}: {error}") from error

    def _open(self, file: Path) -> _Opened:
        if self._bytes_mapped > _MAPPED_BYTES:
            self.close()
        opened = self._opened.get(file)  # held: another thread may let go of all at any time
        if opened is None:
            pickled = file.suffix == ".bin"
            opened = PickledFile(file) if pickled else safe_open(file, framework="pt")
            self._opened[file] = opened
        return opened


def folder_side_files(folder: Path) -> tuple[Path, ...]:
    """All files that belong to a model and are neither weights nor an index, sorted.

    Those of the folder itself (hidden ones aside) and of `additional_chat_templates/`, where
    transformers keeps a tokenizer's further templates. They end up in what the user publishes, so
    a link that leads out of the folder, other than into the hub's cache, is a CheckpointError.
    """
    try:
        return tuple(sorted(_side_files(folder)))
    except OSError as error:
        raise translate(error, folder) from error


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of change: enough to see that a file was replaced or cut during a run."""
    status = regular_status(file)
    return status.st_size, status.st_mtime_ns


def _read_config(folder: Path, *, required: bool) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists() and not file.is_symlink():
        if required:
            adapter = (folder / "adapter_config.json").exists()
            held = "holds an adapter and no model" if adapter else "does not hold a model"
            raise CheckpointError(f"{file}: missing", hint=f"this folder {held}")
        return {}
    return read_json(file)


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    index = _find_index(folder)
    if index is None:
        return _read_file(_find_single(folder))
    weight_map = _read_index(index)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        for name, info in _read_file(folder / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is both in {tensors[name].file.name} and {file}"
                )
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{folder / file}: lacks tensor {name!r}, which {index.name} names"
            )
    return tensors


def _read_file(file: Path) -> dict[str, TensorInfo]:
    if file.suffix == ".bin":
        return PickledFile(file).header()
    return read_header(file)


def _find_index(folder: Path) -> Path | None:
    """The index to go by. Safetensors come before pickles, as in transformers."""
    own = folder / "model.safetensors.index.json"
    if own.exists():
        return own
    if (folder / "model.safetensors").exists():
        return None
    others = _matching(folder, "*.safetensors.index.json")
    if len(others) > 1:
        raise CheckpointError(f"{folder}: several indexes: {_named(others)}")
    if others:
        return others[0]
    pickled = folder / "pytorch_model.bin.index.json"
    return pickled if pickled.exists() and not _matching(folder, "*.safetensors") else None


def _find_single(folder: Path) -> Path:
    """The one weight file of a folder without an index, by its usual name or as the only one."""
    usual, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if usual.exists():
        return usual
    found = _matching(folder, "*.safetensors")
    if len(found) == 1 and not _SHARD_NAME.search(found[0].name):
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: holds {_named(found)} but no model.safetensors.index.json",
            hint="fetch the index that belongs to these shards",
        )
    if pickled.exists():
        return pickled
    raise CheckpointError(
        f"{folder}: holds no weights (safetensors)", hint=_weightless_hint(folder)
    )


def _weightless_hint(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return "this folder holds an adapter, not a model"
    return "a model folder holds model.safetensors, or shards with model.safetensors.index.json"


def _matching(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        file for file in folder.glob(pattern) if not file.name.startswith((".", *_OTHER_WEIGHTS))
    )


def _named(files: list[Path]) -> str:
    return listed((file.name for file in files), 3)


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {str(file)[:200]!r}, "
                "which is not a weight file of this folder"
            )
    single = index.parent / "model.safetensors"
    if single.exists() and single.name not in weight_map.values():
        raise CheckpointError(
            f"{index.parent}: holds both model.safetensors and an index that does not name it",
            hint="remove the one that is out of date",
        )
    return weight_map


def _is_plain_name(name: str) -> bool:
    """A file name and nothing more: no folder, no `..`, no drive, nothing hidden."""
    suffix_known = name.endswith((".safetensors", ".bin"))
    return suffix_known and not name.startswith(".") and not set(name) & set("/\\:\0")


def _side_files(folder: Path) -> Iterator[Path]:
    places = (folder, folder / "additional_chat_templates")
    home = folder.resolve()
    # <cache>/snapshots/<revision>/file is a link to <cache>/blobs/<digest>
    allowed = (home, home.parent.parent / "blobs")
    for file in (file for place in places if place.is_dir() for file in place.iterdir()):
        if file.name.startswith(".") or file.is_dir() or _WEIGHTS_OF_ANY_KIND.search(file.name):
            continue
        regular_status(file)
        if not any(file.resolve().is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{file}: a link that leads out of the folder",
                hint="put the file itself there; it is copied into the release",
            )
        yield file
