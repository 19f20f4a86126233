"""Evolution of students under a budget. Knows tuples of integers, not networks.

The trajectory is a function of the seed and of what `evaluate` returns. A caller that stores evaluations
can therefore resume by running the search again: stored candidates cost nothing and the path is the same.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgekd.errors import InfeasibleBudgetError
from edgekd.ranking import Values, groups, rank_sum, ranks

Genome = tuple[int, ...]
_HOPELESS = -1e6  # objective of a candidate outside the budget, which is never scored


@dataclass(frozen=True)
class Limits:
    """Upper limits of a candidate; None is no limit. That of `macs` is a share of `teacher_macs`."""

    latency_ms: float | None
    size_mib: float | None
    macs: int | None
    memory_mib: float | None = None
    teacher_macs: int | None = None


@dataclass(frozen=True)
class Effort:
    """`evaluations` in all, `population` of them a generation."""

    evaluations: int
    population: int
    seed: int
    algorithm: str = "nsga2"


@dataclass(frozen=True)
class Candidate:
    """One student: what it costs and, when it fits the budget, the terms of its training-free score."""

    genome: Genome
    parameters: int
    macs: int
    latency_ms: float | None
    size_mib: float
    terms: dict[str, float]
    memory_mib: float = 0.0  # at run time: weights and the largest maps that are needed together

    def excess(self, limits: Limits) -> dict[str, float]:
        """Relative excess over each limit that is broken: 0.1 is 10 % too much."""
        pairs = {
            "latency": (self.latency_ms, limits.latency_ms),
            "size": (self.size_mib, limits.size_mib),
            "MACs": (self.macs, limits.macs),
            "memory": (self.memory_mib, limits.memory_mib),
        }
        return {
            name: got / limit - 1
            for name, (got, limit) in pairs.items()
            if got is not None and limit is not None and got > limit
        }


@dataclass(frozen=True)
class Found:
    """Everything that was evaluated, in order, each genome once; indices point into `candidates`. `front`:
    those within the budget that no other one beats in both score and cost, the cheapest first."""

    candidates: tuple[Candidate, ...]
    feasible: tuple[bool, ...]
    score: tuple[float | None, ...]
    generation: tuple[int, ...]
    chosen: int
    by_macs: int
    by_parameters: int
    dropped: int
    front: tuple[int, ...] = ()


def search(
    choices: Sequence[int],
    evaluate: Callable[[Sequence[Genome]], Sequence[Candidate]],
    limits: Limits,
    effort: Effort,
    progress: Callable[[int, int, str], None] = lambda done, total, front: None,
) -> Found:
    """The students found by an algorithm of `ALGORITHMS`; of a space of no more than `effort.evaluations`
    students all are evaluated. `evaluate` gets new genomes in batches, a generation at most.

    Raises:
        InfeasibleBudgetError: no candidate meets the budget; names the nearest one and what binds.
    """
    population, total = effort.population, min(effort.evaluations, math.prod(choices))
    method: _Algorithm = _Exhaustive(choices, population)
    if total < math.prod(choices):
        method = ALGORITHMS[effort.algorithm](choices, population, effort.seed)
    met: dict[Genome, tuple[int, Candidate]] = {}  # generation and candidate
    asked, front = 0, "none within the budget yet"
    reference: dict[Genome, Candidate] = {}
    while asked < total:
        genomes = method.ask(total - asked)
        fresh = [genome for genome in dict.fromkeys(genomes) if genome not in met]
        for genome, candidate in zip(fresh, evaluate(fresh), strict=True):
            met[genome] = (asked // population, candidate)
        for genome in genomes:
            candidate = met[genome][1]
            reference.setdefault(genome, candidate)
            excess = sum(candidate.excess(limits).values())
            scale = list(itertools.islice(reference.values(), population))  # the first generation, so far
            score = _objective(candidate, scale) if excess == 0 else _HOPELESS
            method.tell(candidate, score, excess)
        before, asked = asked, asked + len(genomes)
        if before // population < asked // population or asked == total:  # once a generation
            front = front_in_words([candidate for _, candidate in met.values()], limits)
        progress(asked, total, front)
    found = list(met.values())
    return _conclude([candidate for _, candidate in found], [number for number, _ in found], limits)


class _Algorithm(Protocol):
    """Genomes to evaluate, and what became of each, in their order."""

    def ask(self, count: int) -> list[Genome]:
        """The next genomes, `count` at most."""

    def tell(self, candidate: Candidate, score: float, excess: float) -> None:
        """`excess`: relative, over all limits; 0 is within the budget."""


def _starts(choices: Sequence[int]) -> list[Genome]:
    """The smallest, a middling and the largest design of the space."""
    levels = (0.0, 0.5, 1.0)
    return [tuple(round(level * (options - 1)) for options in choices) for level in levels]


class _Exhaustive:
    """Every student of a small space, in order."""

    def __init__(self, choices: Sequence[int], population: int) -> None:
        self._all = itertools.product(*(range(options) for options in choices))
        self._population = population

    def ask(self, count: int) -> list[Genome]:
        return list(itertools.islice(self._all, min(count, self._population)))

    def tell(self, candidate: Candidate, score: float, excess: float) -> None: ...


class _Nsga2:
    """Constrained NSGA-II (Deb et al. 2002) over score and latency, by Optuna; a batch is a generation."""

    def __init__(self, choices: Sequence[int], population: int, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._choices, self._population = choices, population
        sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        self._study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        self._names = [f"gene{index:02d}" for index in range(len(choices))]
        for start in _starts(choices):
            self._study.enqueue_trial(dict(zip(self._names, start, strict=True)))
        self._next = population + len(_starts(choices))  # Optuna counts no given trial as one of a generation
        self._open: deque[Any] = deque()

    def ask(self, count: int) -> list[Genome]:
        genomes = []
        for _ in range(min(count, self._next)):
            trial = self._study.ask()
            genes = zip(self._names, self._choices, strict=True)
            genomes.append(tuple(trial.suggest_int(name, 0, options - 1) for name, options in genes))
            self._open.append(trial)
        self._next = self._population
        return genomes

    def tell(self, candidate: Candidate, score: float, excess: float) -> None:
        trial = self._open.popleft()
        trial.set_constraint("budget", excess)
        self._study.tell(trial, [score, _cost(candidate)])


class _Aging:
    """Aging evolution (Real et al. 2019, arXiv:1802.01548, algorithm 1) by the score alone: the best of a
    sample of a quarter of the population has one gene changed; the child replaces the oldest. A child beyond
    the budget is rejected, unless nothing within it is known yet."""

    def __init__(self, choices: Sequence[int], population: int, seed: int) -> None:
        self._choices, self._size = choices, population
        self._rng = np.random.default_rng(seed)
        drawn = [tuple(int(self._rng.integers(options)) for options in choices) for _ in range(population)]
        self._first = [*_starts(choices), *drawn][:population]
        self._living: deque[tuple[float, float, Genome]] = deque()

    def ask(self, count: int) -> list[Genome]:
        if self._first:
            batch, self._first = self._first[:count], []
            return batch
        sample = self._rng.integers(len(self._living), size=max(2, self._size // 4))
        parent = max(self._living[index] for index in sample)[2]
        genes = [gene for gene, options in enumerate(self._choices) if options > 1]
        gene = int(self._rng.choice(genes))
        other = int(self._rng.integers(self._choices[gene] - 1))
        child = list(parent)
        child[gene] = other + (other >= parent[gene])
        return [tuple(child)]

    def tell(self, candidate: Candidate, score: float, excess: float) -> None:
        known = len(self._living) >= self._size and any(each[0] == 0 for each in self._living)
        if excess > 0 and known:
            return
        self._living.append((-excess, score, candidate.genome))
        if len(self._living) > self._size:
            self._living.popleft()


ALGORITHMS: dict[str, Callable[[Sequence[int], int, int], _Algorithm]] = {"nsga2": _Nsga2, "aging": _Aging}


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
        front=_front(
            [(_cost(candidates[row]), float(value), row) for row, value in zip(rows, combined, strict=True)]
        ),
    )


def _cost(candidate: Candidate) -> float:
    return candidate.macs if candidate.latency_ms is None else candidate.latency_ms


def _front(points: list[tuple[float, float, int]]) -> tuple[int, ...]:
    """Rows of (cost, score, row) that no other point beats in both, by cost."""
    found: list[int] = []
    best = -math.inf
    for _, score, row in sorted(points, key=lambda point: (point[0], -point[1])):
        if score > best:
            best = score
            found.append(row)
    return tuple(found)


def front_in_words(candidates: Sequence[Candidate], limits: Limits) -> str:
    """How a search stands: how many candidates its front has, and from what to what they cost."""
    usable = [candidate for candidate in candidates if candidate.terms and not candidate.excess(limits)]
    if not usable:
        return "none within the budget yet"
    scores = rank_sum([candidate.terms for candidate in usable]).tolist()
    front = _front(
        [(_cost(each), score, row) for row, (each, score) in enumerate(zip(usable, scores, strict=True))]
    )
    ends = [_cost(usable[row]) for row in (front[0], front[-1])]
    unit, scale = ("MMACs", 1e-6) if usable[0].latency_ms is None else ("ms", 1.0)
    return f"front of {len(front)}: {ends[0] * scale:.3g} to {ends[1] * scale:.3g} {unit}"


def choose(candidates: Sequence[Candidate], score: Sequence[float] | Values, rows: Sequence[int]) -> int:
    """The row with the highest sum of two ranks: score and MACs.

    MACs take part because they are the stronger predictor wherever sizes vary freely; the score decides
    among students of like size (docs/decisions/0002-search-score.md).
    """
    return rows[int(np.argmax(_merit(candidates, score)))]


def merit(found: Found) -> dict[int, float]:
    """What `choose` compares, of each row with a score."""
    rows = [row for row, score in enumerate(found.score) if score is not None]
    values = _merit([found.candidates[row] for row in rows], [found.score[row] or 0.0 for row in rows])
    return dict(zip(rows, values.tolist(), strict=True))


def _merit(candidates: Sequence[Candidate], score: Sequence[float] | Values) -> Values:
    return ranks(score) + ranks([c.macs for c in candidates])


def _infeasible(candidates: list[Candidate], limits: Limits) -> InfeasibleBudgetError:
    scored = [c for c in candidates if not c.excess(limits)]
    if scored:
        return InfeasibleBudgetError(
            f"none of {len(scored)} students within the budget got a finite score",
            "check the teacher and its input normalisation (--mean, --std)",
        )
    nearest = min(candidates, key=lambda c: sum(c.excess(limits).values()))
    excess = nearest.excess(limits)
    parts, needs = [], []
    for name, key, told, option in _BUDGET:
        value, limit = getattr(nearest, key), getattr(limits, key)
        part = f"{name} {'unknown' if value is None else told(value)}"
        parts.append(f"{part} (limit {told(limit)})" if name in excess else part)
        if name in excess:
            share = limits.teacher_macs if name == "MACs" and limits.teacher_macs else 1
            needs.append(option + _round_up(value / share))
    return InfeasibleBudgetError(
        f"no student of {len(candidates)} meets the budget; the nearest, as predicted: {', '.join(parts)}",
        "feasible from about " + " ".join(needs),
    )


# Name, attribute of `Candidate` and of `Limits`, how it is told, and the option that moves the limit.
_BUDGET: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    ("latency", "latency_ms", lambda ms: f"{ms:.3g} ms", "--max-latency-ms "),
    ("size", "size_mib", lambda mib: f"{mib:.3g} MiB", "--max-size-mib "),
    ("MACs", "macs", lambda macs: f"{macs / 1e6:.3g} M", "--set budget.max_macs_ratio="),
    ("memory", "memory_mib", lambda mib: f"{mib:.3g} MiB", "--set budget.max_memory_mib="),
)


def _round_up(value: float) -> str:
    """Two significant digits, never below `value`."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step) * step:.6g}"
