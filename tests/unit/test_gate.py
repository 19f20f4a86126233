"""The latency gate: each verdict on data made for it, its error rates, and its bounds by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from edgekd.checks import Verdict
from edgekd.gate import (
    LatencyLimits,
    LatencySession,
    cluster_bootstrap,
    latency_verdict,
    log_ratios,
    run_latency_gate,
)

BETWEEN = 0.013  # deviation of the log ratio between processes, the larger of those measured


def _session(
    rng: np.random.Generator, ratio: float, *, control: float = 1.0, noise: float = 0.02, rounds: int = 40
) -> LatencySession:
    """Load drifts by a factor that the variants of a round share; every process has its own offset."""
    load = np.exp(rng.normal(0, 0.3, rounds))

    def variant(factor: float) -> np.ndarray:
        return load * factor * np.exp(rng.normal(0, BETWEEN) + rng.normal(0, noise, rounds))

    return LatencySession(load * np.exp(rng.normal(0, noise, rounds)), variant(control), variant(ratio))


def _runner(rng: np.random.Generator, ratio: float) -> Callable[[int], LatencySession]:
    return lambda _: _session(rng, ratio)


def _sessions(seed: int, ratio: float, count: int = 3, **options: float) -> list[LatencySession]:
    rng = np.random.default_rng(seed)
    return [_session(rng, ratio, **options) for _ in range(count)]  # type: ignore[arg-type]


def _exact(ratio: float, control: float = 1.0, rounds: int = 40) -> LatencySession:
    ones = np.ones(rounds)
    return LatencySession(ones, ones * control, ones * ratio)


# ---------------------------------------------------------------- latency: verdicts


def test_the_same_model_passes() -> None:
    result = latency_verdict(_sessions(1, 1.0), max_ratio=1.05)
    assert result.verdict == "PASS"
    assert result.candidate is not None
    assert result.candidate.lo < 1 < result.candidate.hi < 1.05


def test_twenty_percent_slower_fails() -> None:
    result = latency_verdict(_sessions(1, 1.2), max_ratio=1.05)
    assert result.verdict == "FAIL"
    assert result.candidate is not None
    assert result.candidate.ratio == pytest.approx(1.2, abs=0.03)
    assert "slower than 1.05 times" in result.reason


def test_noise_at_the_limit_is_inconclusive() -> None:
    result = latency_verdict(_sessions(1, 1.05, noise=0.3), max_ratio=1.05)
    assert result.verdict == "INCONCLUSIVE"
    assert "restarts" in result.reason


@pytest.mark.parametrize("control", [1.1, 0.9])
@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_a_control_that_differs_is_unusable_whatever_the_candidate(control: float, ratio: float) -> None:
    result = latency_verdict(_sessions(1, ratio, control=control), max_ratio=1.05)
    assert result.verdict == "UNUSABLE"
    assert "against itself" in result.reason


def test_a_wide_control_is_not_unusable() -> None:
    assert latency_verdict(_sessions(1, 1.0, noise=0.6), max_ratio=1.05).verdict == "INCONCLUSIVE"


def test_many_outliers_are_unusable() -> None:
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(0, 0.001, (3, 40)))
    values[2, :9] *= 3  # 22.5 % of the rounds
    session = LatencySession(*values)
    assert len(log_ratios(session.cand, session.ref)) == 31
    result = latency_verdict([session] * 3, max_ratio=1.05)
    assert result.verdict == "UNUSABLE"
    assert "27 of 120 rounds" in result.reason


def test_a_few_outliers_are_dropped_and_counted() -> None:
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(0, 0.001, (3, 40)))
    values[2, :4] *= 3
    result = latency_verdict([LatencySession(*values)] * 3, max_ratio=1.05)
    assert result.verdict == "PASS"
    assert result.candidate is not None
    assert result.control is not None
    assert (result.candidate.dropped, result.control.dropped) == (12, 0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_clock_that_is_too_coarse_is_unusable(value: float) -> None:
    values = np.ones((3, 40))
    values[2, 5] = value
    result = latency_verdict([LatencySession(*values)] * 3, max_ratio=1.05)
    assert (result.verdict, result.candidate) == ("UNUSABLE", None)
    assert result.check(1.05).measured is None


def test_malformed_sessions_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        LatencySession(np.ones(3), np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="one shape"):
        LatencySession(np.ones(0), np.ones(0), np.ones(0))
    with pytest.raises(ValueError, match="at least 2 sessions"):
        latency_verdict([_exact(1.0)], max_ratio=1.05)
    with pytest.raises(ValueError, match="4000"):
        latency_verdict([_exact(1.0)] * 2, max_ratio=1.05, replicates=1000)


# ---------------------------------------------------------------- latency: numbers


def test_bounds_of_sessions_without_noise_are_their_extremes() -> None:
    # Rounds are identical, so a replicate is the mean of 3 draws from log 1.0, log 1.1 and log 1.3. All three
    # are the first session with probability 1/27 > 1 - level: the bounds are the extreme sessions.
    result = latency_verdict([_exact(1.0), _exact(1.1), _exact(1.3)], max_ratio=1.05, confidence=0.99)
    assert result.candidate is not None
    assert result.candidate.ratio == pytest.approx((1.0 * 1.1 * 1.3) ** (1 / 3))
    assert result.candidate.lo == pytest.approx(1.0)
    assert result.candidate.hi == pytest.approx(1.3)
    assert result.control is not None
    assert (result.control.ratio, result.control.lo, result.control.hi) == (1.0, 1.0, 1.0)


def test_the_bootstrap_has_the_exact_distribution_on_two_sessions() -> None:
    means = cluster_bootstrap([np.zeros(5), np.ones(5)], np.random.default_rng(0), 40_000)
    shares = [float(np.mean(means == value)) for value in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.01)


def test_the_bootstrap_resamples_rounds_too() -> None:
    # One round of 0 and two of 1 in each session: the median of 3 draws is 0 with probability 7/27.
    rounds = [np.array([0.0, 1.0, 1.0])] * 2
    means = cluster_bootstrap(rounds, np.random.default_rng(0), 40_000)
    assert means.mean() == pytest.approx(20 / 27, abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 40])
def test_resampled_medians_are_those_of_explicit_resampling(count: int) -> None:
    rng = np.random.default_rng(count)
    values = rng.normal(size=count)
    fast = cluster_bootstrap([values], rng, 20_000)
    explicit = np.median(values[rng.integers(0, count, (20_000, count))], axis=1)
    points = np.sort(values)
    shares = [[float(np.mean(sample <= point)) for point in points] for sample in (fast, explicit)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.02)


def test_a_round_is_dropped_beyond_three_and_a_half_deviations() -> None:
    x = np.array([-1.0, 0.0, 0.0, 1.0, 5.18, 5.20, -1.0, 1.0, -1.0])  # median 0, MAD 1, limit 5.1891
    kept = log_ratios(np.exp(x), np.ones(9))
    np.testing.assert_allclose(np.sort(kept), np.sort(x[x != 5.20]))


def test_identical_rounds_are_all_kept() -> None:
    assert len(log_ratios(np.full(40, 1.3), np.ones(40))) == 40


@pytest.mark.parametrize(("looks", "level"), [(1, 0.99), (2, 0.995), (4, 0.9975)])
def test_the_level_is_shared_over_the_looks(looks: int, level: float) -> None:
    assert latency_verdict([_exact(1.0)] * 2, max_ratio=1.05, looks=looks).level == pytest.approx(level)


def test_the_same_seed_gives_the_same_verdict_and_another_seed_other_bounds() -> None:
    sessions = _sessions(3, 1.03)
    first, again, other = (latency_verdict(sessions, max_ratio=1.05, seed=seed) for seed in (5, 5, -6))
    assert first == again
    assert first.candidate != other.candidate
    assert first.candidate is not None
    assert other.candidate is not None
    assert first.candidate.ratio == other.candidate.ratio


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1.02, 1.05])
def test_identical_models_rarely_fail(limit: float) -> None:
    # 300 runs, 3 restarts growing to 5; a false alarm is FAIL or UNUSABLE.
    verdicts: Counter[Verdict] = Counter()
    for seed in range(300):
        rng = np.random.default_rng([seed, 11])
        limits = LatencyLimits(max_ratio=limit, seed=seed)
        verdicts[run_latency_gate(_runner(rng, 1.0), limits).verdict] += 1
    assert verdicts["FAIL"] + verdicts["UNUSABLE"] <= 9
    if limit == 1.05:
        assert verdicts["PASS"] >= 291


def test_a_slow_candidate_rarely_passes() -> None:
    limits = LatencyLimits(max_ratio=1.05)
    verdicts: Counter[Verdict] = Counter()
    for seed in range(60):
        rng = np.random.default_rng([seed, 12])
        verdicts[run_latency_gate(_runner(rng, 1.1), limits).verdict] += 1
    assert verdicts["PASS"] == 0
    assert verdicts["FAIL"] >= 50


# ---------------------------------------------------------------- latency: looks


def test_restarts_are_added_in_twos_until_the_verdict_is_clear() -> None:
    seeds: list[int] = []

    def runner(seed: int) -> LatencySession:
        seeds.append(seed)
        return _exact(1.08 if len(seeds) == 1 else 1.0)

    result = run_latency_gate(runner, LatencyLimits(max_ratio=1.05, max_restarts=9, seed=7))
    # The mean of n draws is above log 1.05 when 2 of 3, 4 of 5 or 5 of 7 are the slow session (log 1.08).
    # That has a probability of 26 %, 0.7 % and 0.1 %; the bound passes below 1 - level = 0.25 %.
    assert seeds == [700, 701, 702, 703, 704, 705, 706]
    assert (result.verdict, result.restarts) == ("PASS", 7)


@pytest.mark.parametrize(
    ("ratio", "control", "verdict", "count"),
    [(1.0, 1.0, "PASS", 3), (1.2, 1.0, "FAIL", 3), (1.0, 1.2, "UNUSABLE", 5)],
)
def test_a_clear_verdict_stops_and_the_last_look_stands(
    ratio: float, control: float, verdict: str, count: int
) -> None:
    calls: list[int] = []

    def runner(seed: int) -> LatencySession:
        calls.append(seed)
        return _exact(ratio, control)

    result = run_latency_gate(runner, LatencyLimits())
    assert (result.verdict, len(calls)) == (verdict, count)
    assert result.level == pytest.approx(0.995)


@pytest.mark.parametrize(
    ("restarts", "last", "looks"),
    [(3, 5, (3, 5)), (3, 9, (3, 5, 7, 9)), (3, 6, (3, 5)), (5, 3, (5,)), (2, 2, (2,))],
)
def test_planned_looks(restarts: int, last: int, looks: tuple[int, ...]) -> None:
    assert LatencyLimits(restarts=restarts, max_restarts=last).looks == looks


def test_the_latency_line_of_the_gate() -> None:
    check = latency_verdict([_exact(1.04)] * 3, max_ratio=1.05).check(1.05)
    assert check.measured == pytest.approx(1.04)
    assert check.interval is not None
    assert list(check.interval) == pytest.approx([1.04, 1.04])
    assert (check.limit, check.unit, check.verdict) == (1.05, "ratio", "PASS")
