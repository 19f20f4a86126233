"""From encoded images to one uint8 array: decoding, orientation, colour, size. Needs Pillow."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import DataError, StorageError, missing_extra
from edgekd.sources.dataset import Part, Request

if TYPE_CHECKING:
    from PIL.Image import Image

MEMORY_LIMIT_BYTES = 512 * 2**20  # larger arrays go to a memory map when a cache folder is given
_EXIF_ORIENTATION = 0x0112
_MODES = {"grey": "L", "rgb": "RGB"}
_GREY_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# What Pillow's decoders raise on damaged files besides OSError.
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, OverflowError, struct.error,
    zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One encoded image: a file, or a function that returns its bytes."""

    name: str
    content: Path | Callable[[], bytes]
    label: int


_Header = tuple[tuple[int, int], str]  # (height, width), colour


class _BadImageError(Exception):
    """Why one image cannot be used."""


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "train", "decoding images") from error
    return Image


def decode_parts(parts: Sequence[Sequence[Sample]], request: Request) -> tuple[list[Part], list[str]]:
    """Decode every part to the same size and colour.

    Returns:
        One `Part` with uint8 (N, H, W, C) images for each input, and the names of the skipped images.

    Raises:
        DataError: an unreadable image (unless `request.recipe.skip_bad`), or sizes that differ although
            no size was asked for.
        StorageError: the memory map cannot be written.
    """
    pillow = _pillow()
    skipped: list[str] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged metadata does not change pixels
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        if request.image_size is None or request.color is None:
            headers = [_readable(part, request, skipped) for part in parts]
            parts = [list(part) for part in headers]
            size, color = _common_form({s: h for part in headers for s, h in part.items()}, request)
        else:
            size, color = request.image_size, request.color
        total, done = sum(len(part) for part in parts), 0
        decoded = []
        for index, part in enumerate(parts):
            shape = (len(part), *size, 1 if color == "grey" else 3)
            images = _allocate(shape, request.cache, f"part{index}")
            labels: list[int] = []
            for sample in part:
                try:
                    images[len(labels)] = _decode(sample, size, color)
                    labels.append(sample.label)
                except _BadImageError as error:
                    _skip_or_raise(sample, error, request, skipped)
                done += 1
                if request.progress is not None:
                    request.progress(done, total)
            decoded.append(Part(images[: len(labels)], np.array(labels, np.int64)))
    return decoded, skipped


def _skip_or_raise(sample: Sample, error: _BadImageError, request: Request, skipped: list[str]) -> None:
    if not request.recipe.skip_bad:
        raise DataError(
            f"cannot read image {sample.name}: {error}",
            "repair it, or leave it out: --set data.skip_bad=true",
        ) from error
    skipped.append(f"{sample.name}: {error}")


def _open(sample: Sample) -> Image:
    """The image with its header read; pixels are decoded later.

    Raises:
        _BadImageError: not an image, more pixels than Pillow allows, or more than 8 bits a channel.
    """
    pillow = _pillow()
    try:
        content = sample.content if isinstance(sample.content, Path) else io.BytesIO(sample.content())
        image: Image = pillow.open(content)
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise _BadImageError(str(error)) from error
    except _DAMAGE as error:
        raise _BadImageError(_reason(error)) from error
    if image.mode in _DEEP_MODES:
        mode = image.mode
        image.close()
        raise _BadImageError(f"pixels of mode {mode} have more than 8 bits; convert it to 8 bits")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    return "not an image" if "cannot identify image file" in text else text or type(error).__name__


def _header(sample: Sample) -> _Header:
    """((height, width) after orientation, colour) without decoding pixels."""
    with _open(sample) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        except _DAMAGE:
            turned = False
        color = "grey" if image.mode in _GREY_MODES else "rgb"
        return ((width, height) if turned else (height, width)), color


def _readable(part: Sequence[Sample], request: Request, skipped: list[str]) -> dict[Sample, _Header]:
    """The samples whose header can be read, in order, with the header."""
    found: dict[Sample, _Header] = {}
    for sample in part:
        try:
            found[sample] = _header(sample)
        except _BadImageError as error:
            _skip_or_raise(sample, error, request, skipped)
    return found


def _common_form(headers: Mapping[Sample, _Header], request: Request) -> _Header:
    """The (height, width) and colour of all images: as asked, else as stored.

    Raises:
        DataError: no size was asked for and the images have several; or there is no image.
    """
    if not headers:
        raise DataError("there is no readable image", "check the folder, and the skipped files")
    color = request.color or ("grey" if all(found == "grey" for _, found in headers.values()) else "rgb")
    if request.image_size is not None:
        return request.image_size, color
    first, (common, _) = next(iter(headers.items()))
    for sample, (size, _) in headers.items():
        if size != common:
            raise DataError(
                f"images have different sizes: {first.name} is {common[0]}x{common[1]} and "
                f"{sample.name} is {size[0]}x{size[1]} (height x width)",
                "resize them all: --set data.image_size=N",
            )
    return common, color


def _decode(sample: Sample, size: tuple[int, int], color: str) -> NDArray[np.uint8]:
    """uint8 (H, W, C) of one image, upright, resized with Pillow's (antialiased) bilinear filter."""
    pillow = _pillow()
    from PIL import ImageOps

    with _open(sample) as image:
        try:
            image.draft(_MODES[color], (max(size), max(size)))  # a JPEG is decoded at a fraction of its size
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")
            upright = upright.convert(_MODES[color])
            if upright.size != (size[1], size[0]):
                upright = upright.resize((size[1], size[0]), pillow.Resampling.BILINEAR)
            return np.asarray(upright, np.uint8).reshape(*size, -1)
        except _DAMAGE as error:
            raise _BadImageError(_reason(error)) from error


def _allocate(shape: tuple[int, ...], cache: Path | None, name: str) -> NDArray[np.uint8]:
    """An empty uint8 array, in a file under `cache` when it is large."""
    size = int(np.prod(shape, dtype=np.int64))
    if cache is None or size <= MEMORY_LIMIT_BYTES:
        try:
            return np.empty(shape, np.uint8)
        except MemoryError as error:
            raise DataError(
                f"{shape[0]} images of {shape[1]}x{shape[2]} need {size / 2**30:.1f} GiB of memory",
                "choose a smaller size: --set data.image_size=N",
            ) from error
    path = cache / f"{name}.u8"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=cache)
        try:
            os.posix_fallocate(handle, 0, size)  # a full disk is an error here, and would be a signal later
            Path(temporary).replace(path)  # a map of an earlier run keeps its own file
        finally:
            os.close(handle)
            Path(temporary).unlink(missing_ok=True)
        return np.memmap(path, np.uint8, "r+", shape=shape)
    except OSError as error:
        raise StorageError(
            f"cannot write {size / 2**20:.0f} MiB of decoded images to {cache}: {error.strerror or error}",
            "choose a folder with free space: --out FOLDER",
        ) from error


def adapt_array(images: NDArray[np.uint8], request: Request) -> NDArray[np.uint8]:
    """Bring uint8 (N, H, W, C) to the size and colour asked for."""
    channels = images.shape[3]
    if request.color == "rgb" and channels == 1:
        images = np.repeat(images, 3, axis=3)
    size = request.image_size or images.shape[1:3]
    grey = request.color == "grey" and channels == 3
    if not grey and images.shape[1:3] == tuple(size):
        return images
    pillow = _pillow()
    rows = []
    for array in images:
        image = pillow.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        image = image.convert("L") if grey else image
        image = image.resize((size[1], size[0]), pillow.Resampling.BILINEAR)
        rows.append(np.asarray(image, np.uint8).reshape(*size, -1))
    return np.stack(rows)
