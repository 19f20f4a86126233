"""Who is trained briefly, and what the trainings say of the others."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.ranking import kendall_tau
from edgekd.shortlist import fit_ridge, shortlist, spread_of


def test_the_forced_come_first_and_nobody_twice() -> None:
    rng = np.random.default_rng(0)
    found = shortlist(rng.normal(size=(30, 3)), rng.normal(size=30), [7, 3, 7], 10)
    assert found[:2] == [7, 3]
    assert len(found) == len(set(found)) == 10


def test_fewer_candidates_than_places_are_all_taken() -> None:
    assert sorted(shortlist(np.eye(3), np.arange(3.0), [1], 8)) == [0, 1, 2]


def test_of_equal_merit_the_most_different_is_taken() -> None:
    features = np.array([[0.0], [0.1], [0.2], [9.0]])
    assert shortlist(features, np.zeros(4), [0], 2) == [0, 3]


def test_of_equal_features_the_best_is_taken() -> None:
    assert shortlist(np.ones((4, 2)), np.array([0.0, 1.0, 3.0, 2.0]), [0], 2) == [0, 2]


def test_a_ridge_finds_a_linear_truth_whatever_the_scales() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(60, 4)) * np.array([1, 1e6, 1e-6, 1])
    truth = 3 + features @ np.array([1.0, 2e-6, 0.0, -1.0]) + 0.1 * rng.normal(size=60)
    ridge = fit_ridge(features[:20], truth[:20])
    assert kendall_tau(ridge.predict(features[20:]), truth[20:]) > 0.85


def test_the_left_out_predictions_are_those_of_fits_without_the_row() -> None:
    rng = np.random.default_rng(2)
    features, truth = rng.normal(size=(12, 3)), rng.normal(size=12)
    ridge = fit_ridge(features, truth)
    x = (features - ridge.center) / ridge.spread
    for row in range(3):
        kept = np.arange(12) != row
        bordered = np.hstack([np.ones((11, 1)), x[kept]])
        penalty = np.diag([0.0, *[ridge.strength] * 3])
        weights = np.linalg.solve(bordered.T @ bordered + penalty, bordered.T @ truth[kept])
        assert ridge.left_out[row] == pytest.approx(weights[0] + x[row] @ weights[1:], abs=1e-9)


def test_noise_is_not_taken_for_knowledge() -> None:
    rng = np.random.default_rng(3)
    taus = [fit_ridge(rng.normal(size=(20, 5)), rng.normal(size=20)).tau for _ in range(20)]
    assert abs(float(np.mean(taus))) < 0.35


def test_a_constant_column_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    features, truth = rng.normal(size=(15, 2)), rng.normal(size=15)
    with_constant = np.hstack([features, np.ones((15, 1))])
    assert fit_ridge(with_constant, truth).left_out == pytest.approx(fit_ridge(features, truth).left_out)


def test_sizes_that_differ_by_factors_are_evenly_spread() -> None:
    found = spread_of([1.0, 10.0, 100.0])
    assert found[2] - found[1] == pytest.approx(found[1] - found[0])
