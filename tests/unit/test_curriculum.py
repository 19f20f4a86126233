"""What a recipe says of trainings, read out before any work: phases, suggestions, further teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekd.errors import UsageError
from edgekd.recipe import load_recipe, to_toml
from edgekd.stages.assistants import Assistant, choose, wanted_macs
from edgekd.stages.curriculum import check_curriculum, phases_of, tried
from edgekd.stages.others import source_and_weights
from edgekd.stages.suggest import rank

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.toml"))


def phases(**overrides: Any) -> list[dict[str, Any]]:
    recipe = load_recipe(None, {key.replace("__", "."): value for key, value in overrides.items()})
    return [phase.facts() for phase in phases_of(recipe.distill, recipe.data.augment)]


# ---------------------------------------------------------------- phases


def test_without_phases_there_is_one_training_as_the_recipe_says() -> None:
    assert phases(distill__method="kd", distill__options={"kd": {"temperature": 2.0}}) == [
        {"method": "kd", "options": {"kd": {"temperature": 2.0}}, "epochs": 20, "learning_rate": 0.01,
         "augment": "crop-mix"}
    ]  # fmt: skip


def test_a_phase_overrides_what_it_names_and_keeps_the_rest() -> None:
    first, second = phases(
        distill__epochs=5,
        distill__options={"dist": {"beta": 1.0}},
        distill__phases=[{"epochs": 2, "augment": "crop"}, {"method": "ssld", "learning_rate": 0.001}],
    )
    assert (first["method"], first["epochs"], first["augment"]) == ("dist", 2, "crop")
    assert first["options"] == {"dist": {"beta": 1.0}}
    assert (second["method"], second["epochs"], second["learning_rate"]) == ("ssld", 5, 0.001)
    assert (second["options"], second["augment"]) == ({}, "crop-mix")


def test_phases_survive_being_written_into_the_runs_folder(tmp_path: Path) -> None:
    given = [{"method": "kd", "options": {"kd": {"temperature": 2.0}}}, {"epochs": 3}]
    recipe = load_recipe(None, {"distill.phases": given})
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "r.toml", {}) == recipe


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        ({"distill.phases": [{"method": "dst"}]}, ["unknown distillation method 'dst'"]),
        ({"distill.options": {"dkd": {}}}, ["distill.options names 'dkd'", "dist"]),
        ({"distill.phases": [{"options": {"kd": {}}}]}, ["distill.options names 'kd'"]),
        ({"distill.method": "suggest", "distill.phases": [{}]}, ["suggest", "1 phases"]),
        ({"distill.method": "suggest", "distill.suggest_from": ["kdd"]}, ["'kdd'"]),
        ({"distill.method": "suggest", "distill.suggest_from": ["kd"]}, ["'kd' alone"]),
        ({"distill.method": "kd+suggest"}, ["'kd+suggest'", "stands alone"]),
        ({"distill.phases": [{"method": "suggest"}]}, ["'suggest'", "stands alone"]),
        ({"teacher.others": ["b.onnx"]}, ["teacher.others", "ensemble and slices", "'dist'"]),
    ],
)
def test_a_wrong_curriculum_is_refused_before_any_work(overrides: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        check_curriculum(load_recipe(None, overrides))
    for text in texts:
        assert text in caught.value.message


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_documentation_are_recipes(path: Path) -> None:
    assert check_curriculum(load_recipe(path, {}))


def test_there_are_recipes_in_the_documentation() -> None:
    assert {path.stem for path in RECIPES} >= {"ssld-two-phases", "ernie-tiny-four-phases"}


# ---------------------------------------------------------------- what is tried


def test_four_methods_are_tried_and_the_recipes_options_win() -> None:
    recipe = load_recipe(None, {"distill.method": "suggest", "distill.options": {"kd": {"weight": 2.0}}})
    found = tried(recipe.distill, "crop")
    assert list(found) == ["dist", "dkd", "lskd", "kd"]
    assert found["kd"].recipe.options == {"kd": {"temperature": 2.0, "weight": 2.0}}
    assert {phase.recipe.epochs for phase in found.values()} == {recipe.distill.suggest_epochs}
    own = tried(load_recipe(None, {"distill.suggest_from": ["kd+fitnet"]}).distill, "crop")
    assert own["kd+fitnet"].recipe.options == {}


def answers(shares: dict[str, float], seeds: int = 3, images: int = 400) -> dict[str, NDArray[np.bool_]]:
    """Methods that get these shares of images right: what one gets right, a better one does too."""
    hardness = np.random.default_rng(0).permuted(np.tile(np.linspace(0, 1, images), (seeds, 1)), axis=1)
    return {name: hardness < share for name, share in shares.items()}


def test_a_clearly_better_method_is_chosen() -> None:
    found = rank(answers({"dist": 0.7, "kd": 0.6, "lskd": 0.8}), 0)
    assert (found.chosen, found.best, found.decided) == ("lskd", "lskd", True)
    assert found.leads["lskd"][0] > 0 > found.leads["kd"][1]
    assert found.accuracy["dist"] == pytest.approx(0.7, abs=0.01)
    low, high = found.intervals["dist"]
    assert low < 0.7 < high
    assert "ahead of all others" in found.reason


def test_methods_that_are_not_told_apart_leave_the_default() -> None:
    rng = np.random.default_rng(1)
    right = {name: rng.random((2, 60)) < share for name, share in (("kd", 0.72), ("dist", 0.7))}
    found = rank(right, 0)
    assert (found.chosen, found.best, found.decided) == ("dist", "kd", False)
    assert "cannot be told apart from 'dist'" in found.reason
    assert "default 'dist' is taken" in found.reason


def test_two_that_beat_the_default_alike_are_said_to_be_alike() -> None:
    rng = np.random.default_rng(2)
    right = answers({"dist": 0.5, "kd": 0.8}, images=200) | {"lskd": rng.random((3, 200)) < 0.79}
    found = rank(right, 0)
    assert found.chosen == found.best != "dist"
    assert not found.decided
    assert "ahead of the default 'dist'" in found.reason


def test_without_dist_the_first_is_the_default_and_equals_are_a_tie() -> None:
    same = answers({"kd": 0.6})["kd"]
    found = rank({"lskd": same, "kd": same}, 0)
    assert (found.default, found.best, found.chosen, found.decided) == ("lskd", "lskd", "lskd", False)


@pytest.mark.slow
def test_the_interval_of_a_lead_covers_the_truth() -> None:
    """Two methods of equal merit on independent images: at 95 %, nearly always undecided."""
    rng = np.random.default_rng(3)
    decided = [
        rank({name: rng.random((3, 150)) < 0.7 for name in ("dist", "kd")}, seed).chosen == "kd"
        for seed in range(20)
    ]
    assert sum(decided) <= 3


# ---------------------------------------------------------------- assistants and further teachers


def test_assistants_lie_in_equal_ratios_between_teacher_and_student() -> None:
    assert wanted_macs(8000, 1, 2) == pytest.approx([400, 20])


def test_the_nearest_network_is_chosen_and_a_searched_one_before_a_drawn_one() -> None:
    searched = [Assistant((1,), 90, "candidates"), Assistant((2,), 20, "candidates")]
    drawn = [Assistant((3,), 100, "space"), Assistant((4,), 41, "space"), Assistant((5,), 39, "space")]
    assert [item.genome for item in choose([100, 40], [searched, drawn])] == [(1,), (4,)]
    assert [item.genome for item in choose([100], [[], drawn])] == [(3,)]


def test_each_assistant_is_smaller_than_the_one_before() -> None:
    pool = [Assistant((1,), 50, "space"), Assistant((2,), 60, "space")]
    assert [item.macs for item in choose([61, 59, 58], [pool])] == [60, 50]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b:build@w/x.safetensors", ("a.b:build", "w/x.safetensors")),
        ("a.b:build", ("a.b:build", "")),
        ("strange@name.onnx", ("strange@name.onnx", "")),
    ],
)
def test_a_further_teacher_is_a_source_with_weights(text: str, expected: tuple[str, str]) -> None:
    assert source_and_weights(text) == expected
