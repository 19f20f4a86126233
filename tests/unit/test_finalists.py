"""Finalists of the search: the measured latency decides, and says so."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from edgekd.errors import InfeasibleBudgetError, MissingExtraError
from edgekd.recipe import load_recipe
from edgekd.run import Silent
from edgekd.search import Candidate, Found, Limits, merit
from edgekd.spaces import search_space
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages import finalists
from edgekd.stages.finalists import measure_finalists
from edgekd.target import find_target

SPEC = ModelSpec(Preprocessing(16, 16, "rgb", (0.5,) * 3, (0.5,) * 3), ("a", "b"))
SPACE = search_space("repvgg", SPEC, 8, (3,), ())


def bench(name: str = "avx2", **overrides: Any) -> Any:
    recipe = load_recipe(None, {key.replace("__", "."): value for key, value in overrides.items()})
    run = SimpleNamespace(target=find_target(name), reporter=Silent())
    return SimpleNamespace(recipe=recipe, run=run, space=SPACE, spec=SPEC)


def population() -> Found:
    """Six students, each slower, larger and of a higher score than the one before: all on the front."""
    genomes = [(0, size % 5, 0, 0, size // 5, 0, 0)[: len(SPACE.choices)] for size in range(6)]
    made = tuple(
        Candidate(genome, 1000 * (1 + n), 10_000 * (1 + n), 0.1 * (1 + n), 0.01, {"score": float(n)})
        for n, genome in enumerate(genomes)
    )
    return Found(made, (True,) * 6, tuple(map(float, range(6))), (0,) * 6, 5, 5, 5, 0, tuple(range(6)))


@pytest.fixture
def factor(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Measured over predicted latency by row, of a device that runs nothing; 2 where not set."""
    factors: dict[int, float] = {}

    def times(variants: Any, shapes: Any, **_: Any) -> dict[str, Any]:
        rows = [int(variant.id) for variant in variants]
        cpu = {str(row): {"cpu": 0.1 * (1 + row) * factors.get(row, 2.0)} for row in rows}
        device = {"devices": {"onnxruntime": "a test"}, "versions": {"onnxruntime": "1"}}
        return {"times": cpu, "environment": device}

    monkeypatch.setattr(finalists, "is_this_machine", lambda target: True)
    monkeypatch.setattr(finalists, "write_network", lambda *_: None)
    monkeypatch.setattr(finalists, "time_layers", times)
    return factors


def test_what_prediction_chose_stays_while_it_is_within(factor: dict[int, float]) -> None:
    row, measured = measure_finalists(bench(), population(), Limits(None, None, None), "fp32")
    assert row == 5
    assert measured is not None
    assert set(measured.measured_ms) == {5, 4, 3}
    assert measured.error_percent(population()) == pytest.approx(50.0)  # half of what was measured
    told = measured.facts(population())["rows"][0]
    assert (told["row"], told["within"]) == (5, True)
    assert [told["predicted_ms"], told["measured_ms"]] == pytest.approx([0.6, 1.2])


def test_a_student_that_measures_beyond_the_budget_is_not_taken(factor: dict[int, float]) -> None:
    factor[4] = 1.1
    changed = bench(budget__max_latency_ms=0.6)
    row, measured = measure_finalists(changed, population(), Limits(0.6, None, None), "fp32")
    assert row == 4  # 5 takes 1.2 ms, 4 takes 0.55, 3 takes 0.8
    assert measured is not None
    assert measured.within == [4]


def test_where_none_is_within_others_are_measured_by_the_corrected_prediction(
    factor: dict[int, float],
) -> None:
    changed = bench(budget__max_latency_ms=0.61)
    row, measured = measure_finalists(changed, population(), Limits(0.61, None, None), "fp32")
    assert row == 2  # twice 0.3 ms
    assert measured is not None
    assert len(measured.measured_ms) == 6


def test_a_budget_that_no_measurement_meets_is_refused_with_what_is_within_reach(
    factor: dict[int, float],
) -> None:
    factor.update(dict.fromkeys(range(6), 50.0))
    changed = bench(budget__max_latency_ms=0.6, search__finalists=2)
    with pytest.raises(InfeasibleBudgetError, match="2 students that were predicted to meet") as caught:
        measure_finalists(changed, population(), Limits(0.6, None, None), "fp32")
    assert "--max-latency-ms 25" in caught.value.hint


def test_a_share_of_the_teachers_prediction_is_judged_by_the_same_scale(factor: dict[int, float]) -> None:
    factor[5] = 2.5
    row, measured = measure_finalists(bench(), population(), Limits(0.6, None, None), "fp32")
    assert measured is not None
    assert measured.limit_ms == pytest.approx(1.2)  # 0.6 predicted, and the device takes twice the prediction
    assert row == 4


@pytest.mark.parametrize("case", ["another machine", "none wanted", "no latency", "no runtime"])
def test_nothing_is_measured_where_nothing_can_be(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise MissingExtraError("no runtime")

    found = population()
    monkeypatch.setattr(finalists, "is_this_machine", lambda target: case != "another machine")
    monkeypatch.setattr(finalists, "_measure", missing)
    if case == "no latency":
        found = replace(found, candidates=tuple(replace(each, latency_ms=None) for each in found.candidates))
    changed = bench(search__finalists=0 if case == "none wanted" else 3)
    assert measure_finalists(changed, found, Limits(None, None, None), "fp32") == (5, None)


def test_merit_is_what_the_search_chooses_by() -> None:
    assert max(merit(population()).items(), key=lambda pair: pair[1])[0] == population().chosen


@pytest.mark.backends
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_finalists_are_measured_for_real(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalists, "is_this_machine", lambda target: True)
    changed = bench(search__finalists=1)
    row, measured = measure_finalists(changed, population(), Limits(None, None, None), precision)
    assert measured is not None
    assert 0 < measured.measured_ms[row] < 100
    assert "onnxruntime" in measured.device
