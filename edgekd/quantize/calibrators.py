"""From the histogram of a tensor to the range its grid should cover."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import UsageError, unknown_name

Histogram = NDArray[np.float64]
BINS = 2048
# Candidate ranges, as shares of the observed one; few levels pay for a narrow one.
_SHARES, _SHARES_OF_FEW = np.linspace(0.3, 1.0, 36), np.linspace(0.1, 1.0, 46)


def min_max(histogram: Histogram, low: float, high: float, levels: int = 256) -> tuple[float, float]:
    """Everything that was seen."""
    return low, high


def percentile(
    histogram: Histogram, low: float, high: float, levels: int = 256, tail: float = 1e-4
) -> tuple[float, float]:
    """All but a share `tail` of the values at each end that is not zero."""
    edges = np.linspace(low, high, len(histogram) + 1)
    cumulative = np.cumsum(histogram) / histogram.sum()
    first = low if low >= 0 else float(edges[int(np.searchsorted(cumulative, tail))])
    last = float(edges[min(int(np.searchsorted(cumulative, 1 - tail)) + 1, len(histogram))])
    return first, max(last, first + 1e-8)


def mse(histogram: Histogram, low: float, high: float, levels: int = 256) -> tuple[float, float]:
    """The share of the observed range with the least mean squared rounding and clipping error."""
    centres = low + (np.arange(len(histogram)) + 0.5) * (high - low) / len(histogram)
    errors, shares = [], _SHARES if levels >= 256 else _SHARES_OF_FEW
    for share in shares:
        first, last = low * share, high * share
        step = (last - first) / (levels - 1)
        rounded = np.clip(np.round((centres - first) / step), 0, levels - 1) * step + first
        errors.append(float((histogram * (rounded - centres) ** 2).sum()))
    best = float(shares[int(np.argmin(errors))])
    return low * best, high * best


def entropy(histogram: Histogram, low: float, high: float, levels: int = 256) -> tuple[float, float]:
    """The share that minimises the Kullback-Leibler divergence between the values' distribution and its
    version of half the levels (Migacz 2017, "8-bit inference with TensorRT", slides 20 to 38)."""
    centres = np.abs(low + (np.arange(len(histogram)) + 0.5) * (high - low) / len(histogram))
    reach = max(-low, high)
    magnitudes, _ = np.histogram(centres, BINS, (0.0, reach), weights=histogram)
    divergences, steps, shares = [], levels // 2, _SHARES if levels >= 256 else _SHARES_OF_FEW
    for share in shares:
        kept = round(share * BINS)
        reference = magnitudes[:kept].copy()
        reference[-1] += magnitudes[kept:].sum()
        level = np.arange(kept) * steps // kept
        filled = magnitudes[:kept] > 0
        mass = np.bincount(level, magnitudes[:kept], steps)
        count = np.maximum(np.bincount(level, filled, steps), 1)
        coarse = np.where(filled, mass[level] / count[level], 0.0)
        p, q = reference / reference.sum(), coarse / max(coarse.sum(), 1e-30)
        inside = (p > 0) & (q > 0)
        missed = p[(p > 0) & (q == 0)].sum() * np.log(1e6)
        divergences.append(float((p[inside] * np.log(p[inside] / q[inside])).sum() + missed))
    best = float(shares[int(np.argmin(divergences))])
    return low * best, high * best


class Calibrator(Protocol):
    """`levels`: number of codes of the grid."""

    def __call__(
        self, histogram: Histogram, low: float, high: float, levels: int = 256
    ) -> tuple[float, float]: ...


_TABLE: dict[str, Calibrator] = {
    "min-max": min_max,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def calibrator(name: str) -> Calibrator:
    """``f(histogram over [low, high], low, high, levels) -> (low, high)`` of this name.

    Raises:
        UsageError: no such calibrator.
    """
    if name not in _TABLE:
        raise UsageError(*unknown_name("calibrator", name, _TABLE))
    return _TABLE[name]


def calibrator_names() -> tuple[str, ...]:
    """Names of all calibrators."""
    return tuple(_TABLE)
