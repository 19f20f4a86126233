"""The images a student is trained on: labelled ones, ones whose label is put aside, and a pool without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import DataError
from edgekd.recipe import DataRecipe
from edgekd.selection import best_per_class, softmax
from edgekd.sources import Dataset
from edgekd.sources.dataset import Request
from edgekd.sources.unlabeled import load_unlabeled, without_copies

Logits = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # of uint8 (N, H, W, C) images


@dataclass(frozen=True)
class TrainingSet:
    """uint8 (N, H, W, C) images, int64 (N,) labels with -1 where there is none, and what the record says of
    the pool (`None` without one)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    pool: dict[str, Any] | None = None


def training_set(
    data: Dataset, train: NDArray[np.int64], held_out: NDArray[np.int64], request: Request, logits: Logits
) -> TrainingSet:
    """The rows `train` of the training images, then the pool that ``data.unlabeled`` names.

    Of the pool, exact copies of validation images and of the rows `held_out` are dropped; then the teacher
    (`logits`) chooses ``data.pool_per_class`` of each class it names. `request` asks for images of the
    shape of `data`.

    Raises:
        DataError: the pool cannot be read, or nothing of it is left.
    """
    recipe = request.recipe
    images, labels = data.train_images[train], data.train_labels[train].copy()
    labels[unlabelled_rows(labels, recipe.labelled_fraction, request.seed)] = -1
    if not recipe.unlabeled:
        return TrainingSet(images, labels)
    corpus = load_unlabeled(recipe.unlabeled, request)
    kept = without_copies(corpus.images, (data.validation_images, data.train_images[held_out]))
    copies = len(corpus.images) - len(kept)
    if recipe.pool_per_class and len(kept):
        parts = [logits(corpus.images[rows]) for rows in np.array_split(kept, -(-len(kept) // 256))]
        kept = kept[best_per_class(softmax(np.concatenate(parts)), recipe.pool_per_class)]
    if not len(kept):
        raise DataError(
            f"data.unlabeled '{recipe.unlabeled}': all of its {copies} images are copies of validation or "
            "held-out images",
            "bring images that the validation set does not hold",
        )
    facts = {
        "source": recipe.unlabeled,
        "found": len(corpus.images),
        "copies_of_held_out": copies,
        "kept": len(kept),
        "skipped": list(corpus.skipped),
    }
    return TrainingSet(
        np.concatenate([images, corpus.images[kept]]),
        np.concatenate([labels, np.full(len(kept), -1, np.int64)]),
        facts,
    )


def unlabelled_rows(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Rows whose label is put aside, so that the share `fraction` of each class keeps it, at least one."""
    rng = np.random.default_rng([seed, 1])
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    aside = [rng.permutation(own)[max(1, round(len(own) * fraction)) :] for own in rows]
    return np.sort(np.concatenate(aside)) if aside else np.zeros(0, np.int64)


def has_unlabelled(recipe: DataRecipe) -> bool:
    """Whether a training set of this recipe may hold images without a label."""
    return bool(recipe.unlabeled) or recipe.labelled_fraction < 1
