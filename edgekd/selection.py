"""Which unlabelled images a person should label next; numpy only. Methods: PCoreSet (ActiveKD, Kang et al.
2025; the authors' ``strategies.py``) and the baselines it is compared with there.

Probabilities are (N, classes) rows that sum to one; indices count rows of the pool, in the order chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import DataError, UsageError, unknown_name

Array = NDArray[np.floating]
STRATEGIES = ("pcoreset", "coreset", "entropy", "class-balanced", "random")


@dataclass(frozen=True)
class Pool:
    """What a choice is made from.

    `probabilities` (N, classes) of the pool and `start` (M, classes) of the images that have a label, by one
    model; `embeddings` (N, D) and `start_embeddings` (M, D) of that model where it gives them;
    `start_labels` (M,) the known labels.
    """

    probabilities: Array
    start: Array
    start_labels: NDArray[np.int64]
    embeddings: Array | None = None
    start_embeddings: Array | None = None


@dataclass(frozen=True)
class Pick:
    """One chosen image: its row in the pool, the number that decided, and what that number is."""

    index: int
    score: float
    reason: str


def choose(pool: Pool, budget: int, strategy: str, seed: int) -> list[Pick]:
    """`budget` images of the pool in the order in which they should be labelled.

    Raises:
        UsageError: no such strategy, or no image is asked for.
        DataError: the budget is larger than the pool, or there are no embeddings for ``coreset``.
    """
    if strategy not in STRATEGIES:
        raise UsageError(*unknown_name("strategy", strategy, STRATEGIES))
    if budget < 1:
        raise UsageError(f"a budget of {budget} images chooses nothing", "--budget 50")
    size = len(pool.probabilities)
    if budget > size:
        raise DataError(
            f"the budget of {budget} images is larger than the pool of {size}",
            f"--budget {size} or less, or more images in the pool",
        )
    if strategy == "pcoreset":
        return _spread(pool.probabilities, pool.start, budget, "distance in probabilities")
    if strategy == "coreset":
        if pool.embeddings is None or pool.start_embeddings is None:
            raise DataError(
                "strategy 'coreset' needs the embeddings of a model, and this one gives logits only",
                "--strategy pcoreset works with logits, or bring a torch teacher",
            )
        return _spread(
            _unit(pool.embeddings), _unit(pool.start_embeddings), budget, "distance of unit embeddings"
        )
    if strategy == "entropy":
        uncertain = entropy(pool.probabilities)
        order = np.argsort(-uncertain, kind="stable")[:budget]
        return [Pick(int(i), float(uncertain[i]), "entropy in nats") for i in order]
    order = np.random.default_rng(seed).permutation(size)
    if strategy == "class-balanced":
        return _balanced(pool, order, budget)
    return [Pick(int(i), 0.0, "at random") for i in order[:budget]]


def farthest_first(points: Array, start: Array, budget: int) -> tuple[NDArray[np.int64], Array]:
    """Greedy k-centre: `budget` times ``argmax_i min_j |points_i - chosen_j|``, where the rows of `start` are
    chosen from the beginning; Euclidean, ties to the lowest index, no row twice. O(budget N D).

    Without a start, the first pick is the row nearest to the mean of all.

    Returns:
        The indices in order, and the distance of each at the time it was picked.
    """
    nearest = np.full(len(points), np.inf)
    for row in start:
        np.minimum(nearest, _distances(points, row), out=nearest)
    picked = np.zeros(budget, np.int64)
    reach = np.zeros(budget)
    for turn in range(budget):
        if turn == 0 and not len(start):
            centre = _distances(points, points.mean(0))
            index = int(centre.argmin())
            reach[turn] = centre[index]
        else:
            index = int(nearest.argmax())
            reach[turn] = nearest[index]
        picked[turn] = index
        np.minimum(nearest, _distances(points, points[index]), out=nearest)
        nearest[index] = -np.inf  # a duplicate of a picked row has distance 0 and may still come
    return picked, reach


def _distances(points: Array, row: Array) -> Array:
    """(N,) Euclidean distances of all points to one; of a point to itself exactly 0."""
    distances: Array = np.sqrt(np.square(points - row).sum(1))
    return distances


def _spread(points: Array, start: Array, budget: int, what: str) -> list[Pick]:
    wide = np.asarray(points, np.float64)
    picked, reach = farthest_first(wide, np.asarray(start, np.float64), budget)
    first = f"{what} to the mean" if not len(start) else f"{what} to what is labelled or picked"
    reasons = [first, *[f"{what} to what is labelled or picked"] * (budget - 1)]
    return [Pick(int(i), float(r), why) for i, r, why in zip(picked, reach, reasons, strict=True)]


def _unit(rows: Array) -> Array:
    """Rows of length 1: their distances order as cosine distances do."""
    wide = np.asarray(rows, np.float64)
    unit: Array = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return unit


def _balanced(pool: Pool, order: NDArray[np.int64], budget: int) -> list[Pick]:
    """Each turn goes to the predicted class with the fewest labelled and picked images that still has some;
    ties to the lowest class; within a class in the given order."""
    predicted = pool.probabilities.argmax(1)
    classes = pool.probabilities.shape[1]
    counts = np.bincount(pool.start_labels, minlength=classes).astype(np.float64)
    waiting = [[int(i) for i in order[::-1] if predicted[i] == label] for label in range(classes)]
    picks = []
    for _ in range(budget):
        open_counts = [count if rows else np.inf for count, rows in zip(counts, waiting, strict=True)]
        label = int(np.argmin(open_counts))
        picks.append(Pick(waiting[label].pop(), counts[label], "images of its predicted class before it"))
        counts[label] += 1
    return picks


def entropy(probabilities: Array) -> Array:
    """(N,) ``-sum_c p log p`` in nats; 0 log 0 is 0."""
    wide = np.asarray(probabilities, np.float64)
    logs = np.log(np.where(wide > 0, wide, 1.0))
    found: Array = -(wide * logs).sum(1)
    return found


def softmax(logits: Array) -> NDArray[np.float64]:
    """(N, classes) probabilities of logits, in float64."""
    shifted = np.exp(np.asarray(logits, np.float64) - logits.max(1, keepdims=True))
    made: NDArray[np.float64] = shifted / shifted.sum(1, keepdims=True)
    return made


def best_per_class(probabilities: Array, count: int) -> NDArray[np.int64]:
    """Sorted rows that are among the `count` of their predicted class with the highest probability (SSLD, Cui
    et al. 2021, arXiv:2103.05959, section 3.2); ties to the lowest row. `count` 0 keeps all."""
    if not count:
        return np.arange(len(probabilities))
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    kept = []
    for label in np.unique(predicted):
        rows = np.flatnonzero(predicted == label)
        kept.append(rows[np.argsort(-confidence[rows], kind="stable")[:count]])
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64)
