"""The files of a release: the report's own seal, digests, strays, the index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open

from qmerge.errors import CheckpointError, InputError
from qmerge.release import unseal
from qmerge.reread import read_report
from qmerge.results import REPORT, RunResult
from qmerge.storage.files import read_json, regular_status
from qmerge.storage.headers import read_header
from qmerge.storage.shards import INDEX_NAME, sha256_file
from qmerge.verify.findings import Findings


def check_report(folder: Path, findings: Findings) -> RunResult | None:
    """The report, if it can be read at all."""
    result = None
    with findings.at("report"):
        result = read_report(folder)
        if result.release is None or not result.release.files:
            raise InputError(f"{REPORT} is not of a release: it names no files")
        text = (folder / REPORT).read_text(encoding="utf-8")
        changed = [f"{REPORT} is not as it was written: its own digest does not fit"]
        findings.say("report", [] if unseal(text) else changed, f"{REPORT} is as it was written")
    return result


def check_files(folder: Path, files: Mapping[str, str], findings: Findings) -> None:
    """Every file that the report names, and no other."""
    there = set(_names(folder))
    missing = sorted(files.keys() - there)
    findings.say("files-present", missing, f"all {len(files)} files are there")
    changed = []
    for name in sorted(files.keys() & there):
        with findings.at("digests"):
            if sha256_file(folder / name) != files[name]:
                changed.append(f"{name} is not what the report says")
    findings.say("digests", changed, "every file that is there has the digest of the report")
    strays = sorted(there - files.keys() - {REPORT})
    findings.say("strays", strays, "there is no file that the report does not name")


def check_index(folder: Path, findings: Findings) -> None:
    """The index against the headers of the shards, both ways."""
    with findings.at("index"):
        index = read_json(folder / INDEX_NAME, unique=True)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise CheckpointError(f"{INDEX_NAME}: has no weight_map")
        wrong = list(_index_faults(folder, {str(k): str(v) for k, v in weight_map.items()}, index))
        findings.say("index", wrong, f"{len(weight_map)} tensors are where {INDEX_NAME} says")
    with findings.at("safetensors-metadata"):
        unsaid = [file.name for file in sorted(folder.glob("*.safetensors")) if not _says_pt(file)]
        text = "every shard says that it holds PyTorch tensors, as transformers demands"
        findings.say("safetensors-metadata", [f"{n} says no format" for n in unsaid], text)


def _index_faults(
    folder: Path, weight_map: Mapping[str, str], index: Mapping[str, object]
) -> Iterator[str]:
    named = set(weight_map.values())
    yield from (f"{n} is no file name" for n in sorted(named) if Path(n).name != n)
    shards = {file.name for file in folder.glob("*.safetensors")}
    yield from (f"{name} is named and not there" for name in sorted(named - shards))
    yield from (f"{name} is there and not named" for name in sorted(shards - named))
    stored = {name: read_header(folder / name) for name in sorted(shards & named)}
    for shard, tensors in stored.items():
        own = {name for name, file in weight_map.items() if file == shard}
        yield from (f"{name} is not in {shard}" for name in sorted(own - tensors.keys()))
        yield from (f"{name} in {shard} is not indexed" for name in sorted(tensors.keys() - own))
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    total = sum(info.nbytes for tensors in stored.values() for info in tensors.values())
    if size != total:
        yield f"total_size is {size}, the tensors have {total} bytes"


def _says_pt(file: Path) -> bool:
    read_header(file)  # in our own errors, what the library would refuse
    with safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get("format") == "pt"


def _names(folder: Path) -> Iterator[str]:
    """Names relative to the folder; hidden ones are of tools that sync, but not a torn write's."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if hidden and not path.name.endswith(".tmp"):
            continue
        if not path.is_dir():
            regular_status(path)
            yield path.relative_to(folder).as_posix()
