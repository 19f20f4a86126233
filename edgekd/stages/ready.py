"""A loaded teacher made ready for images of one shape: its input and classes, and its fastest runtime."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from edgekd import export
from edgekd.errors import DataError, TeacherError, UnsupportedModelError
from edgekd.files import sha256_json
from edgekd.quantize.capture import capture
from edgekd.recipe import TeacherRecipe
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.teacher import LoadedTeacher, Teacher, use_fastest_runtime


def model_spec(
    loaded: LoadedTeacher, recipe: TeacherRecipe, shape: tuple[int, int, int], classes: tuple[str, ...]
) -> ModelSpec:
    """Input and output for images of `shape` (height, width, channels), normalised as the recipe says, else
    as the teacher states.

    Raises:
        DataError: mean or deviation do not fit the channels, or a deviation is not positive.
    """
    height, width, channels = shape
    mean = _per_channel("mean", recipe.mean or loaded.mean or (0.0,), channels)
    std = _per_channel("std", recipe.std or loaded.std or (1.0,), channels)
    color = "grey" if channels == 1 else "rgb"
    return ModelSpec(Preprocessing(height, width, color, mean, std), classes)


def _per_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if name == "std" and min(values) <= 0:
        raise DataError(f"teacher.std must be positive, got {values}", "such as --std 0.229,0.224,0.225")
    if len(values) == 1:
        return values * channels
    if len(values) != channels:
        raise DataError(f"teacher.{name} has {len(values)} values, the images have {channels} channels")
    return values


def ready_teacher(
    loaded: LoadedTeacher,
    name: str,
    spec: ModelSpec,
    *,
    folder: Path,
    inputs: Tensor,
    threads: int,
    say: Callable[[str], None],
) -> Teacher:
    """The teacher with its ONNX form in `folder`, where it has one, in the fastest runtime that is faithful
    on `inputs` (normalised); `threads` 0 is all that this process may use.

    Raises:
        TeacherError: a network or a file that refuses images of this shape.
    """
    _file_takes(loaded, name, spec)
    teacher = Teacher(name, spec, loaded.sha256, loaded.size_mib, loaded.model, loaded.onnx)
    teacher.batch = loaded.batch
    if loaded.model is not None:
        _takes(loaded.model, name, spec)
        path = folder / f"teacher-{sha256_json([loaded.sha256, spec])[:12]}.onnx"
        if not path.exists():
            try:
                export.save(export.to_onnx(capture(loaded.model, spec.input_shape), spec), path)
            except UnsupportedModelError as error:
                say(f"the teacher stays in torch: {error.message}")
        teacher.onnx = path if path.exists() else None
    use_fastest_runtime(teacher, inputs, threads or len(os.sched_getaffinity(0)))
    return teacher


def _file_takes(loaded: LoadedTeacher, name: str, spec: ModelSpec) -> None:
    """An ONNX file may fix the shape of its input."""
    channels, height, width = spec.input_shape
    if loaded.model is not None:
        return
    wanted = (loaded.channels or channels, *(loaded.image_size or (height, width)))
    if wanted != spec.input_shape:
        told = [f"{c} x {h} x {w}" for c, h, w in (wanted, spec.input_shape)]
        raise TeacherError(
            f"the teacher '{name}' takes images of {told[0]} (channels, height, width), those of the data "
            f"are {told[1]}",
            "leave --image-size out: images are then resized to what the (first) teacher takes",
        )


def _takes(model: nn.Module, name: str, spec: ModelSpec) -> None:
    """A blank image through the network."""
    shape = (1, *spec.input_shape)
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(shape))
    except Exception as error:  # the user's code may raise anything
        first = (str(error).splitlines() or [""])[0]
        raise TeacherError(
            f"the teacher '{name}' refuses float32 images of shape {shape}, which are those of the data: "
            f"{type(error).__name__}: {first}",
            "resize them to what it was trained on: --image-size N; its channels are those of the data",
        ) from error
