"""What every source returns, and the checks that every source passes through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import DataError
from edgekd.recipe import DataRecipe

WITHOUT_LABELS = (
    "images without labels are --set data.unlabeled=PATH, beside some that have them; edgekd label lets a "
    "teacher name their classes"
)


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory (or a memory map): uint8 (N, H, W, C) and int64 class indices (N,)."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    validation_images: NDArray[np.uint8]
    validation_labels: NDArray[np.int64]
    classes: tuple[str, ...]
    description: str  # what and from where, for the report
    sha256: str  # of the decoded arrays and class names
    skipped: tuple[str, ...] = ()  # unreadable files left out on request

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        _, height, width, channels = self.train_images.shape
        return int(height), int(width), int(channels)


def summary(data: Dataset) -> dict[str, Any]:
    """What the record keeps of a data set."""
    return {
        "source": data.description,
        "classes": list(data.classes),
        "train": len(data.train_labels),
        "validation": len(data.validation_labels),
        "shape": list(data.shape),
        "sha256": data.sha256,
        "skipped": list(data.skipped),
    }


@dataclass(frozen=True)
class Request:
    """What is asked of a source; `image_size` is (height, width), and `None` means: as stored."""

    recipe: DataRecipe
    seed: int
    image_size: tuple[int, int] | None = None
    color: str | None = None  # "grey" | "rgb"
    cache: Path | None = None
    progress: Callable[[int, int], None] | None = None  # (images done, images in all)


class Part(NamedTuple):
    """Images and labels of one part, not checked yet."""

    images: NDArray[Any]
    labels: NDArray[Any]


def check_dataset(
    train: Part, validation: Part, classes: Sequence[str], where: str, skipped: Sequence[str] = ()
) -> Dataset:
    """The one door to a `Dataset`.

    Args:
        where: the source in words; every error message starts with it.

    Raises:
        DataError: wrong dtype or shape, labels out of range, fewer than two classes, a class without a
            training image, or an empty part.
    """
    classes = tuple(str(name) for name in classes)
    if len(classes) < 2:
        raise DataError(
            f"{where}: {len(classes)} class(es); a classifier needs at least two",
            "use one folder, or one label, for each class",
        )
    if len(set(classes)) != len(classes) or not all(classes):
        raise DataError(f"{where}: class names must be different and not empty, got {list(classes)}")
    train_images = checked_images(train.images, f"{where}: training images")
    validation_images = checked_images(validation.images, f"{where}: validation images")
    if train_images.shape[1:] != validation_images.shape[1:]:
        raise DataError(
            f"{where}: training images are {train_images.shape[1:]} and validation images "
            f"{validation_images.shape[1:]} (height, width, channels)",
            "resize both: --set data.image_size=N",
        )
    train_labels = checked_labels(train.labels, len(train_images), classes, f"{where}: training labels")
    validation_labels = checked_labels(
        validation.labels, len(validation_images), classes, f"{where}: validation labels"
    )
    counts = np.bincount(train_labels, minlength=len(classes))
    if absent := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        raise DataError(
            f"{where}: no training image of class(es): {', '.join(absent[:10])}{more}",
            "remove the class or add images; labels count from 0 without gaps",
        )
    arrays = (train_images, train_labels, validation_images, validation_labels)
    return Dataset(*arrays, classes, where, _digest(arrays, classes), tuple(skipped))


def checked_images(images: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """uint8 (N, H, W, C) with C of 1 or 3; (N, H, W) gets its channel axis."""
    if images.dtype != np.uint8:
        hint = "store pixels 0 to 255: images.astype('uint8')"
        if np.issubdtype(images.dtype, np.floating):
            hint = "store pixels 0 to 255: (images * 255).round().astype('uint8') when they lie in 0 to 1"
            if not np.isfinite(images).all():
                what = f"{what} hold NaN or infinity, and"
        raise DataError(f"{what} are {images.dtype}, expected uint8", hint)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        hint = "grey is (N, H, W) or (N, H, W, 1), colour is (N, H, W, 3)"
        if images.ndim == 4 and images.shape[1] in (1, 3):
            hint = "move the channels to the end: images.transpose(0, 2, 3, 1)"
        raise DataError(f"{what} have shape {images.shape}, expected (N, height, width, 1 or 3)", hint)
    if 0 in images.shape:
        raise DataError(f"{what} are empty: shape {images.shape}")
    return images if images.flags.c_contiguous else np.ascontiguousarray(images)


def checked_labels(
    labels: NDArray[Any], count: int, classes: tuple[str, ...], what: str
) -> NDArray[np.int64]:
    """int64 (N,) within the classes; (N, 1) is flattened."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        hint = "one-hot rows: labels.argmax(1)" if labels.ndim == 2 else "one class index for each image"
        raise DataError(f"{what} have shape {labels.shape}, expected ({count},)", hint)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{what} are {labels.dtype}, expected integers",
            "class indices from 0, and the names under 'classes'",
        )
    if len(labels) != count:
        raise DataError(f"{what}: {len(labels)} labels for {count} images")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise DataError(
            f"{what}: label {int(labels[wrong[0]])} at position {int(wrong[0])} is outside "
            f"0 to {len(classes) - 1} ({len(wrong)} such labels)"
        )
    return labels.astype(np.int64)


def _digest(arrays: Sequence[NDArray[Any]], classes: tuple[str, ...]) -> str:
    """SHA-256 over shapes, bytes and class names."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update("\0".join(classes).encode())
    return digest.hexdigest()


def stratified_split(
    labels: NDArray[np.int64], fraction: float, seed: int, classes: Sequence[str], where: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted indices of the larger and of the held-out part.

    Of each class, the share `fraction` is held out, at least one image and never all.

    Raises:
        DataError: a class has one image only.
    """
    rng = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 2:
            raise DataError(
                f"{where}: one image only of class '{classes[label]}'; a split needs two",
                "add images or a validation part",
            )
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        held_out.append(rng.permutation(rows)[:count])
    validation = np.sort(np.concatenate(held_out)) if held_out else np.zeros(0, np.int64)
    return np.setdiff1d(np.arange(len(labels)), validation), validation
