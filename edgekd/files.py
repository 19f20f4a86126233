"""Files of a run: atomic writes, digests, and where the shipped data lies."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edgekd.errors import StorageError


def data_folder(name: str) -> Path:
    """``targets`` or ``calibration``: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise StorageError(
        f"the shipped folder '{name}' is missing from the installation at {package}", "reinstall edgekd"
    )


def cache_folder() -> Path:
    """What can be made again: ``~/.cache/edgekd``, or below ``XDG_CACHE_HOME``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step.

    Raises:
        StorageError: the folder is read-only or the disk is full; nothing is left half-written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            "choose a writable folder with free space: --out FOLDER",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""

    def fill(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomic(path, fill)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def append_line(path: Path, value: object) -> None:
    """Add a value to a file of JSON lines.

    Raises:
        StorageError: the folder is read-only or the disk is full.
    """
    append_text(path, msgspec.json.encode(value).decode() + "\n")


def append_text(path: Path, text: str) -> None:
    """Add to a text file, in UTF-8.

    Raises:
        StorageError: the folder is read-only or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}", "choose a writable folder: --out FOLDER"
        ) from error


def read_json(path: Path, hint: str = "delete it and run the stage again") -> Any:
    """Read a JSON file.

    Raises:
        StorageError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}", hint) from error
