"""A folder of images: ``train/`` and ``val/`` with one folder a class, or class folders alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.errors import DataError
from edgekd.sources.dataset import WITHOUT_LABELS, Dataset, Request, check_dataset, stratified_split
from edgekd.sources.decode import Sample, decode_parts

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
HIDDEN = (".", "__MACOSX")
VALIDATION_NAMES = ("val", "validation", "valid", "test")


def accepts(path: Path) -> bool:
    """Whether this is a folder."""
    return path.is_dir()


def load(path: Path, request: Request) -> Dataset:
    """Read a folder of images. Hidden files and files without an image's suffix are not looked at.

    Raises:
        DataError: no class folder, one class only, a class without images, different classes in the two
            parts, or an unreadable image.
    """
    where = f"image folder {path}"
    train_folder = path / "train"
    if train_folder.is_dir() and _folders(train_folder):
        classes, train = _samples(train_folder)
        folder = next((path / name for name in VALIDATION_NAMES if (path / name).is_dir()), None)
        if folder is not None:
            held_out_classes, held_out = _samples(folder)
            _same_classes(classes, held_out_classes, train_folder, folder)
            return _build([train, held_out], classes, where, request)
    else:
        classes, train = _samples(path)
    labels = np.array([sample.label for sample in train], np.int64)
    split = stratified_split(labels, request.recipe.validation_fraction, request.seed, classes, where)
    return _build([[train[row] for row in rows] for rows in split], classes, where, request)


def _build(parts: list[list[Sample]], classes: tuple[str, ...], where: str, request: Request) -> Dataset:
    (train, validation), skipped = decode_parts(parts, request)
    return check_dataset(train, validation, classes, where, skipped)


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(
            entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(HIDDEN)
        )
    except OSError as error:
        raise DataError(
            f"cannot read folder {path}: {error.strerror or error}", "check its permissions"
        ) from error


def _samples(folder: Path) -> tuple[tuple[str, ...], list[Sample]]:
    """Class names and samples of a folder of class folders, sorted by name."""
    folders = _folders(folder)
    if len(folders) < 2:
        found = f"one class only: {folders[0].name}" if folders else "no class folder"
        raise DataError(
            f"{folder}: {found}",
            f"put the images of each class into a folder named after the class; {WITHOUT_LABELS}",
        )
    samples: list[Sample] = []
    for label, class_folder in enumerate(folders):
        files = sorted(
            file
            for file in class_folder.rglob("*")
            if file.suffix.lower() in SUFFIXES
            and not any(part.startswith(HIDDEN) for part in file.relative_to(class_folder).parts)
            and not file.is_dir()
        )
        if not files:
            raise DataError(
                f"{class_folder}: no image (looked for {', '.join(SUFFIXES)})",
                "remove the folder or add images",
            )
        samples += [Sample(str(file), file, label) for file in files]
    return tuple(class_folder.name for class_folder in folders), samples


def _same_classes(train: tuple[str, ...], held_out: tuple[str, ...], *folders: Path) -> None:
    differences = [
        f"only in {folder}: {', '.join(sorted(mine - other))}"
        for folder, mine, other in zip(
            folders, (set(train), set(held_out)), (set(held_out), set(train)), strict=True
        )
        if mine - other
    ]
    if differences:
        raise DataError(
            f"the class folders differ; {'; '.join(differences)}", "both parts need the same classes"
        )
