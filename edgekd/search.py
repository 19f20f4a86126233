"""Evolution of students under a budget. Knows tuples of integers, not networks.

The trajectory is a function of the seed and of what `evaluate` returns. A caller that stores evaluations
can therefore resume by running the search again: stored candidates cost nothing and the path is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.errors import InfeasibleBudgetError
from edgekd.ranking import Values, groups, rank_sum, ranks

Genome = tuple[int, ...]
_HOPELESS = -1e6  # objective of a candidate outside the budget, which is never scored


@dataclass(frozen=True)
class Limits:
    """Upper limits of a candidate; None is no limit."""

    latency_ms: float | None
    size_mib: float | None
    macs: int | None


@dataclass(frozen=True)
class Candidate:
    """One student: what it costs and, when it fits the budget, the terms of its training-free score."""

    genome: Genome
    parameters: int
    macs: int
    latency_ms: float | None
    size_mib: float
    terms: dict[str, float]

    def excess(self, limits: Limits) -> dict[str, float]:
        """Relative excess over each limit that is broken: 0.1 is 10 % too much."""
        pairs = {
            "latency": (self.latency_ms, limits.latency_ms),
            "size": (self.size_mib, limits.size_mib),
            "MACs": (self.macs, limits.macs),
        }
        return {
            name: got / limit - 1
            for name, (got, limit) in pairs.items()
            if got is not None and limit is not None and got > limit
        }


@dataclass(frozen=True)
class Found:
    """Everything that was evaluated, in order, each genome once; indices point into `candidates`."""

    candidates: tuple[Candidate, ...]
    feasible: tuple[bool, ...]
    score: tuple[float | None, ...]
    generation: tuple[int, ...]
    chosen: int
    by_macs: int
    by_parameters: int
    dropped: int


def search(
    choices: Sequence[int],
    evaluate: Callable[[Genome], Candidate],
    limits: Limits,
    *,
    evaluations: int,
    population: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Constrained NSGA-II (Deb et al. 2002) over score and latency, by Optuna.

    Raises:
        InfeasibleBudgetError: no candidate meets the budget; names the nearest one and what binds.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.NSGAIISampler(population_size=population, seed=seed),
    )
    names = [f"gene{index:02d}" for index in range(len(choices))]
    for level in (0.0, 0.5, 1.0):  # the smallest, a middling and the largest design of the space
        start = [round(level * (options - 1)) for options in choices]
        study.enqueue_trial(dict(zip(names, start, strict=True)))
    met: dict[Genome, int] = {}
    candidates: list[Candidate] = []
    for number in range(evaluations):
        trial = study.ask()
        genome = tuple(
            trial.suggest_int(name, 0, options - 1) for name, options in zip(names, choices, strict=True)
        )
        if genome not in met:
            met[genome] = number // population
            candidates.append(evaluate(genome))
        candidate = candidates[list(met).index(genome)]
        excess = sum(candidate.excess(limits).values())
        trial.set_constraint("budget", excess)
        score = _objective(candidate, candidates[:population]) if excess == 0 else _HOPELESS
        cost = candidate.macs if candidate.latency_ms is None else candidate.latency_ms
        study.tell(trial, [score, cost])
        progress(number + 1, evaluations)
    return _conclude(candidates, list(met.values()), limits)


def _objective(candidate: Candidate, reference: Sequence[Candidate]) -> float:
    """Mean of the score's terms, each in standard deviations of the first generation; of several scores,
    each counts alike."""
    if not candidate.terms:
        return _HOPELESS
    values = {}
    for name, value in candidate.terms.items():
        known = [c.terms[name] for c in reference if name in c.terms]
        spread = float(np.std(known)) if len(known) > 1 else 0.0
        values[name] = (value - float(np.mean(known))) / spread if spread > 0 else 0.0
    return float(np.mean([np.mean([values[n] for n in names]) for names in groups(list(values)).values()]))


def _conclude(candidates: list[Candidate], generation: list[int], limits: Limits) -> Found:
    usable = [not c.excess(limits) and bool(c.terms) for c in candidates]
    if not any(usable):
        raise _infeasible(candidates, limits)
    rows = [i for i, ok in enumerate(usable) if ok]
    score: list[float | None] = [None] * len(candidates)
    combined = rank_sum([candidates[i].terms for i in rows])
    for row, value in zip(rows, combined, strict=True):
        score[row] = float(value)
    return Found(
        tuple(candidates),
        tuple(not c.excess(limits) for c in candidates),
        tuple(score),
        tuple(generation),
        chosen=choose([candidates[i] for i in rows], combined, rows),
        by_macs=max(rows, key=lambda i: candidates[i].macs),
        by_parameters=max(rows, key=lambda i: candidates[i].parameters),
        dropped=sum(not c.terms and not c.excess(limits) for c in candidates),
    )


def choose(candidates: Sequence[Candidate], score: Sequence[float] | Values, rows: Sequence[int]) -> int:
    """The row with the highest sum of two ranks: score and MACs.

    MACs take part because they are the stronger predictor wherever sizes vary freely; the score decides
    among students of like size (docs/decisions/0002-search-score.md).
    """
    merit = ranks(score) + ranks([c.macs for c in candidates])
    return rows[int(np.argmax(merit))]


def _infeasible(candidates: list[Candidate], limits: Limits) -> InfeasibleBudgetError:
    scored = [c for c in candidates if not c.excess(limits)]
    if scored:
        return InfeasibleBudgetError(
            f"none of {len(scored)} students within the budget got a finite score",
            "check the teacher and its input normalisation (--mean, --std)",
        )
    nearest = min(candidates, key=lambda c: sum(c.excess(limits).values()))
    binds = ", ".join(f"{name} is {100 * by:.0f} % over" for name, by in nearest.excess(limits).items())
    latency = "unknown" if nearest.latency_ms is None else f"{nearest.latency_ms:.3g} ms"
    needs = []
    if limits.latency_ms is not None and nearest.latency_ms is not None:
        needs.append(f"--max-latency-ms {_round_up(nearest.latency_ms)}")
    if limits.size_mib is not None:
        needs.append(f"--max-size-mib {_round_up(nearest.size_mib)}")
    if limits.macs is not None and nearest.macs > limits.macs:
        needs.append(f"a budget.max_macs_ratio {_round_up(nearest.macs / limits.macs)} times the present one")
    return InfeasibleBudgetError(
        f"no student of {len(candidates)} meets the budget; the nearest is predicted at {latency}, "
        f"{nearest.size_mib:.3g} MiB, {nearest.macs / 1e6:.3g} MMACs: {binds}",
        "feasible from about " + " ".join(needs),
    )


def _round_up(value: float) -> str:
    """Two significant digits, never below `value`."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step) * step:.6g}"
