"""Sources: good data arrive unchanged, bad data are refused with the file and the reason."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loading import load, pixels, refused

from edgekd.files import sha256_file
from edgekd.sources import summary
from edgekd.sources.demo import demo_card, demo_folder

# ---------------------------------------------------------------- demo


def test_demo_has_the_counts_of_its_card() -> None:
    data, card = load("demo"), demo_card()
    assert (len(data.train_labels), len(data.validation_labels)) == (12000, 3000)
    assert card["counts"] == {"train": 12000, "validation": 3000}
    assert data.shape == (28, 28, 1)
    assert data.classes[0] == "T-shirt/top"
    assert data.classes[-1] == "Ankle boot"
    pixels = data.train_images / 255
    assert pixels.mean() == pytest.approx(card["preprocessing"]["mean"][0], abs=2e-3)
    assert pixels.std() == pytest.approx(card["preprocessing"]["std"][0], abs=2e-3)


def test_demo_files_are_those_of_the_card() -> None:
    for name, digest in demo_card()["sha256"].items():
        assert sha256_file(demo_folder() / name) == digest


def test_an_altered_demo_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "card.toml").write_text((demo_folder() / "card.toml").read_text())
    np.savez(tmp_path / "images.npz", Xt=pixels(4, 2, 2))
    monkeypatch.setattr("edgekd.sources.demo.demo_folder", lambda: tmp_path)
    refused("demo", "not the file its card describes", "reinstall")


def test_reading_the_demo_loads_neither_torch_nor_pillow() -> None:
    code = (
        "import sys; from edgekd.recipe import DataRecipe; from edgekd.sources import load_dataset; "
        "load_dataset(DataRecipe(), seed=0); print({'torch', 'PIL', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# ---------------------------------------------------------------- .npz


def _npz(path: Path, **arrays: Any) -> Path:
    np.savez(path / "data.npz", **arrays)
    return path / "data.npz"


@pytest.mark.parametrize(
    "keys",
    [
        ("train_images", "train_labels", "val_images", "val_labels"),
        ("x_train", "y_train", "x_test", "y_test"),
        ("Xt", "Yt", "Xe", "Ye"),
    ],
)
def test_npz_key_names(tmp_path: Path, keys: tuple[str, ...]) -> None:
    images = (pixels(6, 5, 4, 3), pixels(4, 5, 4, 3))
    labels = (np.array([0, 1] * 3), np.array([[1], [0], [1], [0]]))  # (N, 1), as CIFAR stores them
    path = _npz(tmp_path, **dict(zip(keys, (images[0], labels[0], images[1], labels[1]), strict=True)))
    data = load(path)
    np.testing.assert_array_equal(data.train_images, images[0])
    np.testing.assert_array_equal(data.validation_labels, [1, 0, 1, 0])
    assert data.train_labels.dtype == np.int64
    assert data.classes == ("0", "1")
    assert str(path) in data.description


def test_npz_grey_images_get_a_channel_and_classes_their_names(tmp_path: Path) -> None:
    data = load(
        _npz(
            tmp_path,
            x_train=pixels(8, 5, 5),
            y_train=np.arange(8, dtype=np.uint8) % 2,
            classes=np.array(["cat", "dog"]),
        )
    )
    assert data.shape == (5, 5, 1)
    assert data.classes == ("cat", "dog")
    assert summary(data)["shape"] == [5, 5, 1]


def test_npz_split_is_stratified_disjoint_and_seeded(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 2])
    images = np.arange(82, dtype=np.uint8)[:, None, None]
    path = _npz(tmp_path, Xt=images, Yt=labels)
    data = load(path, validation_fraction=0.2)
    assert np.bincount(data.validation_labels).tolist() == [10, 6, 1]
    together = np.concatenate([data.train_images, data.validation_images]).ravel()
    np.testing.assert_array_equal(np.sort(together), np.arange(82))
    np.testing.assert_array_equal(labels[data.train_images.ravel()], data.train_labels)
    assert load(path, validation_fraction=0.2).sha256 == data.sha256
    assert load(path, validation_fraction=0.2, seed=1).sha256 != data.sha256


def test_npz_colour_and_size_are_converted_on_request(tmp_path: Path) -> None:
    grey, labels = np.full((4, 6, 6), 90, np.uint8), np.array([0, 1, 0, 1])
    path = _npz(tmp_path, Xt=grey, Yt=labels, Xe=grey, Ye=labels)
    data = load(path, image_size=(3, 4), color="rgb")
    assert data.shape == (3, 4, 3)
    assert (data.train_images == 90).all()
    colour = np.zeros((4, 6, 6, 3), np.uint8)
    colour[..., 0] = 255
    path = _npz(tmp_path, Xt=colour, Yt=labels, Xe=colour, Ye=labels)
    data = load(path, color="grey")
    assert data.shape == (6, 6, 1)
    assert (data.train_images == 76).all()  # 255 * 0.299, ITU-R 601


GOOD = {"Xt": pixels(6, 4, 4), "Yt": np.array([0, 1] * 3), "Xe": pixels(2, 4, 4), "Ye": np.array([0, 1])}
FLOATS = np.full((6, 4, 4), 0.5)
BAD_ARRAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "floats": ({"Xt": FLOATS}, ("float64, expected uint8", "(images * 255)")),
    "NaN": ({"Xt": FLOATS * np.nan}, ("NaN", "expected uint8")),
    "int64 pixels": ({"Xt": np.zeros((6, 4, 4), int)}, ("int64, expected uint8",)),
    "channels first": ({"Xt": pixels(6, 3, 4, 4)}, ("(6, 3, 4, 4)", "transpose(0, 2, 3, 1)")),
    "four channels": ({"Xt": pixels(6, 4, 4, 4)}, ("(6, 4, 4, 4)", "colour is (N, H, W, 3)")),
    "flat images": ({"Xt": pixels(6, 16)}, ("(6, 16)",)),
    "scalar images": ({"Xt": np.uint8(3)}, ("shape ()",)),
    "no images": ({"Xt": pixels(0, 4, 4), "Yt": np.zeros(0, int)}, ("empty",)),
    "other shape in validation": ({"Xe": pixels(2, 5, 4)}, ("(4, 4, 1)", "(5, 4, 1)")),
    "label count": ({"Yt": np.array([0, 1])}, ("2 labels for 6 images",)),
    "one-hot labels": ({"Yt": np.eye(6, dtype=int)}, ("(6, 6)", "argmax(1)")),
    "float labels": ({"Yt": np.array([0.0, 1.0] * 3)}, ("float64, expected integers",)),
    "text labels": ({"Yt": np.array(["a", "b"] * 3)}, ("expected integers", "'classes'")),
    "negative label": ({"Yt": np.array([0, 1, -1, 0, 1, 0])}, ("label -1 at position 2", "outside 0 to 1")),
    "label above the names": (
        {"classes": np.array(["a", "b"]), "Ye": np.array([0, 2])},
        ("label 2", "0 to 1"),
    ),
    "huge label": ({"Yt": np.array([0, 1, 2**60, 0, 1, 0])}, ("outside 0 to 1048576",)),
    "one class": ({"Yt": np.zeros(6, int), "Ye": np.zeros(2, int)}, ("at least two",)),
    "a class without images": (
        {"classes": np.array(["a", "b", "c"])},
        ("no training image of class(es): c",),
    ),
    "many classes without images": ({"Yt": np.array([0, 99] * 3)}, ("1, 2, 3", "and 88 more")),
    "same class name twice": ({"classes": np.array(["a", "a"])}, ("must be different",)),
    "numbers as class names": ({"classes": np.array([1, 2])}, ("'classes' is int64",)),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(case: str, tmp_path: Path) -> None:
    changes, expected = BAD_ARRAYS[case]
    refused(_npz(tmp_path, **(GOOD | changes)), "data.npz", *expected)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"pictures": GOOD["Xt"]}, ("no training images; it holds: pictures", "x_train")),
        ({}, ("it holds: nothing",)),
        ({"Xt": GOOD["Xt"]}, ("missing array(s): Yt", "edgekd label")),
        ({"Xt": GOOD["Xt"], "Yt": GOOD["Yt"], "Xe": GOOD["Xe"]}, ("missing array(s): Ye",)),
        ({"Xt": GOOD["Xt"], "Yt": GOOD["Yt"], "Ye": GOOD["Ye"]}, ("missing array(s): Xe",)),
        ({"Xt": GOOD["Xt"], "Yt": np.array([0, 0, 0, 0, 0, 1])}, ("one image only of class '1'",)),
    ],
)
def test_missing_arrays_are_refused(
    arrays: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    refused(_npz(tmp_path, **arrays), *expected)


class _Harmful:
    """An object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = _npz(tmp_path, Xt=np.array([_Harmful(witness)], dtype=object), Yt=np.array([0]))
    refused(path, "'Xt'", "pickled objects", "are not read")
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"not a zip file at all", b"PK\x03\x04" + bytes(40)])
def test_damaged_archives_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    refused(path, "data.npz")


def test_a_truncated_array_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, GOOD["Xt"])
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Xt.npy", buffer.getvalue()[:-5])
    refused(path, "array 'Xt'", "data.npz")


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, GOOD["Xt"])
    refused(tmp_path / "data.npz", "single array", "savez")


def test_the_digest_covers_pixels_labels_shapes_and_names(tmp_path: Path) -> None:
    digests = {
        load(_npz(tmp_path, **(GOOD | changes))).sha256
        for changes in (
            {},
            {"Xt": GOOD["Xt"] ^ 1},
            {"Yt": 1 - GOOD["Yt"]},
            {"Xe": GOOD["Xe"] ^ 1},
            {"Xt": GOOD["Xt"].reshape(6, 2, 8), "Xe": GOOD["Xe"].reshape(2, 2, 8)},
            {"classes": np.array(["a", "b"])},
        )
    }
    assert len(digests) == 6


# ---------------------------------------------------------------- the source itself


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "does not exist", "'demo'")


def test_an_unknown_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "no source reads", ".npz")


def test_an_unknown_colour_is_refused() -> None:
    refused("demo", "'gray'", color="gray")
