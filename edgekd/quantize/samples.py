"""Samples to calibrate and judge a file with, read a few at a time: memory does not grow with their count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import DataError
from edgekd.files import sha256_json
from edgekd.quantize.onnx_file import FloatModel, Port
from edgekd.recipe import DataRecipe
from edgekd.sources.arrays import read_archive
from edgekd.sources.dataset import Request
from edgekd.sources.decode import Sample, decode_parts
from edgekd.sources.image_folder import HIDDEN, SUFFIXES

Feeds = dict[str, NDArray[Any]]
_IMAGES = ("images", "val_images", "x_test", "Xe", "train_images", "x_train", "Xt", "x", "X")
_LABELS = {"val_images": "val_labels", "x_test": "y_test", "Xe": "Ye", "train_images": "train_labels",
           "x_train": "y_train", "Xt": "Yt", "images": "labels", "x": "y", "X": "Y"}  # fmt: skip
_PARTS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Pixels:
    """From uint8 pixels to the network's input: ``(pixel * scale - mean) / std``; `size` 0 is as stored."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    size: int = 0
    scale: float = 1 / 255


@dataclass(frozen=True)
class Samples:
    """`read(rows)` gives the inputs of these samples by name, `labels` int64 (N,) or None. With `whole_calls`
    each sample is one call of the network as it stands, and calls cannot be joined."""

    count: int
    read: Callable[[NDArray[np.int64]], Feeds]
    labels: NDArray[np.int64] | None
    source: str
    whole_calls: bool = False

    def batches(self, rows: NDArray[np.int64], size: int) -> Iterator[Feeds]:
        """The inputs of these rows, `size` at a time; with whole calls one at a time."""
        step = 1 if self.whole_calls else size
        for start in range(0, len(rows), step):
            yield self.read(rows[start : start + step])


def digest(samples: Samples, rows: NDArray[np.int64], size: int) -> str:
    """SHA-256 of these samples as the network reads them: pixels and preprocessing together."""
    parts: dict[str, Any] = {}
    for feeds in samples.batches(rows, size):
        for name, values in feeds.items():
            if name not in parts:
                parts[name] = hashlib.sha256(f"{name}{values.dtype}{values.shape[1:]}".encode())
            parts[name].update(np.ascontiguousarray(values).data)
    return sha256_json({name: part.hexdigest() for name, part in parts.items()})


def load_samples(data: str, model: FloatModel, pixels: Pixels) -> Samples:
    """Samples of a folder of images, a ``.npz`` file of images or of the inputs by name, or a folder of
    ``.npy`` files named like the inputs.

    Raises:
        DataError: nothing there fits the inputs of the model.
    """
    path = Path(data).expanduser()
    needs = ", ".join(f"{p.name} {p.dtype} {_shown(p)}" for p in model.inputs)
    if path.is_file() and path.suffix.lower() == ".npz":
        held = read_archive(path)
        by_name = {port.name for port in model.inputs} <= held.keys()
        if by_name and not any(held[p.name].dtype == np.uint8 and p.dtype == "float32" for p in model.inputs):
            return _named(held, model, str(path))
        name = next((name for name in _IMAGES if name in held and held[name].dtype == np.uint8), None)
        if name is None:
            raise DataError(
                f"{path} holds {', '.join(held) or 'nothing'}; the model reads {needs}",
                "store one array for each input under its name, samples along the first axis",
            )
        return _pixel_array(held[name], held.get(_LABELS[name]), model, pixels, f"{path}: {name}")
    if path.is_dir() and all((path / f"{port.name}.npy").is_file() for port in model.inputs):
        return _named(_mapped(path), model, str(path))
    if path.is_dir():
        return _image_folder(path, model, pixels)
    problem = "is a file that is not read" if path.exists() else "does not exist"
    raise DataError(
        f"--data {data} {problem}; the model reads {needs}",
        "give a folder of images, or a .npz file with one array for each input",
    )


def _shown(port: Port) -> str:
    return "(" + ", ".join("N" if size is None else str(size) for size in port.shape) + ")"


def _mapped(path: Path) -> dict[str, NDArray[Any]]:
    """The ``.npy`` files of a folder, not read into memory."""
    try:
        return {file.stem: np.load(file, mmap_mode="r") for file in sorted(path.glob("*.npy"))}
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}", "write plain arrays with numpy.save") from error


def _named(held: dict[str, NDArray[Any]], model: FloatModel, where: str) -> Samples:
    """Arrays by input name: of the input's rank, with samples along the first axis; or of one rank more, and
    then each entry of the first axis is one whole call."""
    ports = {port.name: port for port in model.inputs}
    counts = {name: len(held[name]) for name in ports if held[name].ndim}
    if len(set(counts.values())) != 1 or len(counts) != len(ports):
        raise DataError(f"{where}: arrays of different lengths: {counts}", "one entry for each sample")
    whole = any(held[name].ndim == len(port.shape) + 1 for name, port in ports.items())
    for name, port in ports.items():
        array = held[name]
        wanted = port.shape if array.ndim == len(port.shape) + 1 else port.shape[1:]
        fits = array.ndim in (len(port.shape), len(port.shape) + 1) and all(
            size in (None, got) for size, got in zip(wanted, array.shape[1:], strict=True)
        )
        if not fits or not np.can_cast(array.dtype, port.dtype, "same_kind"):
            raise DataError(
                f"{where}: '{name}' is {array.dtype} {array.shape}, the model reads {port.dtype} "
                + _shown(port),
                "give arrays of that shape and type; images of a folder are resized to what a model reads",
            )

    def read(rows: NDArray[np.int64]) -> Feeds:
        return {
            name: np.ascontiguousarray(
                held[name][rows[0]] if held[name].ndim == len(port.shape) + 1 else held[name][rows],
                dtype=port.dtype,
            )
            for name, port in ports.items()
        }

    labels = held.get("labels")
    return _checked(Samples(next(iter(counts.values())), read, _label_array(labels, counts), where, whole))


def _label_array(labels: NDArray[Any] | None, counts: dict[str, int]) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    if labels.ndim != 1 or len(labels) not in counts.values() or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"'labels' is {labels.dtype} {labels.shape}, expected one integer for each of the "
            f"{next(iter(counts.values()))} samples",
            "leave 'labels' out, and outputs are compared with those of the float model",
        )
    return labels.astype(np.int64)


def _image_port(model: FloatModel, where: str) -> Port:
    port = model.inputs[0]
    if len(model.inputs) != 1 or len(port.shape) != 4 or port.dtype != "float32":
        needs = ", ".join(f"{p.name} {p.dtype} {_shown(p)}" for p in model.inputs)
        raise DataError(
            f"{where}: images do not fit this model, which reads {needs}",
            "give a .npz file with one array for each input under its name",
        )
    return port


def _pixel_array(
    images: NDArray[Any], labels: NDArray[Any] | None, model: FloatModel, pixels: Pixels, where: str
) -> Samples:
    port = _image_port(model, where)
    images = images[..., None] if images.ndim == 3 else images
    height, width, channels = _wanted(port, pixels, images.shape[1:3], where)
    if images.ndim != 4 or images.shape[1:] != (height, width, channels):
        raise DataError(
            f"{where}: images of shape {images.shape[1:]}, the model reads ({height}, {width}, {channels}) "
            "(height, width, channels)",
            "convert them first; a folder of image files is resized and brought to the model's colours",
        )
    convert = _converter(port.name, channels, model, pixels)
    known = None if labels is None else _label_array(labels, {"images": len(images)})
    return _checked(Samples(len(images), lambda rows: convert(images[rows]), known, where))


def _image_folder(path: Path, model: FloatModel, pixels: Pixels) -> Samples:
    port = _image_port(model, str(path))
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith(HIDDEN) for part in file.relative_to(path).parts)
    )
    height, width, channels = _wanted(port, pixels, None, str(path))
    color = "grey" if channels == 1 else "rgb"
    request = Request(DataRecipe(), 0, (height, width), color)
    convert = _converter(port.name, channels, model, pixels)

    def read(rows: NDArray[np.int64]) -> Feeds:
        parts, _ = decode_parts([[Sample(str(files[row]), files[row], 0) for row in rows]], request)
        return convert(parts[0].images)

    folders = [[p for p in file.relative_to(path).parts[:-1] if p.lower() not in _PARTS] for file in files]
    names = sorted({parts[0] for parts in folders if parts})
    labels = None
    if len(names) > 1 and all(folders):
        classes = model.outputs[0].shape[-1] if len(model.outputs[0].shape) == 2 else None
        if classes in (None, len(names)):
            labels = np.array([names.index(parts[0]) for parts in folders], np.int64)
    return _checked(Samples(len(files), read, labels, str(path)))


def _wanted(port: Port, pixels: Pixels, stored: Any, where: str) -> tuple[int, int, int]:
    """(height, width, channels) that the network reads."""
    _, channels, height, width = port.shape
    if channels not in (None, 1, 3):
        raise DataError(
            f"{where}: the model reads {_shown(port)}: {channels} channels along the second axis",
            "images are read as (N, 1 or 3, height, width); other layouts as a .npz file of the inputs",
        )
    sizes = [height or pixels.size or (stored and stored[0]), width or pixels.size or (stored and stored[1])]
    if not all(sizes):
        raise DataError(
            f"{where}: the model leaves height and width open: {_shown(port)}", "state them: --image-size N"
        )
    return int(sizes[0]), int(sizes[1]), channels or 3


def _converter(
    name: str, channels: int, model: FloatModel, pixels: Pixels
) -> Callable[[NDArray[np.uint8]], Feeds]:
    """uint8 (N, H, W, C) to the model's float32 (N, C, H, W), with what the file states of itself."""
    mean, std, scale = pixels.mean, pixels.std, pixels.scale
    if not mean and "preprocess" in model.stated:
        try:
            stated = json.loads(model.stated["preprocess"])
            mean, std, scale = tuple(stated["mean"]), tuple(stated["std"]), float(stated["scale"])
        except (ValueError, KeyError, TypeError):
            pass  # another tool's key of the same name
    for what, value in (("--mean", mean), ("--std", std)):
        if value and len(value) != channels:
            raise DataError(f"{what}: expected {channels} numbers, got {len(value)}")
    shape = (1, channels, 1, 1)
    shift = np.asarray(mean or (0.0,) * channels, np.float32).reshape(shape)
    spread = np.asarray(std or (1.0,) * channels, np.float32).reshape(shape)

    def convert(images: NDArray[np.uint8]) -> Feeds:
        floats = images.transpose(0, 3, 1, 2).astype(np.float32) * np.float32(scale)
        return {name: np.ascontiguousarray((floats - shift) / spread)}

    return convert


def _checked(samples: Samples) -> Samples:
    if samples.count < 2:
        raise DataError(
            f"{samples.source}: {samples.count} sample(s); calibration needs at least two",
            "some hundreds, of the kind that the network will see",
        )
    return samples
