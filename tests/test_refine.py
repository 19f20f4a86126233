"""The search's second stage, on the tiny task: what is compared, what is chosen, and what stage 3 reuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from samples import SHORT, Tiny

from edgekd.errors import UsageError
from edgekd.pipeline import run_pipeline
from edgekd.ranking import ranks
from edgekd.recipe import load_recipe, parse_override
from edgekd.train import fit

pytestmark = pytest.mark.main_job


def settings(tiny: Tiny, **changes: Any) -> dict[str, Any]:
    found = dict(parse_override(text) for text in SHORT)
    given = {
        "target": "jetson", "teacher.source": "tiny_teacher:build", "teacher.weights": str(tiny.weights),
        "data.source": str(tiny.data), "search.evaluations": 40, "distill.epochs": 2, "search.refine": True,
        "search.score": "diswot+nwot",
        "search.refine_candidates": 7, "search.refine_epochs": 1,
        "budget.max_macs_ratio": 20.0,
    }  # fmt: skip
    return found | given | {key.replace("__", "."): value for key, value in changes.items()}


def run(tiny: Tiny, folder: Path, **changes: Any) -> dict[str, Any]:
    return run_pipeline(load_recipe(None, settings(tiny, **changes)), folder, last="distill")


@pytest.fixture(scope="module")
def refined(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("refine") / "run"
    return folder, run(tiny, folder)


def test_the_largest_that_fits_is_among_the_compared(refined: tuple[Path, dict[str, Any]]) -> None:
    search = refined[1]["metrics"]["search"]
    why = {line["row"]: line["why"] for line in search["refine"]["trained"]}
    assert "largest that fits" in why[search["by_macs"]]
    assert "most parameters" in why[search["by_parameters"]]
    assert "chosen by score and MACs" in why[search["chosen_without_refine"]]
    assert search["refine"]["control"] == search["by_macs"]
    assert all(search["candidates"][row]["feasible"] for row in why)


def test_the_best_by_nwot_and_macs_is_among_the_compared(refined: tuple[Path, dict[str, Any]]) -> None:
    search = refined[1]["metrics"]["search"]
    pool = [row for row, found in enumerate(search["candidates"]) if found["score"] is not None]
    nwot = ranks([search["candidates"][row]["terms"]["nwot"] for row in pool])
    best = pool[int(np.argmax(nwot + ranks([search["candidates"][row]["macs"] for row in pool])))]
    assert best in {line["row"] for line in search["refine"]["trained"]}


def test_finalists_are_the_best_of_the_short_trainings(refined: tuple[Path, dict[str, Any]]) -> None:
    facts = refined[1]["metrics"]["search"]["refine"]
    accuracies = [line["accuracy"] for line in facts["trained"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert [line["row"] for line in facts["finalists"]] == [line["row"] for line in facts["trained"][:2]]
    best = max(facts["finalists"], key=lambda line: line["selection_accuracy"])
    assert facts["chosen"] == refined[1]["metrics"]["search"]["chosen"] == best["row"]
    assert facts["ridge"]["fitted_on"] >= 6


def test_the_winners_training_is_not_repeated(refined: tuple[Path, dict[str, Any]]) -> None:
    folder, record = refined
    facts = record["metrics"]["search"]["refine"]
    winner = next(line for line in facts["finalists"] if line["row"] == facts["chosen"])
    stored, distilled = load_file(folder / winner["weights"]), load_file(folder / "3-distilled.safetensors")
    assert stored.keys() == distilled.keys()
    assert all((stored[name] == distilled[name]).all() for name in stored)
    assert record["metrics"]["distill"]["history"] == winner["history"]
    genome = record["metrics"]["search"]["candidates"][facts["chosen"]]["genome"]
    assert record["metrics"]["student_float"]["genome"] == list(genome)


def test_an_interrupted_second_stage_goes_on_where_it_stopped(
    refined: tuple[Path, dict[str, Any]], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def tired(stage: Any, progress: Any) -> Any:
        if len(done) == 3:
            done.append("interrupted")
            raise KeyboardInterrupt
        done.append(stage.name)
        return fit(stage, progress)

    monkeypatch.setattr("edgekd.stages.refine.fit", tired)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "run", search__refine_finalists=1)
    record = run(tiny, tmp_path / "run", search__refine_finalists=1)
    names = [name for name in done if name != "interrupted"]
    assert len(names) == len(set(names)) == len(record["metrics"]["search"]["refine"]["trained"])
    assert record["metrics"]["search"]["refine"]["finalists"] == []
    chosen = record["metrics"]["search"]["refine"]
    assert chosen["chosen"] == chosen["trained"][0]["row"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"search__student": "a:b"}, "search.student"), ({"distill__assistants": 1}, "distill.assistants"),
     ({"distill__method": "suggest"}, "method=suggest")],
)  # fmt: skip
def test_what_full_trainings_could_not_repeat_is_refused(
    changes: dict[str, Any], words: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny, tmp_path / "run", **changes)
    assert words in caught.value.message
    assert not (tmp_path / "run").exists()
