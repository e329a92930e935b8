"""The exception tree: one class per exit code, each error with a hint for its reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class QmergeError(Exception):
    """Base of all errors that qmerge raises on purpose; `exit_code` is the command's."""

    exit_code = 3
    usual_hint: str | None = None
    """What helps against most errors of this class; `hint` where the place knows no better."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint


class InputError(QmergeError):
    """Something the user gave cannot be used; nothing has been written."""

    exit_code = 2


class RecipeError(InputError):
    """An option or a recipe key is unknown, missing or contradicts another."""


class CheckpointError(InputError):
    """A model folder is damaged, incomplete or in a form that cannot be read."""

    usual_hint = "copy the folder again from where it came, whole"


class AdapterError(InputError):
    """An adapter folder is damaged, of an unknown kind or made for another model."""

    usual_hint = "give the folder that PEFT saved, with the base it was trained on"


class CorpusError(InputError):
    """A text for calibration or evaluation is missing, empty or too short."""


class ModelError(InputError):
    """The architecture cannot be built or cannot be walked layer by layer."""


class StorageError(QmergeError):
    """Reading or writing failed: disk full, I/O error, another process holds the folder."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing the plan found wrong. `where` names the file, tensor or option."""

    where: str
    message: str
    hint: str | None = None


class PlanError(InputError):
    """All faults of a plan, listed together before anything is spent."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        lines = [f"{fault.where}: {fault.message}" for fault in self.faults]
        hints = [fault.hint for fault in self.faults if fault.hint]
        super().__init__("\n".join(lines), hint="\n".join(dict.fromkeys(hints)) or None)
