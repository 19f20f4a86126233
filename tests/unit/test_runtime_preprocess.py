"""The runtime's preprocessing is Pillow's, without Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgekd.runtime import Pixels, _preprocess, as_images, cpu_flags, resize, to_color

MANIFEST = {
    "resize": [4, 6],
    "mode": "bilinear",
    "color": "rgb",
    "scale": [0.5] * 3,
    "mean": [1, 2, 3],
    "std": [2] * 3,
}


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def pillow(image: Pixels) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((28, 28), (28, 28)),
        ((28, 28), (32, 32)),
        ((64, 64), (32, 32)),
        ((100, 57), (28, 28)),
        ((57, 100), (64, 33)),
        ((5, 7), (64, 33)),
        ((1, 1), (9, 9)),
        ((31, 1), (10, 10)),
        ((480, 640), (224, 224)),
        ((224, 224), (223, 225)),
        ((2000, 900), (3, 5)),
    ],
)
def test_resize_is_within_one_step_of_pillow(
    source: tuple[int, int], size: tuple[int, int], channels: int
) -> None:
    image = noise(*source, channels)
    expected = np.asarray(pillow(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    found = resize(image, *size)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.reshape(found.shape)).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(28, 13), (28, 50), (9, 28), (40, 28)])
def test_resize_along_one_axis_is_exactly_pillow(height: int, width: int) -> None:
    image = noise(28, 28, 3)
    expected = np.asarray(pillow(image).resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize(image, height, width), expected)


@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_resize_keeps_a_flat_image_flat(value: int) -> None:
    flat: NDArray[np.uint8] = np.full((17, 23, 3), value, np.uint8)
    assert (resize(flat, 5, 61) == value).all()


def test_grey_of_rgb_is_exactly_pillow() -> None:
    image = noise(64, 64, 3)
    np.testing.assert_array_equal(to_color(image, "grey")[..., 0], np.asarray(pillow(image).convert("L")))


def test_rgb_of_grey_repeats_the_channel() -> None:
    image = noise(5, 4, 1)
    np.testing.assert_array_equal(to_color(image, "rgb"), np.asarray(pillow(image).convert("RGB")))


def test_numbers_are_scaled_then_shifted_then_divided() -> None:
    image = np.full((4, 6, 3), (10, 20, 30), np.uint8)
    found = _preprocess(MANIFEST)([image])
    assert found.dtype == np.float32 and found.shape == (1, 3, 4, 6) and found.flags.c_contiguous
    assert found[0, :, 0, 0].tolist() == [2.0, 4.0, 6.0]  # (10 * 0.5 - 1) / 2 and so on


def test_resize_comes_before_colour() -> None:
    image = noise(40, 40, 3)
    rules = MANIFEST | {"color": "grey", "scale": [1], "mean": [0], "std": [1]}
    expected = to_color(resize(image, 4, 6), "grey").astype(np.float32)
    np.testing.assert_array_equal(_preprocess(rules)([image])[0, 0], expected[..., 0])


@pytest.mark.parametrize(
    ("shape", "views"),
    [
        ((8, 9), [(8, 9, 1)]),
        ((8, 9, 1), [(8, 9, 1)]),
        ((8, 9, 3), [(8, 9, 3)]),
        ((5, 8, 9), [(8, 9, 1)] * 5),
        ((5, 8, 9, 1), [(8, 9, 1)] * 5),
        ((5, 8, 9, 3), [(8, 9, 3)] * 5),
        ((0, 8, 9), []),
    ],
)
def test_an_array_is_read_by_its_shape(shape: tuple[int, ...], views: list[tuple[int, ...]]) -> None:
    assert [view.shape for view in as_images(noise(*shape))] == views


def test_a_list_may_mix_sizes_and_colours() -> None:
    views = as_images([noise(8, 9), noise(3, 4, 3), noise(2, 3, 1)])
    assert [view.shape for view in views] == [(8, 9, 1), (3, 4, 3), (2, 3, 1)]


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        ("photo.png", TypeError, "got str; read files with"),
        (["photo.png"], TypeError, "got str"),
        (np.zeros((8, 8), np.float32), TypeError, "got float32.*model"),
        (np.zeros((8, 8), np.int64), TypeError, "got int64"),
        ([noise(5, 8, 9)], ValueError, r"got \(5, 8, 9\)"),
        (noise(5), ValueError, r"got \(5,\)"),
        (noise(5, 8, 9, 4), ValueError, r"got \(8, 9, 4\)"),
        (noise(2, 5, 8, 9, 3), ValueError, r"got \(5, 8, 9, 3\)"),
        (noise(0, 9), ValueError, r"got \(0, 9\)"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_other_input_is_refused_with_what_was_got(images: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        as_images(images)


def test_cpu_flags_are_those_that_all_cores_have() -> None:
    x86 = "processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\nprocessor\t: 1\nflags\t\t: fpu avx2\n"
    assert cpu_flags(x86) == {"fpu", "avx2"}
    assert cpu_flags("Features\t: fp asimd asimddp\n") == {"fp", "asimd", "asimddp"}
    assert cpu_flags("") == set()
