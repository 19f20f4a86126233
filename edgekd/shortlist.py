"""Which students deserve a short training, and what a few trainings say of the others. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.ranking import Values, deviations, kendall_tau, ranks

_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def shortlist(features: Values, merit: Values, forced: Sequence[int], count: int) -> list[int]:
    """`count` rows: those `forced`, then one by one the row whose merit and distance to all taken ones are
    highest together (their ranks added). `features` (rows, columns) of any scale."""
    scaled = np.stack([ranks(column) for column in features.T], 1)
    chosen = list(dict.fromkeys(forced))[:count]
    left = [row for row in range(len(merit)) if row not in chosen]
    while left and len(chosen) < count:
        near = np.array(
            [min((float(np.abs(scaled[r] - scaled[c]).sum()) for c in chosen), default=0.0) for r in left]
        )
        best = int(np.argmax(ranks(merit[left]) + ranks(near)))
        chosen.append(left.pop(best))
    return chosen


@dataclass(frozen=True)
class Ridge:
    """``y = mean + X w``, X in standard deviations of the fitted rows (Hoerl & Kennard 1970).

    `left_out`: what each fitted row is predicted as by the others; `tau`: Kendall's, of that with the truth.
    """

    strength: float
    weights: Values
    center: Values
    spread: Values
    mean: float
    left_out: Values
    tau: float

    def predict(self, features: Values) -> Values:
        """(rows,) of (rows, columns)."""
        found: Values = self.mean + (features - self.center) / self.spread @ self.weights
        return found


def fit_ridge(features: Values, truth: Values) -> Ridge:
    """The strength is the one of six whose leave-one-out error is smallest (closed form, Golub, Heath & Wahba
    1979)."""
    center, spread = features.mean(0), features.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    x, mean = (features - center) / spread, float(truth.mean())
    fits = []
    for strength in _STRENGTHS:
        solve = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T)
        hat = np.diag(x @ solve) + 1 / len(truth)  # the mean is fitted too
        residual = (truth - mean - x @ (solve @ (truth - mean))) / np.maximum(1 - hat, 1e-9)
        fits.append((float((residual**2).mean()), strength, solve @ (truth - mean), truth - residual))
    _, strength, weights, left_out = min(fits, key=lambda fit: fit[0])
    return Ridge(strength, weights, center, spread, mean, left_out, kendall_tau(left_out, truth))


def spread_of(values: Sequence[float]) -> Values:
    """Logarithms in standard deviations: sizes that differ by factors."""
    return deviations(np.log(np.maximum(np.asarray(values, dtype=np.float64), 1e-12)))
