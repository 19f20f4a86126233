"""Hugging Face data sets written by ``save_to_disk``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loading import load, refused
from PIL import Image

from edgekd.errors import MissingExtraError

pytestmark = pytest.mark.slow  # starts the datasets library


def test_missing_datasets_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError) as caught:
        load(tmp_path)
    assert "edgekd[datasets]" in caught.value.hint


def _stored(
    path: Path, splits: tuple[str, ...], names: tuple[str, str] = ("image", "label"), **options: Any
) -> Path:
    datasets = pytest.importorskip("datasets")
    image, label = names
    features = {
        image: datasets.Image(),
        label: options.get("label", datasets.ClassLabel(names=["cat", "dog"])),
    }
    features |= options.get("more", {})
    tables = {}
    for split in splits:
        rows: dict[str, list[Any]] = {name: [] for name in features}
        for index in range(8):
            rows[image].append(Image.new("RGB", (6, 4), (index, 0, 0)))
            for name in set(features) - {image}:
                rows[name].append(options.get("values", [0, 1])[index % 2])
        tables[split] = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    stored = tables["single"] if splits == ("single",) else datasets.DatasetDict(tables)
    stored.save_to_disk(str(path))
    return path


@pytest.mark.parametrize("validation", ["validation", "test"])
def test_stored_data_set(tmp_path: Path, validation: str) -> None:
    data = load(_stored(tmp_path / "d", ("train", validation)))
    assert data.classes == ("cat", "dog")
    assert data.shape == (4, 6, 3)
    np.testing.assert_array_equal(data.train_images[:, 0, 0, 0], np.arange(8))
    np.testing.assert_array_equal(data.validation_labels, [0, 1] * 4)


@pytest.mark.parametrize("splits", [("train",), ("single",), ("all",)])
def test_stored_data_set_without_validation_is_split(tmp_path: Path, splits: tuple[str, ...]) -> None:
    data = load(_stored(tmp_path / "d", splits), validation_fraction=0.25)
    assert (len(data.train_labels), len(data.validation_labels)) == (6, 2)


def test_stored_data_set_with_other_names_and_plain_integers(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = _stored(tmp_path / "d", ("train",), ("img", "labels"), label=datasets.Value("int64"))
    assert load(path).classes == ("0", "1")


def test_stored_data_sets_that_cannot_be_used(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    coarse = {"first": datasets.ClassLabel(names=["x", "y"]), "second": datasets.ClassLabel(names=["x", "y"])}
    refused(_stored(tmp_path / "a", ("left", "right")), "no split 'train'", "left, right")
    two = _stored(tmp_path / "b", ("train",), ("image", "third"), more=coarse)
    refused(two, "several label column(s)", "first (ClassLabel)")
    text = _stored(tmp_path / "c", ("train",), label=datasets.Value("string"), values=["x", "y"])
    refused(text, "no label column(s)")
    empty = _stored(tmp_path / "d", ("train",), label=datasets.Value("int64"), values=[0, None])
    refused(empty, "holds no label")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "dataset_dict.json").write_text("{")
    refused(tmp_path / "e", str(tmp_path / "e"))
