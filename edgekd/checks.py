"""Lines of a gate and their verdicts: accuracy, agreement, coverage, size. It needs numpy only.

Every check answers PASS, FAIL, INCONCLUSIVE or UNUSABLE (`edgekd.errors.EXIT_GATE` has their exit codes),
or NOT_MEASURED.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "UNUSABLE", "NOT_MEASURED"]
_SEVERITY: tuple[Verdict, ...] = ("PASS", "INCONCLUSIVE", "UNUSABLE", "FAIL")


@dataclass(frozen=True)
class Check:
    """One line of the gate; `interval` is (lower, upper) in the same unit as `measured`."""

    name: str
    measured: float | None
    limit: float | None
    interval: tuple[float, float] | None
    verdict: Verdict
    unit: str
    note: str = ""

    def record(self) -> dict[str, Any]:
        """As it stands in ``record.json``."""
        return asdict(self)


def overall(checks: Sequence[Check]) -> Verdict:
    """The worst verdict: FAIL, then UNUSABLE, INCONCLUSIVE, PASS. NOT_MEASURED alone is UNUSABLE."""
    return worst([check.verdict for check in checks])


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """As `overall`, of verdicts alone."""
    measured = [verdict for verdict in verdicts if verdict != "NOT_MEASURED"]
    return max(measured, key=_SEVERITY.index) if measured else "UNUSABLE"


def wilson_interval(successes: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference_interval(
    first: NDArray[np.bool_], second: NDArray[np.bool_], confidence: float = 0.95
) -> tuple[float, float]:
    """Two-sided interval of share(first) - share(second) on the same samples, both of shape (n,).

    Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17:2635, method 10: Wilson intervals of the two shares, combined by
    squares with the samples' correlation.
    """
    n = len(first)
    both, only_first = int((first & second).sum()), int((first & ~second).sum())
    only_second, neither = int((~first & second).sum()), int((~first & ~second).sum())
    p, q = (both + only_first) / n, (both + only_second) / n
    (p_lo, p_hi), (q_lo, q_hi) = (wilson_interval(share * n, n, confidence) for share in (p, q))
    scale = math.sqrt(p * (1 - p) * q * (1 - q)) * n * n
    product = float(both * neither - only_first * only_second)
    if product > 0:
        product = max(product - n / 2, 0.0)  # the continuity correction of method 10
    phi = product / scale if scale else 0.0

    def combine(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return p - q - combine(p - p_lo, q_hi - q), p - q + combine(p_hi - p, q - q_lo)


def accuracy_check(
    reference_correct: NDArray[np.bool_],
    candidate_correct: NDArray[np.bool_],
    *,
    max_drop_points: float,
    name: str = "accuracy drop",
    confidence: float = 0.95,
) -> Check:
    """Accuracy that the candidate loses on the same images, in percentage points.

    PASS when the measured drop is within the limit; FAIL when the whole interval is above it; INCONCLUSIVE
    when the measured drop is above the limit but the interval reaches down to it: more images would tell.

    Error rates, with s the standard error of the drop (about ``100 * sqrt(share of images on which exactly
    one is right / n)`` points, 0.4 for 3000 images and 5 %): a candidate whose true drop equals the limit
    fails in ``(1 - confidence) / 2`` = 2.5 % of all samples and passes in half of them; one that is 1.64 s
    above the limit still passes in 5 %. Limits below 2 s call for more images.

    Args:
        reference_correct: whether the reference classified each image correctly, shape (n,).
        candidate_correct: the same of the candidate, same images in the same order.

    Raises:
        ValueError: no image, or different shapes.
    """
    first, second = np.asarray(reference_correct, bool), np.asarray(candidate_correct, bool)
    if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
        raise ValueError(
            f"expected two arrays of one shape (n,), n > 0; got {first.shape} and {second.shape}"
        )
    n = len(first)
    drop = 100 * (int(first.sum()) - int(second.sum())) / n
    lo, hi = (100 * bound for bound in paired_difference_interval(first, second, confidence))
    note = f"{n} images, {confidence:.0%} interval (paired, Newcombe)"
    verdict: Verdict
    if drop <= max_drop_points:
        verdict = "PASS"
        if hi > max_drop_points:
            note += f"; the sample does not exclude a drop of {hi:.2f} points"
    else:
        verdict = "FAIL" if lo > max_drop_points else "INCONCLUSIVE"
    return Check(name, drop, max_drop_points, (lo, hi), verdict, "points", note)


def parity_check(
    agreement: float, limit: float, n: int, max_abs: float, *, name: str = "top-1 agreement"
) -> Check:
    """Share of `n` images on which the exported model and its reference choose the same class.

    PASS at `limit` or above; FAIL when the 95 % Wilson interval lies below it, or when an output is not a
    number; else INCONCLUSIVE. `max_abs` is the largest difference of a logit, and only reported.

    Raises:
        ValueError: no image.
    """
    if n < 1:
        raise ValueError(f"parity needs at least one image, got {n}")
    if not (math.isfinite(agreement) and math.isfinite(max_abs)):
        return Check(name, None, limit, None, "FAIL", "share", f"{n} images; an output is NaN or infinite")
    interval = wilson_interval(agreement * n, n)
    verdict: Verdict = "PASS" if agreement >= limit else "FAIL" if interval[1] < limit else "INCONCLUSIVE"
    note = f"{n} images, 95% Wilson interval; largest logit difference {max_abs:.3g}"
    return Check(name, agreement, limit, interval, verdict, "share", note)


def with_unit(value: float, unit: str) -> str:
    """A figure of a check in words: a share as percent, a ratio with the sign ×."""
    factor = 100 if unit == "share" else 1
    return f"{factor * value:.4g}" + {"": "", "ratio": "×", "share": " %"}.get(unit, f" {unit}")


def coverage_check(
    nodes: float | None, macs: float | None, limit: float | None, *, name: str = "int8 coverage"
) -> Check:
    """Share of multiply-accumulates that run in int8 kernels; `nodes` is the same share of layers.

    A limit of `None` passes.
    """
    if macs is None:
        return Check(name, None, limit, None, "NOT_MEASURED", "share", "the runtime does not tell")
    note = "by multiply-accumulates" + ("" if nodes is None else f"; {100 * nodes:.1f} % of layers")
    if limit is None:
        return Check(name, macs, None, None, "PASS", "share", f"{note}; no limit set")
    return Check(name, macs, limit, None, "PASS" if macs >= limit else "FAIL", "share", note)


def size_check(size_bytes: int, limit_mib: float | None, *, name: str = "size") -> Check:
    """Bytes on disk; exact, so it is never inconclusive. A limit of `None` passes."""
    size_mib = size_bytes / 2**20
    if limit_mib is None:
        return Check(name, size_mib, None, None, "PASS", "MiB", "no limit set")
    return Check(name, size_mib, limit_mib, None, "PASS" if size_mib <= limit_mib else "FAIL", "MiB")
