"""Accuracy, parity, coverage and size: verdicts, intervals against published ones, and error rates."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from edgekd.checks import (
    Check,
    Verdict,
    accuracy_check,
    coverage_check,
    overall,
    paired_difference_interval,
    parity_check,
    size_check,
    wilson_interval,
)
from edgekd.errors import EXIT_GATE

# ---------------------------------------------------------------- accuracy


def _paired(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    return first, second


def test_the_paired_interval_is_the_published_one() -> None:
    # Newcombe 1998, 36 + 12 + 2 + 0 pairs: 0.0569 to 0.3404 by method 10.
    assert paired_difference_interval(*_paired(36, 12, 2, 0)) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_the_paired_interval_changes_sign_with_the_order() -> None:
    first, second = _paired(80, 9, 4, 7)
    lo, hi = paired_difference_interval(first, second)
    assert paired_difference_interval(second, first) == pytest.approx((-hi, -lo))


def test_the_paired_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(500):
        kind = rng.choice(4, 300, p=[0.88, 0.04, 0.02, 0.06])
        lo, hi = paired_difference_interval(kind <= 1, (kind == 0) | (kind == 2))
        missed += not lo <= 0.02 <= hi
    assert missed <= 40  # 25 expected


@pytest.mark.parametrize(
    ("table", "verdict"),
    [
        ((900, 10, 10, 80), "PASS"),  # no drop
        ((900, 0, 20, 80), "PASS"),  # the candidate is better
        ((900, 20, 10, 70), "PASS"),  # 1.0 points, exactly the limit
        ((900, 22, 11, 67), "INCONCLUSIVE"),  # 1.1 points, the interval reaches below the limit
        ((900, 60, 5, 35), "FAIL"),  # 5.5 points
        ((9, 1, 0, 0), "INCONCLUSIVE"),  # 10 points of 10 images
    ],
)
def test_accuracy_verdicts(table: tuple[int, int, int, int], verdict: str) -> None:
    check = accuracy_check(*_paired(*table), max_drop_points=1.0)
    n = sum(table)
    assert check.verdict == verdict
    assert check.measured == pytest.approx(100 * (table[1] - table[2]) / n)
    assert check.interval is not None
    assert check.measured is not None
    assert check.interval[0] <= check.measured <= check.interval[1]
    assert str(n) in check.note


def test_a_pass_says_what_the_sample_does_not_exclude() -> None:
    assert "does not exclude a drop" in accuracy_check(*_paired(9, 0, 0, 1), max_drop_points=1.0).note
    assert "does not exclude" not in accuracy_check(*_paired(2900, 0, 30, 70), max_drop_points=1.0).note


def test_a_drop_at_the_limit_rarely_fails() -> None:
    rng = np.random.default_rng(1)
    fails = 0
    for _ in range(300):
        kind = rng.choice(4, 1000, p=[0.90, 0.03, 0.02, 0.05])  # true drop 1.0 points
        check = accuracy_check(kind <= 1, (kind == 0) | (kind == 2), max_drop_points=1.0)
        fails += check.verdict == "FAIL"
    assert fails <= 15  # 2.5 % are 7.5


def test_accuracy_needs_paired_images() -> None:
    with pytest.raises(ValueError, match="one shape"):
        accuracy_check(np.ones(3, bool), np.ones(4, bool), max_drop_points=1.0)
    with pytest.raises(ValueError, match="n > 0"):
        accuracy_check(np.ones(0, bool), np.ones(0, bool), max_drop_points=1.0)


# ---------------------------------------------------------------- parity, coverage, size


def test_wilson_interval_by_hand() -> None:
    # 8 of 10 at z = 1.959964: (0.8 + 0.192073) / 1.384146 -+ 1.959964 / 1.384146 * sqrt(0.016 + 0.009604)
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert wilson_interval(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson_interval(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("agreement", "n", "verdict"),
    [(1.0, 100, "PASS"), (0.97, 100, "PASS"), (0.96, 100, "INCONCLUSIVE"), (0.90, 1000, "FAIL")],
)
def test_parity_verdicts(agreement: float, n: int, verdict: str) -> None:
    check = parity_check(agreement, 0.97, n, 0.1)
    assert (check.verdict, check.measured) == (verdict, agreement)
    assert f"{n} images" in check.note


@pytest.mark.parametrize(("agreement", "max_abs"), [(math.nan, 0.1), (1.0, math.nan), (1.0, math.inf)])
def test_an_output_that_is_not_a_number_fails_parity(agreement: float, max_abs: float) -> None:
    assert parity_check(agreement, 0.97, 100, max_abs).verdict == "FAIL"


def test_parity_needs_images() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        parity_check(1.0, 0.97, 0, 0.0)


def test_coverage_verdicts() -> None:
    assert coverage_check(1.0, 0.95, 0.95).verdict == "PASS"
    check = coverage_check(0.5, 0.949, 0.95)
    assert (check.verdict, check.measured) == ("FAIL", 0.949)
    assert "50.0 % of layers" in check.note
    assert coverage_check(None, 1.0, 0.95).verdict == "PASS"
    assert coverage_check(None, None, 0.95).verdict == "NOT_MEASURED"


def test_size_verdicts() -> None:
    assert size_check(2**20, 1.0).verdict == "PASS"
    assert size_check(2**20 + 1, 1.0).verdict == "FAIL"
    assert size_check(2**20, None).measured == 1.0
    assert size_check(2**20, None).verdict == "PASS"


# ---------------------------------------------------------------- the whole


def _check(verdict: Verdict) -> Check:
    return Check("x", 1.0, 1.0, None, verdict, "")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["PASS", "PASS"], "PASS"),
        (["PASS", "NOT_MEASURED"], "PASS"),
        (["PASS", "INCONCLUSIVE"], "INCONCLUSIVE"),
        (["INCONCLUSIVE", "UNUSABLE", "PASS"], "UNUSABLE"),
        (["UNUSABLE", "FAIL", "PASS"], "FAIL"),
        (["NOT_MEASURED"], "UNUSABLE"),
        ([], "UNUSABLE"),
    ],
)
def test_the_worst_verdict_counts(verdicts: list[Verdict], expected: str) -> None:
    verdict = overall([_check(verdict) for verdict in verdicts])
    assert verdict == expected
    assert verdict in EXIT_GATE


def test_a_check_is_frozen_and_goes_into_json() -> None:
    check = accuracy_check(*_paired(90, 1, 0, 9), max_drop_points=1.0)
    record = json.loads(json.dumps(check.record()))
    assert list(record) == ["name", "measured", "limit", "interval", "verdict", "unit", "note"]
    assert record["interval"] == list(check.interval or ())
    with pytest.raises(FrozenInstanceError):
        check.verdict = "PASS"  # type: ignore[misc]
