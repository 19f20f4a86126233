"""The picture of `search_rank.py --plot`: Kendall's tau of each score with its interval, as one SVG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.ranking import kendall_tau
from edgekd.report.style import CSS
from edgekd.report.svg import Axis, Intervals, Whisker

_RESAMPLES = 500
_SIZES = ("params", "macs", "live-macs")
_WIDTH = 860.0

Array = NDArray[np.float64]


def interval(score: Array, truth: Array, seed: int) -> tuple[float, float]:
    """95 % of tau over architectures drawn again with replacement (Efron 1979, percentile bootstrap)."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(score), size=(_RESAMPLES, len(score)))
    low, high = np.percentile([kendall_tau(score[rows], truth[rows]) for rows in drawn], [2.5, 97.5])
    return float(low), float(high)


def picture(columns: Mapping[str, Array], truth: Array, title: str, seed: int) -> str:
    """A standalone SVG: scores from the best to the worst; sizes, scores beside a teacher, sums and others
    have a colour each. Architectures that a score is not finite for are left out of its row."""
    rows = []
    for name, values in columns.items():
        known = np.isfinite(values)
        tau = kendall_tau(values[known], truth[known])
        pair = interval(values[known], truth[known], seed)
        style = 3 if name in _SIZES else 2 if "+" in name else 1 if "@" in name else 0
        note = f"{tau:.2f}  [{pair[0]:.2f}, {pair[1]:.2f}]"
        rows.append(Whisker(name, tau, pair, style, note, f"{name}: {note}, {known.sum()} architectures"))
    rows.sort(key=lambda row: -(row.value or 0.0))
    ends = [end for row in rows for end in row.pair or ()]
    axis = Axis(f"Kendall's τ, {title}", min(0.0, *ends) - 0.03, min(1.0, max(ends) + 0.03))
    drawn = Intervals(axis, rows, title, [(0.0, "no order", "reference")]).draw(_WIDTH)
    head, _, body = drawn.partition(">")
    head = head.replace(
        "<svg", '<svg xmlns="http://www.w3.org/2000/svg" font-family="Arial,Liberation Sans,sans-serif"', 1
    )
    colours = CSS[CSS.index(":root") : CSS.index("*{box-sizing")]
    rules = "\n".join(line for line in CSS.splitlines() if line.startswith(("svg .", "svg text")))
    paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    return f"{head}><style>{colours}{rules}</style>{paper}{body}\n"


def write(columns: Mapping[str, Array], truth: Array, title: str, seed: int, path: Path) -> None:
    """`picture` as a file."""
    path.write_text(picture(columns, truth, title, seed), encoding="utf-8")
