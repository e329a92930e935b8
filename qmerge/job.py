"""A recipe that can be carried out: everything opened, every setting decided."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from qmerge.adapters import Adapter, Change
from qmerge.corpus import Corpus
from qmerge.errors import Fault, InputError, ModelError, PlanError, QmergeError
from qmerge.gptq import GridSpec
from qmerge.model.paused import Held
from qmerge.model.skeleton import Skeleton
from qmerge.model.weights import Weights
from qmerge.names import Unit, module_of, under
from qmerge.recipe import ActOrder, GridChoice, OutputFormat, Recipe

REFERENCE = "trained"
"""The arm that the others are measured against."""
NOISE = "noise_floor"
NOISE_WINDOWS = 8
"""Windows of each corpus that are run in 16 bits as well, to see what that alone changes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How linears are quantized: the same for all siblings that share an input."""

    spec: GridSpec
    order: ActOrder
    damping: float
    format: OutputFormat
    grid: GridChoice
    unit_survival: bool
    refine: bool
    asymmetric: bool

    @property
    def reduced(self) -> bool:
        """Whether what is computed of calibration text may be rounded on matrix units. Of the
        release alone nothing is made but a Hessian, which takes it; beside a reference it is what
        the two differ by that counts, and that is small."""
        return not self.asymmetric

    @property
    def streams(self) -> int:
        """Streams of calibration text: the release's, and the reference's where it is aimed at."""
        return 1 + self.asymmetric


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe that can be carried out, with everything opened that it needs."""

    recipe: Recipe
    skeleton: Skeleton
    base: Weights
    original: Weights | None
    previous: Weights | None
    change: Change | None
    adapters: tuple[Adapter, ...]
    tokenizer_folder: Path
    calibration: Corpus
    evaluation: tuple[Corpus, ...]
    settings: Settings
    strategies: tuple[str, ...]
    specs: Mapping[str, GridSpec]
    """The grids of the modules that are quantized, by parameter name without `.weight`."""
    at_once: int
    """Windows of a micro-batch."""
    held: Held
    """Bytes per token of forwards that wait before a linear."""
    waiting: bool
    """Whether forwards of all calibration windows may wait in a layer at one time."""
    device: torch.device
    notes: tuple[str, ...]
    compared: bool = True
    """Whether the original is what the base was quantized from, so that their difference says what
    that cost."""

    @property
    def in_domain(self) -> Corpus:
        """The text that decides where one must."""
        found = (corpus for corpus in self.evaluation if corpus.role == "in_domain")
        return next(found, self.evaluation[0])

    @property
    def touched(self) -> frozenset[str]:
        """Parameters that the adapter may change."""
        return self.change.touched if self.change is not None else frozenset()

    def targets_of(self, unit: Unit) -> tuple[str, ...]:
        """Modules of one unit that are quantized, relative to its path."""
        return tuple(
            module_of(name)
            for parameter in unit.parameters
            if module_of(parameter) in self.specs
            and parameter.endswith(".weight")
            and (name := under(parameter, unit.path)) is not None
        )


def merged_arm(strategy: str) -> str:
    return f"merged@{strategy}"


def release_arm(strategy: str) -> str:
    return f"release@{strategy}"


def arm_names(job: Job) -> tuple[str, ...]:
    """The arms that stream through the walk, in the order in which they are told."""
    before = ("original",) if job.original is not None else ()
    after = ("previous",) if job.previous is not None else ()
    if job.change is None:  # nothing to merge: the base is what was trained
        return (*before, REFERENCE, *map(release_arm, job.strategies), *after)
    made = [arm(s) for s in job.strategies for arm in (merged_arm, release_arm)]
    return (*before, "quantized_base", REFERENCE, *made, *after)


def partial_folder(out: Path) -> Path:
    """Where a run that publishes `out` works."""
    return out.with_name(f"{out.name}.partial")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if os.access(p, os.F_OK))


def check_out(out: Path) -> None:
    """`InputError` where something stands at `out`, or nothing can be made there."""
    above = existing(out.parent)
    if not above.is_dir():
        raise InputError(f"{above} is not a folder")
    made = partial_folder(out).absolute().relative_to(above.absolute()).parts if out.name else ()
    if any(len(os.fsencode(part)) > os.pathconf(above, "PC_NAME_MAX") for part in made):
        raise InputError(f"{out}: a longer name than the file system takes")
    if out.name in ("", "..") or os.access(out, os.F_OK) or out.is_symlink():
        raise InputError(
            f"{out} exists", hint="name a folder that does not exist yet, or remove this one"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"nothing may be written in {above}", hint="give a place that can be written to"
        )


class Faults:
    """Collects what is wrong, so that one look shows all of it."""

    def __init__(self) -> None:
        self.found: list[Fault] = []

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        try:
            yield
        except PlanError as error:
            self.found += error.faults
        except QmergeError as error:
            self.found.append(Fault(where=where, message=error.message, hint=error.hint))


def pick_device(asked: str) -> torch.device:
    """`--device`; `auto` is the first CUDA device where there is one."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(asked)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"{asked}: this machine has no such device", hint="use --device cpu")
    return device
