"""Images without labels: a folder of images at any depth, or the images of a ``.npz`` file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import DataError
from edgekd.sources import arrays, demo
from edgekd.sources.dataset import Request, checked_images
from edgekd.sources.decode import Sample, adapt_array, decode_parts
from edgekd.sources.image_folder import HIDDEN, SUFFIXES

KEYS = ("images", "unlabeled_images", "x", "X", "train_images", "x_train", "Xt")


@dataclass(frozen=True)
class Corpus:
    """Images without labels: uint8 (N, H, W, C), a name for each, and what was left out on request."""

    images: NDArray[np.uint8]
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def load_unlabeled(source: str, request: Request, key: str = "data.unlabeled") -> Corpus:
    """Every image of a folder (class folders in it mean nothing), or one array of a ``.npz`` file, whose
    labels are not looked at; ``demo`` is the training part of the demonstration.

    Args:
        source: the path; `key` is what it is called in messages.

    Raises:
        DataError: the source does not exist, holds no images, or an image cannot be used.
    """
    if source == "demo":
        images = demo.load(request).train_images
        return Corpus(images, tuple(f"demo[{row}]" for row in range(len(images))))
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, request, key)
    if arrays.accepts(path):
        return _archive(path, request, key)
    problem = "is a file that no source reads" if path.exists() else "does not exist"
    raise DataError(f"{key} '{source}' {problem}", "give a folder of images or a .npz file")


def _folder(path: Path, request: Request, key: str) -> Corpus:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith(HIDDEN) for part in file.relative_to(path).parts)
        and not file.is_dir()
    )
    if not files:
        raise DataError(
            f"{key} '{path}' holds no image (looked for {', '.join(SUFFIXES)})",
            "give a folder with images in it, at any depth",
        )
    samples = [Sample(str(file), file, row) for row, file in enumerate(files)]
    (part,), skipped = decode_parts([samples], request)
    if not len(part.images):
        raise DataError(f"{key} '{path}' holds no readable image", "check the files")
    # The labels of these samples are their own rows, so that names follow where some were skipped.
    return Corpus(part.images, tuple(str(files[row]) for row in part.labels), tuple(skipped))


def _archive(path: Path, request: Request, key: str) -> Corpus:
    held = arrays.read_archive(path)
    name = next((name for name in KEYS if name in held), None)
    if name is None:
        raise DataError(
            f"{key} '{path}' holds no images; it holds: {', '.join(held) or 'nothing'}",
            f"names that are understood: {', '.join(KEYS)}",
        )
    images = adapt_array(checked_images(held[name], f"{path}: {name}"), request)
    return Corpus(images, tuple(f"{path.name}:{name}[{row}]" for row in range(len(images))))


def without_copies(images: NDArray[np.uint8], of: Iterable[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """Rows of `images` whose pixels are not exactly those of an image in one of the arrays `of`."""
    held_out = {_digest(image) for part in of for image in part}
    return np.array([row for row, image in enumerate(images) if _digest(image) not in held_out], np.int64)


def _digest(image: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()
