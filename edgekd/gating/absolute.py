"""A limit in milliseconds: judged on the device that it is about, by the rules of its card."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from edgekd.card import Quantity
from edgekd.checks import Check, Verdict
from edgekd.profiler import SessionResult, percentile
from edgekd.target import Target

_NAME = "latency p90"


def absolute_check(sessions: Sequence[SessionResult], limit_ms: float, target: Target) -> Check:
    """Wall-clock p90 of the candidate over all sessions (order statistic, 99 % bound).

    UNUSABLE when the card's conditions are met that make a result unusable: the spread of the session
    medians above ``measure.max_cv_percent``, throttling, or a temperature above ``measure.reject_if.temp_c``.
    """
    times = [session.variants["cand"] for session in sessions]
    calls = [call for one in times for round_calls in one.wall_ms for call in round_calls]
    p90 = percentile(calls, 90)
    if p90 is None:
        return _unusable(None, limit_ms, f"{len(calls)} calls are too few for a p90: 64 are needed")
    medians = [statistics.median(call for calls in one.wall_ms for call in calls) for one in times]
    spread = 100 * statistics.stdev(medians) / statistics.fmean(medians)
    most = target.measure.max_cv_percent
    if most is not None and spread > float(most.value):
        note = f"sessions differ by {spread:.1f} % (standard deviation), the card allows {most.value} %"
        return _unusable(p90, limit_ms, note)
    if reason := _another(sessions, target) or _rejected(sessions, target):
        return _unusable(p90, limit_ms, reason)
    note = f"wall clock, {len(calls)} calls, sessions differ by {spread:.1f} %, on {target.description}"
    return Check(_NAME, p90, limit_ms, None, "PASS" if p90 <= limit_ms else "FAIL", "ms", note)


def _unusable(measured: float | None, limit_ms: float, note: str) -> Check:
    verdict: Verdict = "UNUSABLE"
    return Check(_NAME, measured, limit_ms, None, verdict, "ms", note)


def _another(sessions: Sequence[SessionResult], target: Target) -> str:
    """That the device is not the card's, as far as the card says how to recognise it."""
    wanted, told = target.detect.devicetree_model, sessions[0].environment.get("device_tree", "")
    if "host" not in sessions[0].environment or not wanted or wanted in told:
        return ""
    return f"the device calls itself '{told or 'nothing'}', the card is about '{wanted}'"


def _rejected(sessions: Sequence[SessionResult], target: Target) -> str:
    """Which of the card's conditions holds; "" when none does."""
    rules = target.measure.reject_if
    told = [session.environment for session in sessions]
    if rules.get("throttled"):
        for one in told:
            if one.get("throttled"):
                return f"the device reports throttling: {one['throttled']}"
            before, after = one.get("throttle_count_before"), one.get("throttle_count_after")
            if before is not None and after is not None and after > before:
                return f"the processor throttled {after - before} times while measuring"
    hottest = rules.get("temp_c")
    if isinstance(hottest, Quantity):
        temperatures = [one.get("temp_c_after") for one in told]
        if (most := max((t for t in temperatures if t is not None), default=0.0)) > float(hottest.value):
            return f"{most:.0f} °C while measuring, the card allows {hottest.value} °C"
    return ""
