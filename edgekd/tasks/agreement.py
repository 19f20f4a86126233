"""How an annotator's labels agree with those of people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.tasks.classification import cohen_kappa

THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def confusion(gold: NDArray[np.int64], given: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """(classes, classes) counts: rows are the gold classes, columns the annotator's."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (gold, given), 1)
    return counts


def krippendorff_alpha(counts: NDArray[np.int64]) -> float:
    """Krippendorff's alpha for nominal data, two raters and no gaps: ``1 - (n - 1) sum_{c != k} o_ck /
    sum_{c != k} n_c n_k`` with the coincidences ``o = counts + counts^T`` and n = 2 N values (Krippendorff
    2011, "Computing Krippendorff's alpha-reliability", section B); 1 where there is one class only."""
    coincidences = counts + counts.T
    marginals = coincidences.sum(0).astype(np.float64)
    values = marginals.sum()
    expected = values**2 - np.square(marginals).sum()
    observed = float(coincidences.sum() - coincidences.trace())
    return 1.0 if expected == 0 else float(1 - (values - 1) * observed / expected)


def class_rows(counts: NDArray[np.int64], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class; None where it is 0 / 0. A class of the gold set that the
    annotator never names has F1 0; a class that neither names has none."""
    rows = []
    for index, name in enumerate(classes):
        right, gold, named = int(counts[index, index]), int(counts[index].sum()), int(counts[:, index].sum())
        rows.append(
            {
                "class": name,
                "gold": gold,
                "named": named,
                "precision": right / named if named else None,
                "recall": right / gold if gold else None,
                "f1": 2 * right / (gold + named) if gold + named else None,
            }
        )
    return rows


def agreement(
    gold: NDArray[np.int64], probabilities: NDArray[np.floating], classes: Sequence[str]
) -> dict[str, Any]:
    """What the annotator's (N, classes) probabilities are worth against (N,) gold labels. `macro_f1` is the
    mean over classes that one of both names; `by_confidence` says what a threshold would keep."""
    given, confidence = probabilities.argmax(1), probabilities.max(1).astype(np.float64)
    counts = confusion(gold, given, len(classes))
    rows = class_rows(counts, classes)
    scores = [row["f1"] for row in rows if row["f1"] is not None]
    right = given == gold
    kept = [(low, confidence >= low) for low in THRESHOLDS]
    return {
        "images": len(gold),
        "accuracy": float(right.mean()),
        "cohen_kappa": cohen_kappa(gold, given),
        "krippendorff_alpha": krippendorff_alpha(counts),
        "macro_f1": float(np.mean(scores)),
        "classes": rows,
        "confusion": counts.tolist(),
        "by_confidence": [
            {
                "min_confidence": low,
                "share": float(rows_kept.mean()),
                "accuracy": float(right[rows_kept].mean()) if rows_kept.any() else None,
            }
            for low, rows_kept in kept
        ],
    }
