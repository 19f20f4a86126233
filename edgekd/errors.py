"""One exception tree; every leaf is something a user can act on, with its own exit code.

The codes are documented in ``docs/exit-codes.md``; 0 is success, 1 a failed gate, 2 wrong usage,
3 an inconclusive gate, 70 an error in edgekd itself and 75 an unusable measurement.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_GATE = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3, "UNUSABLE": 75}
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


class EdgekdError(Exception):
    """What went wrong and where (``message``), and what to do next (``hint``)."""

    exit_code = EXIT_INTERNAL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdgekdError):
    """The command line or the call asks for something that does not exist."""

    exit_code = 2


class RecipeError(EdgekdError):
    """A recipe or a target card is malformed."""

    exit_code = 10


class DataError(EdgekdError):
    """The images, labels or folders cannot be used as they are."""

    exit_code = 11


class TeacherError(EdgekdError):
    """The teacher cannot be loaded, does not fit the data, or does not know the task."""

    exit_code = 12


class MissingExtraError(EdgekdError):
    """An optional package is needed; the hint is the command that installs it."""

    exit_code = 13


class InfeasibleBudgetError(EdgekdError):
    """No student of the space meets the budget; the message names the nearest one."""

    exit_code = 14


class ParityError(EdgekdError):
    """An exported graph does not compute what the torch model computes."""

    exit_code = 15


class BundleError(EdgekdError):
    """A bundle is incomplete, altered, or of another format."""

    exit_code = 16


class TrainingDivergedError(EdgekdError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""

    exit_code = 17


class StorageError(EdgekdError):
    """A result cannot be written (read-only, full) or a stored one cannot be read."""

    exit_code = 18


class UnsupportedModelError(EdgekdError):
    """A network holds something that a stage cannot handle."""

    exit_code = 19


class BackendError(EdgekdError):
    """An inference runtime refused a graph or died while running it."""

    exit_code = 20


class StudentError(EdgekdError):
    """The student that the user brings cannot be loaded, or does not fit the data."""

    exit_code = 21


class DeviceMemoryError(EdgekdError):
    """A training step does not fit into the memory of the CUDA device, or of the machine."""

    exit_code = 22


class DeviceError(EdgekdError):
    """A remote device or cluster cannot be reached, refuses, or is lost; or cannot be emulated."""

    exit_code = 23


def unknown_name(kind: str, got: str, known: Iterable[str]) -> tuple[str, str]:
    """Message and hint for a name that is not in a table, with the nearest known name."""
    names = sorted(known)
    near = difflib.get_close_matches(got.strip().lower(), [name.lower() for name in names], n=1)
    near = [name for name in names if name.lower() in near]
    hint = f"did you mean '{near[0]}'?" if near else "choose one of those"
    return f"unknown {kind} '{got}'; known: {', '.join(names)}", hint


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """The error for an optional package that is not installed."""
    return MissingExtraError(
        f"{purpose} needs the package '{package}', which is not installed",
        f"python -m pip install 'edgekd[{extra}]'",
    )
