"""Images in a NumPy ``.npz`` file. Pickled objects are never read."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import DataError
from edgekd.sources.dataset import (
    WITHOUT_LABELS,
    Dataset,
    Part,
    Request,
    check_dataset,
    checked_images,
    checked_labels,
    stratified_split,
)
from edgekd.sources.decode import adapt_array

# Training images, training labels, validation images, validation labels.
KEYS = (
    ("train_images", "train_labels", "val_images", "val_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("Xt", "Yt", "Xe", "Ye"),
)
_DAMAGE = (OSError, EOFError, ValueError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error)


def accepts(path: Path) -> bool:
    """Whether this is a file for this source."""
    return path.is_file() and path.suffix.lower() == ".npz"


def load(path: Path, request: Request) -> Dataset:
    """Read a ``.npz`` file.

    Raises:
        DataError: not a ``.npz`` file, pickled content, missing arrays, or arrays that fail the checks.
    """
    return from_mapping(read_archive(path), f"{path}", request)


def read_archive(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of a ``.npz`` file, by its name."""
    name = ""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise DataError(f"{path} holds a single array, not an archive", "write it with numpy.savez")
            arrays = {}
            with archive:
                for name in archive.files:
                    arrays[name] = archive[name]
        return arrays
    except _DAMAGE as error:
        where = f"array '{name}' of {path}" if name else f"{path}"
        if "pickle" in str(error):
            raise DataError(
                f"{where} holds pickled objects, which may run code and are not read",
                "store plain arrays: uint8 images, integer labels, classes as an array of text",
            ) from error
        raise DataError(f"cannot read {where}: {error}", "write it again with numpy.savez") from error


def from_mapping(
    arrays: Mapping[str, NDArray[Any]], where: str, request: Request, classes: tuple[str, ...] = ()
) -> Dataset:
    """A `Dataset` from named arrays; without a validation part, the training part is split by the seed.

    Raises:
        DataError: missing arrays, or arrays that fail the checks.
    """
    keys = next((keys for keys in KEYS if keys[0] in arrays), None)
    if keys is None:
        accepted = "; ".join(", ".join(keys) for keys in KEYS)
        raise DataError(
            f"{where}: no training images; it holds: {', '.join(arrays) or 'nothing'}",
            f"names that are understood: {accepted}; and 'classes'",
        )
    needed = keys if keys[2] in arrays or keys[3] in arrays else keys[:2]
    if absent := [key for key in needed if key not in arrays]:
        raise DataError(
            f"{where}: missing array(s): {', '.join(absent)}; it holds: {', '.join(arrays)}",
            WITHOUT_LABELS if keys[1] in absent else "",
        )
    names = classes or _class_names(arrays, [arrays[key] for key in needed[1::2]], where)
    images = adapt_array(checked_images(arrays[keys[0]], f"{where}: {keys[0]}"), request)
    labels = checked_labels(arrays[keys[1]], len(images), names, f"{where}: {keys[1]}")
    if needed == keys:
        held_out = adapt_array(checked_images(arrays[keys[2]], f"{where}: {keys[2]}"), request)
        return check_dataset(Part(images, labels), Part(held_out, arrays[keys[3]]), names, where)
    parts = [
        Part(images[rows], labels[rows])
        for rows in stratified_split(labels, request.recipe.validation_fraction, request.seed, names, where)
    ]
    return check_dataset(parts[0], parts[1], names, where)


def _class_names(
    arrays: Mapping[str, NDArray[Any]], labels: list[NDArray[Any]], where: str
) -> tuple[str, ...]:
    """Names under ``classes``, else the label numbers."""
    if "classes" in arrays:
        names = arrays["classes"]
        if names.ndim != 1 or names.dtype.kind != "U":
            raise DataError(
                f"{where}: 'classes' is {names.dtype} of shape {names.shape}, expected a list of text",
                "numpy.array(['cat', 'dog'])",
            )
        return tuple(str(name) for name in names)
    highest = [int(part.max()) for part in labels if part.size and np.issubdtype(part.dtype, np.integer)]
    return tuple(str(index) for index in range(min(max(highest, default=1), 2**20) + 1))
