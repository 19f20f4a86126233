"""How much a student learns from more automatic labels: short trainings on growing parts of a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.checks import wilson_interval
from edgekd.distillers import methods
from edgekd.errors import DataError
from edgekd.nets import count_parameters
from edgekd.plan import Plan
from edgekd.spaces import search_space
from edgekd.spec import ModelSpec
from edgekd.tasks.classification import accuracy, normalise, to_tensor
from edgekd.train import Progress, Stage, evaluate, fit
from edgekd.views import CachedTeacher, Views

_SPACE, _METHOD, _BATCH, _RATE, _DECAY = "mobile-cnn", "kd", 64, 1e-2, 0.05
_STAGE = (0, 1, 0, 0, 1)  # inverted, normal width, one block, the smallest kernel, expansion 3


@dataclass(frozen=True)
class Labelled:
    """uint8 (N, H, W, C) images with int64 (N,) labels and, of an annotator, (N, classes) probabilities."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float16] | None = None


class _Stored(CachedTeacher):
    """One answer for each image, whatever its view: what an annotator said about the image itself."""

    def __init__(self, logits: Tensor, views: Views) -> None:
        super().__init__(lambda inputs: inputs, views)
        self._answers = logits

    def of(self, view: int) -> Tensor:
        self._views.select(view)
        return self._answers


def check_sizes(sizes: Sequence[int], available: int) -> None:
    """Refuse a curve that the corpus cannot give.

    Raises:
        DataError: a size below 2, beyond the corpus, or not larger than the one before.
    """
    for size, before in zip(sizes, (1, *sizes), strict=False):
        if size <= before:
            raise DataError(f"--curve {','.join(map(str, sizes))}: sizes must grow, from 2 on")
    if sizes and sizes[-1] > available:
        raise DataError(
            f"--curve asks for {sizes[-1]} labels, and there are {available}",
            f"end the curve at {available} or less, or lower --min-confidence",
        )


@dataclass(frozen=True)
class Course:
    """How the students of a curve are trained: input and classes, steps, seed."""

    spec: ModelSpec
    steps: int
    seed: int

    def student(self) -> nn.Module:
        """A small network of inverted residuals (25,000 parameters for ten classes of 28 x 28 pixels), with
        the same fresh weights for the same seed."""
        space = search_space(_SPACE, self.spec, 8, (3,))
        stages = (len(space.choices) - 3) // len(_STAGE)
        genome = (2, 0, *_STAGE * stages, 1)
        return space.build(genome, torch.Generator().manual_seed(self.seed))

    def train(self, corpus: Labelled, rows: NDArray[np.int64], progress: Progress) -> nn.Module:
        """A student of these rows of the corpus, with the annotator's probabilities as targets."""
        assert corpus.probabilities is not None
        taught = np.log(np.maximum(corpus.probabilities[rows].astype(np.float32), 1e-6))
        views = Views(to_tensor(corpus.images[rows]), self.spec.preprocessing, "crop", 0, self.seed)
        batch = min(_BATCH, len(rows))
        student = self.student()
        stage = Stage(
            name=f"curve, {len(rows)} labels",
            model=student,
            views=views,
            labels=torch.from_numpy(corpus.labels[rows]),
            teacher=_Stored(torch.from_numpy(taught), views),
            distillers=methods(_METHOD),
            epochs=max(1, round(self.steps / (len(rows) // batch))),
            batch_size=batch,
            learning_rate=_RATE,
            weight_decay=_DECAY,
            ema_decay=0.99,
            seed=self.seed,
            plan=Plan(),
        )
        fit(stage, progress)
        return student


def learning_curve(
    corpus: Labelled, gold: Labelled, course: Course, sizes: Sequence[int], progress: Progress
) -> dict[str, Any]:
    """Accuracy on `gold` of one student, always the same and trained for the same number of steps, on the
    first of the corpus's images in one random order: each part holds the ones before it."""
    order = np.random.default_rng([course.seed, 2]).permutation(len(corpus.labels))
    inputs = normalise(to_tensor(gold.images), course.spec.preprocessing)
    rows = []
    for size in sizes:
        student = course.train(corpus, order[:size], progress)
        right = accuracy(evaluate(student, inputs).numpy(), gold.labels)
        low, high = wilson_interval(right * len(gold.labels), len(gold.labels))
        rows.append({"labels": size, "accuracy": right, "interval": [low, high]})
    return {
        "student": f"one of {_SPACE}",
        "parameters": count_parameters(course.student()),
        "method": _METHOD,
        "steps": course.steps,
        "batch_size": _BATCH,
        "gold": len(gold.labels),
        "points": rows,
    }
