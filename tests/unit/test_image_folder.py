"""Image folders: decoded upright to one size and colour; damaged images and odd folders are refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loading import load, pixels, refused
from PIL import Image

from edgekd.errors import MissingExtraError
from edgekd.recipe import DataRecipe
from edgekd.sources import decode, load_dataset, summary


def _image(path: Path, size: tuple[int, int] = (6, 4), color: Any = (200, 30, 30), **options: Any) -> Path:
    """Write an image of one colour; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(color, int) else "RGB", size, color).save(path, **options)
    return path


def _folder(
    root: Path, parts: tuple[str, ...] = ("train", "val"), classes: tuple[str, ...] = ("cat", "dog")
) -> Path:
    for part in parts:
        for index, name in enumerate(classes):
            for number in range(4):
                _image(root / part / name / f"{number}.png", color=(50 * index + number, 0, 0))
    return root


@pytest.mark.parametrize("validation", ["val", "validation", "valid", "test"])
def test_folder_with_parts(tmp_path: Path, validation: str) -> None:
    data = load(_folder(tmp_path, ("train", validation)))
    assert data.shape == (4, 6, 3)
    assert data.classes == ("cat", "dog")
    assert (len(data.train_labels), len(data.validation_labels)) == (8, 8)
    np.testing.assert_array_equal(data.train_images[:, 0, 0, 0], [0, 1, 2, 3, 50, 51, 52, 53])
    np.testing.assert_array_equal(data.train_labels, [0] * 4 + [1] * 4)
    assert data.skipped == ()


@pytest.mark.parametrize("parts", [("",), ("train",)])
def test_folder_without_validation_is_split_by_the_seed(tmp_path: Path, parts: tuple[str, ...]) -> None:
    root = _folder(tmp_path, parts)
    data = load(root, validation_fraction=0.25)
    assert np.bincount(data.train_labels).tolist() == [3, 3]
    assert np.bincount(data.validation_labels).tolist() == [1, 1]
    assert data.sha256 == load(root, validation_fraction=0.25).sha256
    seeds = {load(root, seed=seed, validation_fraction=0.25).sha256 for seed in range(6)}
    assert len(seeds) > 1


def test_folder_sizes_must_agree_unless_a_size_is_asked_for(tmp_path: Path) -> None:
    _image(_folder(tmp_path) / "val" / "dog" / "large.png", size=(8, 8))
    error = refused(tmp_path, "different sizes", "8x8", "large.png")
    assert "data.image_size" in error.hint
    assert load(tmp_path, image_size=(5, 7)).shape == (5, 7, 3)
    assert load_dataset(DataRecipe(source=str(tmp_path), image_size=9), seed=0).shape == (9, 9, 3)


@pytest.mark.parametrize("color", ["grey", "rgb"])
def test_folder_colour_on_request(tmp_path: Path, color: str) -> None:
    for name in ("a", "b"):
        for number in range(2):
            _image(tmp_path / name / f"{number}.jpg", color=(100, 100, 100), size=(32, 32))
    data = load(tmp_path, color=color, image_size=(8, 8))
    assert data.shape == (8, 8, 1 if color == "grey" else 3)
    assert (abs(data.train_images.astype(int) - 100) <= 1).all()


def test_folder_colour_as_stored_is_grey_only_when_all_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(2):
            _image(tmp_path / name / f"{number}.png", color=7)
    assert load(tmp_path).shape == (4, 6, 1)
    _image(tmp_path / "a" / "colour.png")
    assert load(tmp_path).shape == (4, 6, 3)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view: the left half comes to the top
    for name in ("a", "b"):
        for number in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.jpg", exif=exif, quality=95)
    data = load(tmp_path)
    assert data.shape == (32, 16, 3)
    assert data.train_images[0, :14].min() > 240
    assert data.train_images[0, 18:].max() < 15


def test_palette_and_transparent_images_are_read(tmp_path: Path) -> None:
    root = _folder(tmp_path, ("",))
    picture = Image.new("P", (6, 4), 0)
    picture.putpalette([9, 9, 9, 0, 0, 0])
    picture.save(root / "cat" / "palette.png", transparency=b"\x00\xff")
    Image.new("RGBA", (6, 4), (1, 2, 3, 0)).save(root / "cat" / "clear.png")
    Image.new("CMYK", (6, 4)).save(root / "cat" / "print.jpg")
    assert len(load(root).train_labels) + len(load(root).validation_labels) == 11


def test_hidden_and_other_files_are_not_looked_at(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "train" / ".cache").mkdir()
    (root / "train" / "notes.txt").write_text("x")
    (root / "train" / "cat" / "notes.txt").write_text("x")
    (root / "train" / "cat" / "._0.png").write_bytes(b"x")
    (root / "train" / "cat" / "folder.png").mkdir()
    (root / "train" / "cat" / "__MACOSX").mkdir()
    (root / "train" / "cat" / "__MACOSX" / "0.png").write_bytes(b"x")
    _image(root / "train" / "cat" / "deeper" / "UPPER.PNG")
    data = load(root)
    assert data.classes == ("cat", "dog")
    assert len(data.train_labels) == 9


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _truncated(path: Path) -> Path:
    noise = Image.fromarray(pixels(64, 64, 3))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG")
    return _write(path, buffer.getvalue()[: len(buffer.getvalue()) // 2])


def _deep(path: Path) -> Path:
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(path)
    return path


BAD_IMAGES: dict[str, tuple[str, Any, str]] = {
    "text": ("bad.png", lambda p: _write(p, b"this is text"), "not an image"),
    "empty": ("bad.jpg", lambda p: _write(p, b""), "not an image"),
    "truncated JPEG": ("bad.jpg", _truncated, "truncated"),
    "truncated PNG": ("bad.png", _truncated, "truncated"),
    "16 bit": ("bad.png", _deep, "more than 8 bits"),
    "dangling link": ("bad.png", lambda p: p.symlink_to("/nowhere/at/all.png") or p, "No such file"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.parametrize("image_size", [None, (4, 6)])
def test_an_unreadable_image_stops_or_is_skipped_and_listed(
    case: str, image_size: tuple[int, int] | None, tmp_path: Path
) -> None:
    name, write, expected = BAD_IMAGES[case]
    root = _folder(tmp_path)
    bad = write(root / "train" / "cat" / name)
    color = "rgb" if image_size else None
    if case.startswith("truncated") and image_size is None:  # the header is fine, so the size must agree
        for path in root.rglob("?.png"):
            _image(path, size=(64, 64))
    error = refused(root, str(bad), expected, image_size=image_size, color=color)
    assert "skip_bad" in error.hint
    data = load(root, skip_bad=True, image_size=image_size, color=color)
    assert len(data.train_labels) == len(data.train_images) == 8
    assert len(data.skipped) == 1
    assert str(bad) in data.skipped[0]
    assert summary(data)["skipped"] == list(data.skipped)


def test_a_class_whose_images_are_all_bad_is_refused(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    for path in (root / "train" / "dog").iterdir():
        path.write_bytes(b"x")
    refused(root, "no training image of class(es): dog", skip_bad=True)


def test_only_bad_images_are_refused(tmp_path: Path) -> None:
    for path in _folder(tmp_path).rglob("*.png"):
        path.write_bytes(b"x")
    refused(tmp_path, "no readable image", skip_bad=True)
    refused(tmp_path, "empty", skip_bad=True, image_size=(4, 6), color="rgb")


def test_an_image_of_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _folder(tmp_path)
    bomb = _image(root / "train" / "cat" / "bomb.png", size=(90, 70))
    for limit in (5000, 1000):  # a warning of Pillow above the limit, an error above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused(root, str(bomb), "pixels")


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "no class folder", "data.unlabeled")
    refused(_folder(tmp_path / "one", ("",), ("cat",)), "one class only: cat")
    refused(_folder(tmp_path / "one-in-part", ("train", "val"), ("cat",)), "one class only: cat")
    hollow = _folder(tmp_path / "hollow")
    (hollow / "train" / "eel").mkdir()
    refused(hollow, "eel: no image")
    refused(
        _folder(tmp_path / "single", ("",)) and _single(tmp_path / "single"), "one image only of class 'eel'"
    )


def _single(root: Path) -> Path:
    _image(root / "eel" / "0.png")
    return root


@pytest.mark.parametrize("part", ["train", "val"])
def test_parts_with_different_classes_are_refused(tmp_path: Path, part: str) -> None:
    root = _folder(tmp_path)
    _image(root / part / "eel" / "0.png")
    refused(root, "class folders differ", f"only in {root / part}: eel")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load(_folder(tmp_path, ("",), ("bus", "train"))).classes == ("bus", "train")


def test_progress_counts_every_image(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(_folder(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 16) for n in range(1, 17)]


def test_large_arrays_go_to_a_memory_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = _folder(tmp_path / "images"), tmp_path / "cache"
    in_memory = load(root, cache=cache)
    assert not isinstance(in_memory.train_images, np.memmap)
    assert not cache.exists()
    monkeypatch.setattr(decode, "MEMORY_LIMIT_BYTES", 100)
    assert not isinstance(load(root).train_images, np.memmap)
    mapped = load(root, cache=cache)
    assert isinstance(mapped.train_images, np.memmap)
    assert mapped.sha256 == in_memory.sha256
    again = load(root, cache=cache)  # the first map stays valid
    mapped.train_images[:] = 0
    assert again.sha256 == in_memory.sha256
    assert again.train_images.any()
    assert sorted(path.name for path in cache.iterdir()) == ["part0.u8", "part1.u8"]


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError) as caught:
        load(_folder_without_pillow(tmp_path))
    assert "edgekd[train]" in caught.value.hint


def _folder_without_pillow(root: Path) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir()
        for number in range(2):
            (root / name / f"{number}.png").write_bytes(b"x")
    return root
