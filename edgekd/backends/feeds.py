"""The inputs of an ONNX file: what they are, and a fixed random value of each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import BackendError, UsageError, missing_extra

_LARGEST = 2**31  # bytes of a protobuf message
TO_SHRINK = "store large weights as external data"
_AGAIN = "export the model again"
_LARGEST_INDEX = 2  # random whole numbers of 32 and 64 bits are below this: they may be indices


@dataclass(frozen=True)
class Feed:
    """An input tensor with every size known; `dtype` is NumPy's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


def shapes_of(feeds: Sequence[Feed] | None) -> dict[str, tuple[int, ...]] | None:
    """By name; None stays None."""
    return None if feeds is None else {feed.name: feed.shape for feed in feeds}


def image_feed(shape: tuple[int, int, int]) -> tuple[Feed, ...]:
    """One float32 image (1, C, H, W) whatever the name of the input."""
    return (Feed("", "float32", (1, *shape)),)


def read_feeds(model: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> tuple[Feed, ...]:
    """The inputs of a file at batch 1, in its order.

    Args:
        shapes: by name, for inputs that have a symbolic size besides the first axis.

    Raises:
        BackendError: not an ONNX file.
        UsageError: a size is not known, or `shapes` names no input or another rank.
        MissingExtraError: the package onnx is not installed.
    """
    graph, hint = _read(model).graph, _AGAIN
    constants = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in constants]
    if not values:
        raise BackendError(f"{model}: an ONNX model with at least one input is expected, got none", hint)
    if unknown := sorted(set(shapes or ()) - {value.name for value in values}):
        known = ", ".join(value.name for value in values)
        raise UsageError(f"--shape {unknown[0]}: {model} has no such input; it has: {known}")
    return tuple(_feed(value, model, (shapes or {}).get(value.name)) for value in values)


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """The option ``--shape``.

    Raises:
        UsageError: not NAME=SIZE,SIZE,... with sizes above 0.
    """
    name, _, sizes = text.rpartition("=")
    parts = sizes.split(",")
    if not name or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--shape {text}: expected NAME=1,3,224,224")
    return name, tuple(map(int, parts))


def external_files(model: Path) -> tuple[Path, ...]:
    """The files beside a model that hold weights too large for it, sorted.

    Raises:
        BackendError: not an ONNX file, or one that names a file outside its folder, or one that is missing.
    """
    tensors = _read(model).graph.initializer
    names = {entry.value for one in tensors for entry in one.external_data if entry.key == "location"}
    folder = model.resolve().parent
    files = tuple(sorted(folder / name for name in names))
    for file in files:
        if not file.resolve().is_relative_to(folder) or not file.is_file():
            raise BackendError(
                f"{model}: its weights lie in '{file}', which is not a file of its folder", _AGAIN
            )
    return files


def too_large(model: Path) -> str:
    """What is wrong with the size of an ONNX file, before it is read into memory; "" for nothing."""
    size = model.stat().st_size
    return f"{model} has {size} bytes; an ONNX file has less than {_LARGEST}" if size >= _LARGEST else ""


def _read(model: Path) -> Any:
    """The model without its external data."""
    try:
        import onnx
    except ImportError as error:
        raise missing_extra("onnx", "train", "reading an ONNX graph") from error
    undecodable = importlib.import_module("google.protobuf.message").DecodeError
    try:
        if problem := too_large(model):
            raise BackendError(problem, TO_SHRINK)
        return onnx.load(model, load_external_data=False)
    except (OSError, undecodable) as error:
        raise BackendError(f"cannot read {model} as an ONNX model: {error}", _AGAIN) from error


def _feed(value: Any, model: Path, given: Sequence[int] | None) -> Feed:
    import onnx

    name, tensor = value.name, value.type.tensor_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:
        dtype = "object"
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    if dtype == "object" or dtype not in _RANDOM:
        raise BackendError(
            f"{model}: input '{name}' is not a tensor of numbers", "only such inputs can be fed"
        )
    if given is not None:
        if len(given) != len(sizes) or any(
            size and size != want for size, want in zip(sizes, given, strict=True)
        ):
            raise UsageError(f"--shape {name}={','.join(map(str, given))}: the file says {sizes} (0: any)")
        return Feed(name, dtype, tuple(given))
    if sizes and sizes[0] == 0:
        sizes[0] = 1
    if 0 in sizes:
        example = ",".join(str(size or 64) for size in sizes)
        raise UsageError(
            f"{model}: input '{name}' has a size that the file leaves open: {sizes} (0: open)",
            f"say which: --shape {name}={example}",
        )
    return Feed(name, dtype, tuple(sizes))


_RANDOM: dict[str, tuple[int, int] | None] = {
    **dict.fromkeys(("float16", "float32", "float64"), None),
    **dict.fromkeys(("int32", "int64", "uint32", "uint64", "int16", "uint16"), (0, _LARGEST_INDEX)),
    "uint8": (0, 256),
    "int8": (-128, 128),
    "bool": (0, 2),
}


def random_feeds(feeds: Sequence[Feed], seed: int) -> dict[str, NDArray[Any]]:
    """Standard normal, or whole numbers: 0 or 1 where they may be indices. One seed, the same values."""
    rng = np.random.default_rng(seed)
    made: dict[str, NDArray[Any]] = {}
    for feed in feeds:
        limits = _RANDOM[feed.dtype]
        if limits is None:
            made[feed.name] = rng.standard_normal(feed.shape).astype(feed.dtype)
        else:
            made[feed.name] = rng.integers(limits[0], limits[1], feed.shape).astype(feed.dtype)
    return made
