"""Orders of a population, against values by hand."""

from __future__ import annotations

import math

import pytest

from edgekd.ranking import (
    deviations,
    kendall_tau,
    log_ranks,
    pair_accuracy,
    partial_rho,
    rank_sum,
    ranks,
    spearman_rho,
)


def test_ranks_are_shares_and_ties_are_means() -> None:
    assert ranks([5.0, 1.0, 1.0, 9.0]).tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6, 1])
    assert ranks([3.0]).tolist() == [0]


def test_log_ranks_punish_the_worst() -> None:
    assert log_ranks([10.0, 30.0, 20.0]).tolist() == pytest.approx([math.log(1 / 3), 0, math.log(2 / 3)])


def test_deviations_of_equal_values_are_zero() -> None:
    assert deviations([2.0, 2.0]).tolist() == [0, 0]
    assert deviations([1.0, 3.0]).tolist() == [-1, 1]


def test_scores_count_alike_however_many_terms_they_have() -> None:
    rows = [
        {"a.x": 0.0, "a.y": 1.0, "b": 2.0},
        {"a.x": 1.0, "a.y": 0.0, "b": 1.0},
        {"a.x": 2, "a.y": 2, "b": 0.0},
    ]
    first = [0.25, 0.25, 1.0]
    assert rank_sum(rows).tolist() == pytest.approx(
        [(f + b) / 2 for f, b in zip(first, (1, 0.5, 0), strict=True)]
    )
    assert rank_sum([{"x": 1.0, "y": 5.0}, {"x": 2.0, "y": 3.0}]).tolist() == [0.5, 0.5]


def test_kendalls_tau_is_corrected_for_ties() -> None:
    assert kendall_tau([1.0, 2, 3, 4], [1.0, 2, 3, 4]) == 1
    assert kendall_tau([1.0, 2, 3, 4], [4.0, 3, 2, 1]) == -1
    assert kendall_tau([1.0, 2, 3, 4], [1.0, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall_tau([1.0, 1, 2], [1.0, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    assert kendall_tau([1.0, 1], [1.0, 2]) == 0


def test_spearmans_rho_is_the_correlation_of_ranks() -> None:
    assert spearman_rho([1.0, 10, 100], [1.0, 2, 3]) == pytest.approx(1)
    assert spearman_rho([1.0, 2, 3, 4], [1.0, 3, 2, 4]) == pytest.approx(0.8)
    assert partial_rho([1.0, 2, 3], [1.0, 2, 3], [1.0, 2, 3]) == 0
    assert partial_rho([1.0, 2, 3, 4], [1.0, 2, 3, 4], [1.0, 4, 2, 3]) == pytest.approx(1)


def test_pairs_of_like_size_and_unlike_accuracy_count() -> None:
    size, truth = [100.0, 105.0, 109.0, 300.0], [70.0, 71.0, 71.1, 50.0]
    assert pair_accuracy([1.0, 2.0, 3.0, 9.0], truth, size) == (1.0, 2)
    assert pair_accuracy([1.0, 1.0, 0.0, 0.0], truth, size) == (0.25, 2)
    share, pairs = pair_accuracy([1.0, 2.0], [1.0, 2.0], [1.0, 2.0])
    assert math.isnan(share)
    assert pairs == 0
