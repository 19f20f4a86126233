"""Ranks of a population, scores made of several terms, and how well two orders agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def ranks(values: Sequence[float] | Values) -> Values:
    """Ranks scaled to 0..1, ties by mean; higher is better, NaN below all."""
    array = np.asarray(values, dtype=np.float64)
    _, place, counts = np.unique(array, return_inverse=True, return_counts=True)
    below = (np.cumsum(counts) - counts + 0.5 * (counts - 1))[place]
    scaled: Values = np.where(np.isnan(array), -0.5, below) / max(1, len(array) - 1)
    return scaled


def deviations(values: Sequence[float] | Values) -> Values:
    """Distances from the mean in standard deviations; zeros where all are equal."""
    array = np.asarray(values, dtype=np.float64)
    spread = array.std()
    scaled: Values = (array - array.mean()) / spread if spread > 0 else np.zeros_like(array)
    return scaled


def log_ranks(values: Sequence[float] | Values) -> Values:
    """``log(rank / m)`` of m values, the worst has rank 1: the weakest term counts most (AZ-NAS)."""
    count = len(values)
    scaled: Values = np.log((ranks(values) * max(1, count - 1) + 1) / count)
    return scaled


def groups(terms: Sequence[str]) -> dict[str, list[str]]:
    """Terms by the score they belong to: ``nwot`` and ``diswot.relation`` to ``nwot`` and ``diswot``."""
    found: dict[str, list[str]] = {}
    for term in terms:
        found.setdefault(term.partition(".")[0], []).append(term)
    return found


def rank_sum(rows: Sequence[Mapping[str, float]]) -> Values:
    """Mean rank of each row, 0..1: of the terms of one score first, then of the scores.

    Terms may differ in scale by any factor; each score counts alike, however many terms it has.
    """
    parts = [
        np.mean([ranks([row[term] for row in rows]) for term in terms], 0)
        for terms in groups(list(rows[0])).values()
    ]
    mean: Values = np.mean(parts, 0)
    return mean


def kendall_tau(first: Sequence[float] | Values, second: Sequence[float] | Values) -> float:
    """Kendall's tau-b: agreement of the order of pairs, -1..1, ties corrected; 0 where one is constant."""
    upper = np.triu_indices(len(first), 1)
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    signs = [np.sign(values[:, None] - values[None])[upper] for values in (a, b)]
    norm = np.sqrt(np.abs(signs[0]).sum() * np.abs(signs[1]).sum())
    return float((signs[0] * signs[1]).sum() / norm) if norm > 0 else 0.0


def spearman_rho(first: Sequence[float] | Values, second: Sequence[float] | Values) -> float:
    """Spearman's rank correlation, ties by mean; 0 where one is constant."""
    return float((deviations(ranks(first)) * deviations(ranks(second))).mean())


def partial_rho(
    score: Sequence[float] | Values, truth: Sequence[float] | Values, size: Sequence[float] | Values
) -> float:
    """Spearman correlation of score and truth with that of size taken out; 0 where size explains either."""
    xy, xz, yz = spearman_rho(score, truth), spearman_rho(score, size), spearman_rho(truth, size)
    rest = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / rest**0.5 if rest > 1e-9 else 0.0


def pair_accuracy(
    score: Sequence[float] | Values,
    truth: Sequence[float] | Values,
    size: Sequence[float] | Values,
    *,
    within: float = 0.1,
    apart: float = 0.3,
) -> tuple[float, int]:
    """Share of pairs of like size whose better one the score names, a tie counting half, and their number.

    Like size: the larger is at most `within` larger. Only pairs more than `apart` of the truth's unit apart
    count. The share is NaN where there is none.
    """
    upper = np.triu_indices(len(score), 1)
    s, t, z = (np.asarray(values, dtype=np.float64) for values in (score, truth, size))
    gap = (t[:, None] - t[None])[upper]
    ratio = (np.maximum(z[:, None], z[None]) / np.minimum(z[:, None], z[None]))[upper]
    counted = (ratio <= 1 + within) & (np.abs(gap) > apart)
    said = np.sign((s[:, None] - s[None])[upper])[counted] * np.sign(gap[counted])
    right = (said > 0).sum() + 0.5 * (said == 0).sum()
    return (float(right / counted.sum()) if counted.any() else float("nan")), int(counted.sum())
