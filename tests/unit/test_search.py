"""The search: a function of its seed and of what it is told, within the budget or with a reason."""

from __future__ import annotations

import gc
import json
import re
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from edgekd.errors import InfeasibleBudgetError
from edgekd.recipe import load_recipe
from edgekd.search import Candidate, Effort, Found, Genome, Limits, choose, front_in_words, search
from edgekd.stages.search import _leave, _stored, score_of
from edgekd.target import find_target

if TYPE_CHECKING:
    from edgekd.stages.bench import Bench

CHOICES = (4, 3, 2, 5, 3)
UNLIMITED = Limits(None, None, None)


def candidate(genome: Genome, **changes: Any) -> Candidate:
    """Everything grows with the genes; the score likes a middling one."""
    size = sum(genome)
    found: dict[str, Any] = {
        "parameters": 1000 * (1 + size),
        "macs": 10_000 * (1 + size) + 7 * genome[0],
        "latency_ms": 0.1 * (1 + size),
        "memory_mib": 0.02 * (1 + size),
        "size_mib": 0.01 * (1 + size),
        "terms": {"relation": -((size - 6.5) ** 2), "semantic": -1e-3 * genome[-1]},
    }
    return Candidate(genome, **(found | changes))


def run(evaluate: Any = candidate, limits: Limits = UNLIMITED, **changes: Any) -> Found:
    options = {"evaluations": 40, "population": 8, "seed": 0} | changes

    def batch(genomes: Sequence[Genome]) -> list[Candidate]:
        return [evaluate(genome) for genome in genomes]

    choices = options.pop("choices", CHOICES)
    progress = options.pop("progress", lambda done, total, front: None)
    return search(choices, batch, limits, Effort(**options), progress)


def genomes(found: Found) -> list[Genome]:
    return [each.genome for each in found.candidates]


def test_the_same_seed_walks_the_same_path() -> None:
    assert run() == run()
    assert genomes(run()) != genomes(run(seed=1))


@pytest.mark.parametrize("algorithm", ["nsga2", "aging"])
def test_a_space_of_one_student_has_it_found(algorithm: str) -> None:
    found = run(choices=(1, 1, 1, 1, 1), algorithm=algorithm)
    assert (genomes(found), found.chosen, found.front) == ([(0, 0, 0, 0, 0)], 0, (0,))


def test_the_smallest_a_middling_and_the_largest_come_first() -> None:
    first = genomes(run())[:3]
    assert first[0] == (0,) * 5
    assert first[2] == tuple(options - 1 for options in CHOICES)
    assert sum(first[0]) < sum(first[1]) < sum(first[2])


def test_no_student_is_evaluated_twice() -> None:
    asked: list[Genome] = []

    def counting(genome: Genome) -> Candidate:
        asked.append(genome)
        return candidate(genome)

    found = run(counting, evaluations=120)
    assert len(asked) == len(set(asked)) == len(found.candidates)


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_search_that_was_cut_off_continues_on_its_path(cut: int) -> None:
    stored: dict[Genome, Candidate] = {}
    fresh: list[Genome] = []

    def remembering(genome: Genome) -> Candidate:
        if genome not in stored:
            if len(stored) == cut and not fresh:
                raise KeyboardInterrupt
            fresh.append(genome)
            stored[genome] = candidate(genome)
        return stored[genome]

    with pytest.raises(KeyboardInterrupt):
        for _ in range(cut + 1):  # each start gets one student further
            fresh.clear()
            run(lambda genome: stored.setdefault(genome, candidate(genome)) if len(stored) < cut else _stop())
    before = len(stored)
    fresh.append((0,))
    found = run(remembering)
    assert found == run()
    assert len(fresh) - 1 == len(found.candidates) - before


def _stop() -> Candidate:
    raise KeyboardInterrupt


def test_every_student_belongs_to_the_space() -> None:
    for genome in genomes(run(evaluations=100)):
        assert len(genome) == len(CHOICES)
        assert all(0 <= gene < options for gene, options in zip(genome, CHOICES, strict=True))


def test_a_space_of_one_student_gives_that_student() -> None:
    found = run(choices=(1, 1, 1, 1, 1), evaluations=10)
    assert genomes(found) == [(0,) * 5]
    assert (found.chosen, found.by_macs, found.by_parameters) == (0, 0, 0)


def test_a_space_smaller_than_the_effort_is_searched_whole() -> None:
    found = run(choices=(3, 2, 4, 1, 1), evaluations=100)
    assert len(set(genomes(found))) == len(found.candidates) == 24


def test_a_batch_is_a_generation_and_the_same_whoever_evaluates_it() -> None:
    sizes: list[int] = []

    def batch(asked: Sequence[Genome]) -> list[Candidate]:
        sizes.append(len(asked))
        return [candidate(genome) for genome in reversed(asked)][::-1]

    found = search(CHOICES, batch, UNLIMITED, Effort(40, 8, 0))
    assert sizes[0] == 11
    assert max(sizes[1:]) <= 8
    assert found == run()


def test_the_front_holds_those_that_nothing_beats_in_both() -> None:
    found = run(evaluations=100)
    points = [(each.latency_ms, score) for each, score in zip(found.candidates, found.score, strict=True)]
    for row in found.front:
        cost, score = points[row]
        assert not any(
            c <= cost and s >= score and (c, s) != (cost, score)  # type: ignore[operator]
            for c, s in points
        )
    costs = [points[row][0] for row in found.front]
    assert costs == sorted(costs)  # type: ignore[type-var]


# ---------------------------------------------------------------- aging evolution


def test_aging_evolution_improves_on_its_first_population() -> None:
    """Of five genes with a best value each, it finds nearly all; random draws of the same number do not."""

    def target(genome: Genome) -> Candidate:
        right = sum(gene == want for gene, want in zip(genome, (3, 1, 4, 0, 2, 5, 1, 0), strict=True))
        return candidate(genome, terms={"a": float(right)})

    found = run(target, choices=(6,) * 8, evaluations=400, population=20, algorithm="aging")
    best = max(each.terms["a"] for each in found.candidates)
    first = max(each.terms["a"] for each in found.candidates[:20])
    assert best >= 7 > first


def test_aging_evolution_is_a_function_of_its_seed_and_keeps_the_budget() -> None:
    limits = Limits(0.9, None, None)
    one, same, other = (run(limits=limits, evaluations=80, seed=s, algorithm="aging") for s in (0, 0, 1))
    assert one == same
    assert genomes(one) != genomes(other)
    assert not one.candidates[one.chosen].excess(limits)


def test_a_child_differs_from_its_parent_in_one_gene() -> None:
    found = run(evaluations=60, population=6, algorithm="aging")
    for index, child in enumerate(genomes(found)[6:], 6):
        known = genomes(found)[:index]
        assert min(sum(a != b for a, b in zip(child, each, strict=True)) for each in known) == 1


def test_progress_tells_the_front_that_the_search_ends_with() -> None:
    told: list[str] = []
    found = run(evaluations=24, progress=lambda done, total, front: told.append(front))
    costs = [found.candidates[row].latency_ms or 0.0 for row in found.front]
    assert told[-1] == f"front of {len(costs)}: {costs[0]:.3g} to {costs[-1]:.3g} ms"
    assert front_in_words([], UNLIMITED) == "none within the budget yet"
    one = candidate((1, 1, 1, 1, 1), latency_ms=None)
    assert front_in_words([one], UNLIMITED) == "front of 1: 0.06 to 0.06 MMACs"


def test_progress_counts_all_evaluations() -> None:
    seen: list[tuple[int, int]] = []
    run(evaluations=24, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(11, 24), (19, 24), (24, 24)]  # generation by generation, the first with its three starts


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["nsga2", "aging"])
def test_memory_grows_by_no_more_than_what_is_kept_of_a_candidate(algorithm: str) -> None:
    """A candidate with its genome and terms takes about 0.7 KiB, NSGA-II's record of an evaluation 3 KiB; one
    that kept its network, its maps or a row beside every other candidate would take far more."""

    def peak(evaluations: int) -> int:
        gc.collect()
        tracemalloc.start()
        run(evaluations=evaluations, choices=(6,) * 10, algorithm=algorithm)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(16)  # imports the optimiser
    assert (peak(400) - peak(100)) / 300 < 6 * 1024


# ---------------------------------------------------------------- budget


@pytest.mark.parametrize(
    "limits",
    [
        Limits(0.6, None, None),
        Limits(None, 0.05, None),
        Limits(None, None, 55_000),
        Limits(None, None, None, 0.1),
    ],
)
def test_the_chosen_student_keeps_the_budget(limits: Limits) -> None:
    found = run(limits=limits, evaluations=80)
    assert not found.candidates[found.chosen].excess(limits)
    assert found.feasible == tuple(not each.excess(limits) for each in found.candidates)
    assert all((score is None) or ok for score, ok in zip(found.score, found.feasible, strict=True))


def test_a_student_without_known_latency_is_not_held_against_a_latency_limit() -> None:
    found = run(lambda genome: candidate(genome, latency_ms=None), Limits(0.6, None, None))
    assert all(found.feasible)


def test_excess_is_relative_to_each_limit() -> None:
    one = candidate((0, 0, 0, 0, 0))
    assert one.excess(Limits(0.05, 0.005, 5000)) == pytest.approx({"latency": 1, "size": 1, "MACs": 1})
    assert one.excess(Limits(0.1, 0.01, 10_000)) == {}


def test_a_budget_that_nobody_meets_names_the_nearest_and_what_binds() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        run(limits=Limits(0.05, 1.0, None))
    message = caught.value.message
    assert "no student of" in message
    assert "0.1 ms" in message  # of the smallest student
    assert message.endswith(": latency 0.1 ms (limit 0.05 ms), size 0.01 MiB, MACs 0.01 M, memory 0.02 MiB")
    assert caught.value.hint == "feasible from about --max-latency-ms 0.1"  # not what the size already meets
    assert caught.value.exit_code == 14


def test_the_hint_of_an_infeasible_budget_is_feasible() -> None:
    teacher = 1_000_000
    tight = Limits(0.011, 0.0033, 700, 0.00041, teacher)
    with pytest.raises(InfeasibleBudgetError) as caught:
        run(limits=tight)
    numbers = [float(number) for number in re.findall(r"[ =](\d[\d.e-]*)", caught.value.hint)]
    latency_ms, size_mib, macs_ratio, memory_mib = numbers
    limits = Limits(latency_ms, size_mib, int(macs_ratio * teacher), memory_mib)
    run(limits=limits)


# ---------------------------------------------------------------- scores


def test_students_without_a_finite_score_are_dropped_and_counted() -> None:
    def moody(genome: Genome) -> Candidate:
        return candidate(genome, terms={}) if genome[1] == 0 else candidate(genome)

    found = run(moody)
    without = [index for index, each in enumerate(found.candidates) if not each.terms]
    assert found.dropped == len(without) > 0
    assert all(found.score[index] is None for index in without)
    assert found.chosen not in without


def test_the_dropped_are_counted_where_the_student_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    target = find_target("jetson")
    reporter = SimpleNamespace(say=said.append)
    bench: Any = SimpleNamespace(
        run=SimpleNamespace(target=target, folder=tmp_path, reporter=reporter),
        recipe=load_recipe(None, {}),
        space=SimpleNamespace(describe=lambda genome: ("one block",)),
    )
    for found in (run(lambda genome: candidate(genome, terms={} if genome[1] == 0 else {"a": 1.0})), run()):
        _leave(bench, found, {"chosen": found.chosen, "latency_measured_ms": None}, "roofline")
        told = f", {found.dropped} left out without a finite score"
        assert said[-1].endswith(told if found.dropped else "candidates")
    assert "left out" in said[0]


def test_without_any_finite_score_the_normalisation_is_suspected() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        run(lambda genome: candidate(genome, terms={}))
    assert "got a finite score" in caught.value.message
    assert "--mean" in caught.value.hint


def test_students_outside_the_budget_need_no_score() -> None:
    limits = Limits(0.6, None, None)

    def thrifty(genome: Genome) -> Candidate:
        made = candidate(genome)
        return candidate(genome, terms={}) if made.excess(limits) else made

    found = run(thrifty, limits)
    assert found.dropped == 0
    assert not all(found.feasible)


def test_baselines_are_the_largest_within_the_budget() -> None:
    limits = Limits(0.8, None, None)
    found = run(limits=limits, evaluations=80)
    inside = [each for each, ok in zip(found.candidates, found.feasible, strict=True) if ok]
    assert found.candidates[found.by_macs].macs == max(each.macs for each in inside)
    assert found.candidates[found.by_parameters].parameters == max(each.parameters for each in inside)


def test_terms_of_very_different_scale_count_alike() -> None:
    def scaled(genome: Genome) -> Candidate:
        terms = candidate(genome).terms
        return candidate(genome, terms={"relation": 1e9 * terms["relation"], "semantic": terms["semantic"]})

    assert run(scaled).score == run().score


def test_among_students_of_like_size_the_score_decides() -> None:
    same = [candidate((0, 0, 0, 0, 0)) for _ in range(3)]
    assert choose(same, [0.1, 0.9, 0.5], [4, 7, 9]) == 7


def test_among_students_of_like_score_the_larger_is_chosen() -> None:
    sizes = [candidate((gene, 0, 0, 0, 0)) for gene in range(3)]
    assert choose(sizes, [0.5, 0.5, 0.5], [0, 1, 2]) == 2


# ---------------------------------------------------------------- stored evaluations


def _bench(started: str | None = None, budget: float = 1.0, target: str = "x86", device: str = "cpu") -> Any:
    recipe = {"seed": 0, "search": {"evaluations": 8}, "budget": {"max": budget}, "quantize": {"mode": "qat"}}
    teacher = {"inputs_sha256": "abc", "outputs_sha256": "def"}
    record: dict[str, Any] = {"stages": {"teacher": teacher}, "recipe": recipe}
    if started is not None:
        record["search_started"] = started
    run = SimpleNamespace(record=record, save=lambda: None, target=target)
    return SimpleNamespace(run=run, recipe=load_recipe(None, {}), device=device)


def _costs(line: dict[str, float] | None = None, kind: str = "layer-table") -> Any:
    table = None if line is None else SimpleNamespace(line=line, entries_ms={"empty": 0.5})
    return SimpleNamespace(kind=kind, device="a board", table=table)


def _store(path: Path, bench: Any, *lines: str) -> str:
    assert _stored(path, bench, _costs()) == {}
    path.write_text("\n".join(lines))
    return str(bench.run.record["search_started"])


def _row(*genome: int) -> str:
    return json.dumps(asdict(candidate(genome)))


def test_stored_evaluations_are_used_up_to_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    rows = [_row(0, 0, 0, 0, 0), _row(1, 0, 1, 0, 1)]
    key = _store(path, _bench(), *rows, rows[0][:30])
    known = _stored(path, _bench(key), _costs())
    assert list(known.values()) == [candidate((0, 0, 0, 0, 0)), candidate((1, 0, 1, 0, 1))]
    assert path.read_text() == "\n".join(rows) + "\n"


@pytest.mark.parametrize("change", [{"budget": 2.0}, {"target": "jetson"}, {"device": "cuda"}])
def test_evaluations_for_another_budget_device_or_score_are_not_used(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """Beyond a budget nothing was scored: reused under a wider one, such students would look hopeless."""
    path = tmp_path / "search.jsonl"
    key = _store(path, _bench(), _row(0, 0, 0, 0, 0))
    assert _stored(path, _bench(key, **change), _costs()) == {}
    assert not path.exists()


@pytest.mark.parametrize("model", [_costs({"slope": 1.0}), _costs(kind="roofline")])
def test_evaluations_with_other_predicted_costs_are_not_used(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    key = _store(path, _bench(), _row(0, 0, 0, 0, 0))
    assert _stored(path, _bench(key), model) == {}


@pytest.mark.parametrize(
    ("asked", "device", "score"),
    [("auto", "cpu", "diswot"), ("auto", "cuda", "nwot"), ("synflow", "cuda", "synflow")],
)
def test_the_score_is_the_one_asked_for_or_goes_by_what_trains(asked: str, device: str, score: str) -> None:
    recipe = load_recipe(None, {"search.score": asked})
    assert score_of(cast("Bench", SimpleNamespace(recipe=recipe, device=device))) == score


def test_of_a_sum_each_score_counts_alike() -> None:
    """Three terms of one score against one of another: the outcome is that of their mean."""

    def several(genome: Genome) -> Candidate:
        value = float(genome[0] - 3 * genome[1])
        return candidate(genome, terms={"a.x": value, "a.y": value, "a.z": value, "b": -value})

    found = run(several)
    assert all(score == pytest.approx(0.5) for score in found.score)
