"""Further teachers, whose logits stand beside those of the first: read, given the same inputs, checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.errors import TeacherError
from edgekd.recipe import TeacherRecipe
from edgekd.spec import ModelSpec
from edgekd.tasks.classification import accuracy
from edgekd.teacher import LoadedTeacher, Teacher, check_teacher, load_teacher


def source_and_weights(text: str) -> tuple[str, str]:
    """``source@weights`` of `teacher.others`; a ``.onnx`` file has its weights in it."""
    if text.endswith(".onnx"):
        return text, ""
    source, _, weights = text.partition("@")
    return source, weights


def load_other(text: str, spec: ModelSpec) -> LoadedTeacher:
    """One entry of `teacher.others`, as a network of the first teacher's inputs.

    Raises:
        TeacherError: it cannot be found, its weights do not fit, or it wants other channels.
    """
    source, weights = source_and_weights(text)
    loaded = load_teacher(TeacherRecipe(source=source, weights=weights))
    if loaded.channels not in (None, spec.preprocessing.channels):
        raise TeacherError(
            f"teacher '{source}' takes {loaded.channels} channels, the first teacher "
            f"{spec.preprocessing.channels}",
            "teachers that teach together see the same images",
        )
    if loaded.model is None or not (loaded.mean or loaded.std):
        return loaded
    mean, std = loaded.mean or (0.0,), loaded.std or (1.0,)
    first = spec.preprocessing
    if (mean, std) == (first.mean, first.std):
        return loaded
    return replace(loaded, model=_Renormalised(loaded.model, first.mean, first.std, (mean, std)).eval())


class _Renormalised(nn.Module):
    """A network that was trained with other means and deviations than its inputs have."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        own: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        super().__init__()
        self.model = model
        given = [torch.tensor(part).view(1, -1, 1, 1) for part in (mean, std)]
        wanted = [torch.tensor(part).view(1, -1, 1, 1) for part in own]
        self.register_buffer("scale", given[1] / wanted[1])
        self.register_buffer("shift", (given[0] - wanted[0]) / wanted[1])

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs * self.scale + self.shift)
        return logits


def check_others(
    others: tuple[Teacher, ...], inputs: Tensor, labels: NDArray[np.int64], subsets: list[list[int]]
) -> list[dict[str, Any]]:
    """What the record says of each; `subsets` are the classes of specialists, the first teacher's first.

    A teacher of all classes must know the data. A specialist has one output for each class of its subset.

    Raises:
        TeacherError: the number of outputs is neither, or the teacher does no better than chance.
    """
    rows = []
    for number, teacher in enumerate(others, 1):
        logits = _answers(teacher, inputs)
        subset = subsets[number] if number < len(subsets) else []
        if logits.shape[1] == len(teacher.spec.classes):
            right = check_teacher(teacher, logits, labels)
        elif logits.shape[1] == len(subset):
            right = _specialist_accuracy(logits, labels, subset)
        else:
            raise TeacherError(
                f"the teacher '{teacher.name}' has {logits.shape[1]} outputs, the data has "
                f"{len(teacher.spec.classes)} classes",
                "give it an output for each class; a specialist of some classes is for --method slices with "
                "distill.options.slices.specialists and its classes in .subsets",
            )
        rows.append(
            {
                "name": teacher.name,
                "accuracy": right,
                "classes": logits.shape[1],
                "sha256": teacher.sha256,
                "runtime": teacher.runtime,
            }
        )
    return rows


def _answers(teacher: Teacher, inputs: Tensor) -> Tensor:
    try:
        return torch.cat([teacher.logits(part) for part in torch.split(inputs, 256)])
    except (RuntimeError, ValueError) as error:  # of another image size, such as a transformer's
        first = (str(error).splitlines() or [""])[0]
        raise TeacherError(
            f"the teacher '{teacher.name}' refuses images of shape {tuple(inputs.shape[1:])}: {first}",
            "teachers that teach together see the same images; data.image_size changes their size",
        ) from error


def _specialist_accuracy(logits: Tensor, labels: NDArray[np.int64], subset: list[int]) -> float:
    """Share of the images of its own classes that a specialist gets right."""
    own = np.isin(labels, subset)
    place = np.array([subset.index(label) for label in labels[own]], dtype=np.int64)
    return accuracy(logits.numpy()[own], place)
