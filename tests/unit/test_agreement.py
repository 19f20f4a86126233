"""Agreement of an annotator with people: published examples and counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.tasks.agreement import agreement, class_rows, confusion, krippendorff_alpha


def codes(text: str) -> np.ndarray:
    return np.array(["abcde01".index(letter) for letter in text.split()], np.int64)


@pytest.mark.parametrize(
    ("one", "other", "alpha"),
    [  # Krippendorff 2011, sections A and B
        ("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0", 0.095),
        ("a a b b d c c c e d d a", "b a b b b c c c e d d d", 0.692),
    ],
)
def test_alpha_is_that_of_its_author(one: str, other: str, alpha: float) -> None:
    assert krippendorff_alpha(confusion(codes(one), codes(other), 7)) == pytest.approx(alpha, abs=5e-4)
    assert krippendorff_alpha(confusion(codes(other), codes(one), 7)) == pytest.approx(alpha, abs=5e-4)


def test_one_class_throughout_is_full_agreement() -> None:
    assert krippendorff_alpha(confusion(np.zeros(5, np.int64), np.zeros(5, np.int64), 2)) == 1.0


def test_measures_by_hand() -> None:
    gold = np.array([0, 0, 0, 1, 1, 2])
    sure = np.array([0.95, 0.6, 0.9, 0.8, 0.55, 0.99])
    given = np.array([0, 0, 1, 1, 1, 1])
    probabilities = np.full((6, 4), 0.001)
    probabilities[np.arange(6), given] = sure
    found = agreement(gold, probabilities, ("a", "b", "c", "d"))
    assert found["confusion"] == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert found["accuracy"] == pytest.approx(4 / 6)
    # By class 4/5, 4/6 and 0; class d is named by nobody and does not count.
    assert found["macro_f1"] == pytest.approx((4 / 5 + 4 / 6 + 0) / 3)
    chance = (3 * 2 + 2 * 4) / 36
    assert found["cohen_kappa"] == pytest.approx((4 / 6 - chance) / (1 - chance))
    kept = {row["min_confidence"]: (row["share"], row["accuracy"]) for row in found["by_confidence"]}
    assert kept[0.0] == (1.0, pytest.approx(4 / 6))
    assert kept[0.9] == (0.5, pytest.approx(1 / 3))
    assert found["classes"][2] | {"f1": None} == {
        "class": "c", "gold": 1, "named": 0, "precision": None, "recall": 0.0, "f1": None,
    }  # fmt: skip


def test_a_class_that_is_never_named_has_no_precision() -> None:
    rows = class_rows(np.array([[0, 2], [0, 3]]), ("x", "y"))
    assert (rows[0]["precision"], rows[0]["recall"], rows[0]["f1"]) == (None, 0.0, 0.0)
