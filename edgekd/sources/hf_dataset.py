"""A Hugging Face data set that was written with ``save_to_disk``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import DataError, missing_extra
from edgekd.sources.dataset import Dataset, Request, check_dataset, stratified_split
from edgekd.sources.decode import Sample, decode_parts

VALIDATION_NAMES = ("validation", "val", "valid", "test")
IMAGE_NAMES = ("image", "img", "images")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")


def accepts(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def load(path: Path, request: Request) -> Dataset:
    """Read a stored data set; the image and the label column are found by their feature types.

    Raises:
        MissingExtraError: the package `datasets` is not installed.
        DataError: no image or label column, no usable split, or an unreadable image.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "datasets", f"reading {path}") from error
    where = f"data set {path}"
    try:
        stored = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: {error}", "write it again with save_to_disk") from error
    splits = dict(stored) if isinstance(stored, datasets.DatasetDict) else {"train": stored}
    if "train" not in splits and len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    if "train" not in splits:
        raise DataError(f"{where}: no split 'train'; it holds: {', '.join(splits) or 'nothing'}")
    train = splits["train"]
    image, label = _image_column(train, datasets, where), _label_column(train, datasets, where)
    classes = _class_names(train, label, where)
    samples = _samples(train, "train", image, label, datasets)
    name = next((name for name in VALIDATION_NAMES if name in splits), None)
    if name is None:
        labels = np.array([sample.label for sample in samples], np.int64)
        split = stratified_split(labels, request.recipe.validation_fraction, request.seed, classes, where)
        parts = [[samples[row] for row in rows] for rows in split]
    else:
        if missing := {image, label} - set(splits[name].features):
            raise DataError(f"{where}: split '{name}' has no column {', '.join(sorted(missing))}")
        parts = [samples, _samples(splits[name], name, image, label, datasets)]
    (train_part, held_out), skipped = decode_parts(parts, request)
    return check_dataset(train_part, held_out, classes, where, skipped)


def _samples(split: Any, name: str, image: str, label: str, datasets: Any) -> list[Sample]:
    encoded = split.select_columns([image]).cast_column(image, datasets.Image(decode=False))

    def reader(row: int) -> Callable[[], bytes]:
        def read() -> bytes:
            item = encoded[row][image] or {}
            if item.get("bytes") is not None:
                return bytes(item["bytes"])
            if item.get("path") is None:
                raise ValueError("the row holds no image")
            return Path(item["path"]).read_bytes()

        return read

    labels = list(split[label])
    if None in labels:
        raise DataError(f"{name}[{labels.index(None)}]: column '{label}' holds no label")
    return [Sample(f"{name}[{row}]", reader(row), int(value)) for row, value in enumerate(labels)]


def _choose(found: list[str], preferred: tuple[str, ...], what: str, split: Any, where: str) -> str:
    """The preferred name among the columns found, or the only one."""
    for name in preferred:
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in split.features.items())
    problem = "several" if found else "no"
    raise DataError(
        f"{where}: {problem} {what} column(s) among: {listed}",
        f"name it '{preferred[0]}' (rename_column) and save it again",
    )


def _image_column(split: Any, datasets: Any, where: str) -> str:
    found = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
    return _choose(found, IMAGE_NAMES, "image", split, where)


def _label_column(split: Any, datasets: Any, where: str) -> str:
    found = [name for name, feature in split.features.items() if isinstance(feature, datasets.ClassLabel)]
    if not found:
        found = [
            name
            for name, feature in split.features.items()
            if name in LABEL_NAMES and "int" in str(getattr(feature, "dtype", ""))
        ]
    return _choose(found, LABEL_NAMES, "label", split, where)


def _class_names(split: Any, label: str, where: str) -> tuple[str, ...]:
    """The names of a ClassLabel, else the numbers from 0 to the largest label."""
    names = getattr(split.features[label], "names", None)
    if names:
        return tuple(names)
    values = [value for value in split[label] if value is not None]
    if not values:
        raise DataError(f"{where}: column '{label}' holds no label")
    return tuple(str(index) for index in range(min(max(values), 2**20) + 1))
