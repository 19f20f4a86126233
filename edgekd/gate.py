"""The latency gate: numbers in, a verdict out. It measures nothing itself and needs numpy only.

Latency is a ratio to a reference model that ran interleaved in the same processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.checks import Check, Verdict

MAD_LIMIT = 3.5 * 1.4826  # 1.4826 * MAD estimates the standard deviation of normal values
SMALLEST_DEVIATION = 1e-6  # of a log ratio: below it a round is never dropped
MAX_DROPPED_SHARE = 0.20
RESTARTS_PER_LOOK = 2


@dataclass(frozen=True)
class LatencySession:
    """One process: per round, the median latency of the calls of each variant, shape (rounds,), any unit.

    `ref` and `aa` are two loads of the reference model (`aa` is the control), `cand` is the candidate.
    """

    ref: NDArray[np.float64]
    aa: NDArray[np.float64]
    cand: NDArray[np.float64]

    def __post_init__(self) -> None:
        shapes = {np.shape(self.ref), np.shape(self.aa), np.shape(self.cand)}
        if shapes != {(np.size(self.ref),)} or not np.size(self.ref):
            raise ValueError(f"a session needs three arrays of one shape (rounds,), got {sorted(shapes)}")

    @property
    def timed(self) -> bool:
        """Whether every value is finite and above 0 (a coarse clock reads 0 for a short call)."""
        values = np.concatenate([self.ref, self.aa, self.cand])
        return bool(np.isfinite(values).all() and (values > 0).all())


@dataclass(frozen=True)
class Ratio:
    """Latency over the reference's: estimate, one-sided bounds, and rounds dropped as outliers."""

    ratio: float
    lo: float
    hi: float
    dropped: int


@dataclass(frozen=True)
class LatencyVerdict:
    """The latency check. `level` is the nominal level of each one-sided bound."""

    candidate: Ratio | None
    control: Ratio | None
    level: float
    restarts: int
    verdict: Verdict
    reason: str

    def check(self, max_ratio: float) -> Check:
        """As a line of the gate; its numbers are not told again in the note."""
        ratio = self.candidate
        note = self.reason if ratio is None else self.reason.removeprefix(_text(ratio)).lstrip(": ")
        return Check(
            name="latency over reference",
            measured=None if ratio is None else ratio.ratio,
            limit=max_ratio,
            interval=None if ratio is None else (ratio.lo, ratio.hi),
            verdict=self.verdict,
            unit="ratio",
            note=note,
        )


@dataclass(frozen=True)
class LatencyLimits:
    """`restarts` processes at the first look, `RESTARTS_PER_LOOK` more for each further look."""

    max_ratio: float = 1.05
    aa_limit: float = 1.03
    confidence: float = 0.99
    restarts: int = 3
    max_restarts: int = 5
    seed: int = 0

    @property
    def looks(self) -> tuple[int, ...]:
        """Number of restarts at each planned look."""
        last = max(self.restarts, self.max_restarts)
        return tuple(range(self.restarts, last + 1, RESTARTS_PER_LOOK))


def log_ratios(values: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(values / reference) of the rounds that are kept, shape (kept,).

    A round is dropped when it lies more than `MAD_LIMIT` median absolute deviations from the median.
    """
    x = np.log(np.asarray(values, float)) - np.log(np.asarray(reference, float))
    distance = np.abs(x - np.median(x))
    kept: NDArray[np.float64] = x[distance <= max(MAD_LIMIT * float(np.median(distance)), SMALLEST_DEVIATION)]
    return kept


def cluster_bootstrap(
    sessions: Sequence[NDArray[np.float64]], rng: np.random.Generator, replicates: int
) -> NDArray[np.float64]:
    """Replicates of the mean of session medians, shape (replicates,).

    Two levels: sessions are drawn with replacement, and the rounds inside every drawn session again,
    because layout and placement are fixed for a process and rounds of one process are not independent.
    """
    count = len(sessions)
    drawn = rng.integers(0, count, (replicates, count))
    medians = np.empty((replicates, count))
    for index, rounds in enumerate(sessions):
        places = drawn == index
        medians[places] = _resampled_medians(rounds, rng, int(places.sum()))
    means: NDArray[np.float64] = medians.mean(axis=1)
    return means


def _resampled_medians(
    values: NDArray[np.float64], rng: np.random.Generator, count: int
) -> NDArray[np.float64]:
    """Medians of `count` resamples of `values` with replacement, shape (count,).

    A resample of n values is n uniform numbers in [0, 1) that index the sorted values. Its median needs the
    middle one (n odd) or the middle two (n even) in order of size, and those have a known distribution:
    Beta(k, n - k + 1) for the k-th, and the next one is the smallest of the n - k numbers above it.
    """
    n, ordered = len(values), np.sort(values)
    k = (n + 1) // 2
    lower = rng.beta(k, n - k + 1, count)
    upper = lower
    if n % 2 == 0:
        upper = 1 - (1 - lower) * rng.random(count) ** (1 / (n - k))
    row, next_row = (np.minimum((place * n).astype(int), n - 1) for place in (lower, upper))
    medians: NDArray[np.float64] = (ordered[row] + ordered[next_row]) / 2
    return medians


def _ratio(
    sessions: Sequence[LatencySession], variant: str, level: float, rng: np.random.Generator, replicates: int
) -> Ratio:
    kept = [log_ratios(getattr(session, variant), session.ref) for session in sessions]
    means = cluster_bootstrap(kept, rng, replicates)
    estimate = float(np.mean([np.median(x) for x in kept]))
    lo, hi = np.quantile(means, [1 - level, level])
    dropped = sum(len(session.ref) - len(x) for session, x in zip(sessions, kept, strict=True))
    return Ratio(math.exp(estimate), math.exp(lo), math.exp(hi), dropped)


def latency_verdict(
    sessions: Sequence[LatencySession],
    *,
    max_ratio: float,
    aa_limit: float = 1.03,
    confidence: float = 0.99,
    looks: int = 1,
    seed: int = 0,
    replicates: int = 4000,
) -> LatencyVerdict:
    """Judge sessions by the ratio of candidate to reference.

    In this order: UNUSABLE when a latency is not a positive number, when more than `MAX_DROPPED_SHARE` of
    the rounds of a variant were dropped, or when the control's interval lies wholly outside
    [1/`aa_limit`, `aa_limit`]; FAIL when the lower bound is above `max_ratio`; PASS when the upper bound is
    not; else INCONCLUSIVE. The bounds are one-sided, each at level ``1 - (1 - confidence) / looks``
    (Bonferroni over the planned looks).

    The level is nominal. With n sessions the lower bound is hardly below the fastest session, so a candidate
    whose true ratio *equals* the limit fails in about 2**-n of the runs when rounds are quiet (1/8 at 3
    restarts) and in 1 % when they are noisy (5 %). Away from the limit errors vanish: with a between-session
    deviation of 1.3 %, no false FAIL in 300 simulated runs of identical models at limits of 1.02 and 1.05.

    Args:
        looks: number of times the data may be looked at, see `run_latency_gate`.
        seed: of the bootstrap; the same sessions and seed give the same verdict.
        replicates: of the bootstrap; at least 4000, so that a bound at level 0.9975 rests on 10 of them.

    Raises:
        ValueError: fewer than two sessions; `replicates` or `looks` too small.
    """
    if len(sessions) < 2 or replicates < 4000 or looks < 1:
        got = (len(sessions), replicates, looks)
        raise ValueError(f"need at least 2 sessions, 4000 replicates and 1 look; got {got}")
    level = 1 - (1 - confidence) / looks
    if not all(session.timed for session in sessions):
        reason = "a measured latency is not a positive number; the clock is too coarse for this model"
        return LatencyVerdict(None, None, level, len(sessions), "UNUSABLE", reason)
    rng = np.random.default_rng([seed & 0xFFFFFFFF, len(sessions)])
    candidate = _ratio(sessions, "cand", level, rng, replicates)
    control = _ratio(sessions, "aa", level, rng, replicates)
    rounds, dropped = sum(len(session.ref) for session in sessions), max(candidate.dropped, control.dropped)
    verdict: Verdict
    if dropped > MAX_DROPPED_SHARE * rounds:
        verdict = "UNUSABLE"
        reason = f"{dropped} of {rounds} rounds are outliers; the machine is too busy"
    elif control.lo > aa_limit or control.hi < 1 / aa_limit:
        verdict = "UNUSABLE"
        band = f"{1 / aa_limit:.3f} to {aa_limit:.3f}"
        reason = f"the reference against itself reads {_text(control)}, wholly outside {band}"
    elif candidate.lo > max_ratio:
        verdict, reason = "FAIL", f"{_text(candidate)}: slower than {max_ratio:g} times the reference"
    elif candidate.hi <= max_ratio:
        verdict, reason = "PASS", f"{_text(candidate)}: within {max_ratio:g} times the reference"
    else:
        verdict = "INCONCLUSIVE"
        reason = f"{_text(candidate)} includes the limit {max_ratio:g}; more restarts narrow it"
    return LatencyVerdict(candidate, control, level, len(sessions), verdict, reason)


def _text(ratio: Ratio) -> str:
    return f"{ratio.ratio:.3f} [{ratio.lo:.3f}, {ratio.hi:.3f}]"


def run_latency_gate(
    session_runner: Callable[[int], LatencySession], limits: LatencyLimits
) -> LatencyVerdict:
    """Run sessions and judge them; two restarts more after INCONCLUSIVE or UNUSABLE, up to `max_restarts`.

    Args:
        session_runner: runs one session in a fresh process; its argument is the session's seed,
            ``limits.seed * 100 + index``.
    """
    sessions: list[LatencySession] = []
    looks = limits.looks
    for restarts in looks:
        while len(sessions) < restarts:
            sessions.append(session_runner(limits.seed * 100 + len(sessions)))
        verdict = latency_verdict(
            sessions,
            max_ratio=limits.max_ratio,
            aa_limit=limits.aa_limit,
            confidence=limits.confidence,
            looks=len(looks),
            seed=limits.seed,
        )
        if verdict.verdict in ("PASS", "FAIL"):
            break
    return verdict
