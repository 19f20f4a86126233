"""A cost model of one device, corrected for another by a few measurements there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekd.ranking import Values

_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Transfer:
    """``y = X b``: X (rows, kinds), what the first device takes for each kind of layer; b, what the second
    takes for the same. `error_percent`: the median over the fitted rows, each predicted by the others."""

    weights: Values
    error_percent: float

    def predict(self, parts: Values) -> Values:
        """(rows,) of (rows, kinds)."""
        found: Values = parts @ self.weights
        return found


def fit_transfer(parts: Values, measured: Values) -> Transfer:
    """Ridge on relative errors around one factor s for all kinds:
    ``sum ((X b)_i / y_i - 1)^2 + r sum (b_j / s - 1)^2``.

    s is the median of y over the plain sum, so one measurement already gives a scaled table and many give
    each kind its own factor; r is the one of five whose leave-one-out error is smallest.
    """
    relative = parts / measured[:, None]
    factor = 1 / float(np.median(relative.sum(1)))
    x, target = relative * factor, 1 - relative.sum(1) * factor  # b = s (1 + u): x u should be `target`
    fits: list[tuple[float, Values, Values]] = []
    for strength in _STRENGTHS:
        solve = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T)
        leverage = np.einsum("ij,ji->i", x, solve)
        residual = (target - x @ (solve @ target)) / np.maximum(1 - leverage, 1e-3)
        fits.append((float(np.median(np.abs(residual))), factor * (1 + solve @ target), residual))
    error, weights, _ = min(fits, key=lambda fit: fit[0])
    return Transfer(weights, 100 * error)
