"""Trainings of several phases and by several teachers, on the tiny task, through the pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import SHORT, Tiny

from edgekd import export
from edgekd.errors import EdgekdError, TeacherError, UsageError
from edgekd.pipeline import run_pipeline
from edgekd.plan import Plan
from edgekd.quantize.capture import capture
from edgekd.recipe import TeacherRecipe, load_recipe, parse_override
from edgekd.report import html_report
from edgekd.run import Silent
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.teacher import load_teacher

SPEC = ModelSpec(Preprocessing(16, 16, "grey", (0.0,), (1.0,)), ("a", "b", "c", "d"))


class Killed(Exception):  # noqa: N818 - stands for a signal
    """Stands for a process that dies."""


class Watcher(Silent):
    """Hears what is said; dies at the start of a named training."""

    def __init__(self, dies_in: str = "", at: int = 1) -> None:
        self.lines: list[str] = []
        self._dies_in, self._at = dies_in, at

    def say(self, text: str) -> None:
        self.lines.append(text)

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        if what == self._dies_in and done == self._at:
            raise Killed


@pytest.fixture(scope="module")
def found_student(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has found its student."""
    folder = tmp_path_factory.mktemp("found") / "run"
    go(tiny, folder, last="search")
    return folder


@pytest.fixture
def searched(found_student: Path, tmp_path: Path) -> Path:
    """Its folder, copied."""
    return Path(shutil.copytree(found_student, tmp_path / "run"))


def go(
    tiny: Tiny, folder: Path, reporter: Silent | None = None, last: str = "distill", **given: Any
) -> dict[str, Any]:
    """The record of a run with the short recipe, two epochs and the recipe's keys `given`."""
    overrides = dict(map(parse_override, SHORT)) | {
        "target": "jetson",
        "teacher.source": "tiny_teacher:build",
        "teacher.weights": str(tiny.weights),
        "data.source": str(tiny.data),
        "distill.epochs": 2,
    }
    overrides |= {key.replace("__", "."): value for key, value in given.items()}
    return run_pipeline(load_recipe(None, overrides), folder, reporter or Silent(), last)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "3-distilled.safetensors"))


def write_onnx(tiny: Tiny, path: Path) -> str:
    model = load_teacher(TeacherRecipe(source="tiny_teacher:build", weights=str(tiny.weights))).model
    assert model is not None
    export.save(export.to_onnx(capture(model, SPEC.input_shape), SPEC), path)
    return str(path)


# ---------------------------------------------------------------- phases


RECIPES = sorted((Path(__file__).parent.parent / "docs" / "recipes").glob("*.toml"))
TWO = [{"method": "ssld", "epochs": 2}, {"method": "dist", "epochs": 1, "augment": "none"}]


def test_phases_train_one_student_and_resume_to_the_bit(
    tiny: Tiny, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two runs may measure different plans to be the fastest; bits are equal only under one plan.
    pinned = (Plan(1, False, False), {"pinned": 1.0})
    monkeypatch.setattr("edgekd.stages.training.probe", lambda *a, **k: pinned)
    shutil.copytree(searched, tmp_path / "straight")
    record = go(tiny, tmp_path / "straight", distill__phases=TWO)
    distill = record["metrics"]["distill"]
    assert distill["method"] == "ssld then dist"
    assert [(row["epoch"], row["phase"]) for row in distill["history"]] == [(1, 1), (2, 1), (3, 2)]
    assert [phase["augment"] for phase in distill["phases"]] == ["crop", "none"]
    with pytest.raises(Killed):
        go(tiny, searched, Watcher("distill 2 of 2", at=2), distill__phases=TWO)
    again = Watcher("distill 1 of 2")
    go(tiny, searched, again, distill__phases=TWO)
    straight, resumed = weights(tmp_path / "straight"), weights(searched)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert "ssld then dist" in html_report(record)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_documentation_train(path: Path, tiny: Tiny, searched: Path) -> None:
    written = load_recipe(path, {}).distill
    phases = [msgspec.structs.replace(phase, epochs=1) for phase in written.phases]
    given = {"distill__phases": msgspec.to_builtins(phases), "distill__method": written.method}
    record = go(tiny, searched, distill__weight_decay=written.weight_decay, **given)
    trained = record["metrics"]["distill"]["phases"]
    assert [phase["augment"] for phase in trained] == [phase.augment for phase in phases]
    assert all(np.isfinite(row["loss"]) for row in record["metrics"]["distill"]["history"])


def test_a_phase_that_changes_the_student_is_known_to_the_stages_after_it(tiny: Tiny, searched: Path) -> None:
    phases = [{"method": "kd", "epochs": 1}, {"method": "dho", "epochs": 1}, {"method": "ssld", "epochs": 1}]
    go(tiny, searched, distill__phases=phases, quantize__mode="ptq")
    record = go(tiny, searched, last="export", distill__phases=phases, quantize__mode="ptq")
    assert record["stages"]["distill"]["resumed"]
    assert record["metrics"]["quantize"]["chosen"] == "ptq"


def test_a_phase_that_does_not_fit_is_refused_before_the_first_is_trained(tiny: Tiny, searched: Path) -> None:
    heard = Watcher("distill 1 of 2")
    with pytest.raises(UsageError, match="tokens"):
        go(tiny, searched, heard, distill__phases=[{}, {"method": "hidden"}])
    assert not any("training in" in line for line in heard.lines)


# ---------------------------------------------------------------- a teacher that is fine-tuned first


def test_a_prepared_teacher_says_more_within_a_class(tiny: Tiny, searched: Path) -> None:
    changes: dict[str, Any] = {"distill__prepare": "mcmi", "distill__prepare_epochs": 2, "distill__epochs": 1}
    plain = go(tiny, searched, distill__prepare_weight=0.0, **changes)["metrics"]["distill"]["preparation"]
    record = go(tiny, searched, distill__prepare_weight=1.0, **changes)
    facts = record["metrics"]["distill"]["preparation"]
    assert facts["cmi_after"] > plain["cmi_after"] > 0
    assert facts["cmi_before"] == plain["cmi_before"] > 0
    assert facts["accuracy_before"] == record["metrics"]["teacher"]["accuracy"]
    assert facts["accuracy_after"] > 0.8
    assert len(facts["history"]) == 2
    assert "mcmi" in html_report(record)


def test_a_black_box_cannot_be_fine_tuned(tiny: Tiny, tmp_path: Path) -> None:
    source = write_onnx(tiny, tmp_path / "t.onnx")
    with pytest.raises(UsageError, match="black box") as caught:
        go(tiny, tmp_path / "run", teacher__source=source, teacher__weights="", distill__prepare="mcmi")
    assert "leave distill.prepare out" in caught.value.hint


# ---------------------------------------------------------------- assistants


def test_assistants_are_taught_one_by_the_other(tiny: Tiny, tmp_path: Path) -> None:
    heard = Watcher()
    small: dict[str, Any] = {"budget__max_macs_ratio": 0.45, "distill__epochs": 1}
    record = go(tiny, tmp_path / "run", heard, distill__assistants=2, **small)
    rows = record["metrics"]["distill"]["assistants"]
    sizes = [record["metrics"]["teacher"]["macs"], *(row["macs"] for row in rows)]
    sizes.append(record["metrics"]["student_float"]["macs"])
    assert sizes == sorted(sizes, reverse=True)
    assert [row["taught_by"] for row in rows] == ["tiny_teacher:build", "assistant 1"]
    assert all(0 <= row["accuracy"] <= 1 and len(row["history"]) == 1 for row in rows)
    assert {row["found"] for row in rows} <= {"candidates", "space"}
    assert any("assistant 2 of 2" in line for line in heard.lines)
    page = html_report(record)
    assert "assistant 2" in page


def test_a_method_that_changes_its_network_does_not_go_with_assistants(tiny: Tiny, searched: Path) -> None:
    with pytest.raises(UsageError, match="assistants"):
        go(tiny, searched, distill__assistants=1, distill__method="simkd")


# ---------------------------------------------------------------- several teachers


def test_two_teachers_teach_as_one_and_train_the_quantization_too(tiny: Tiny, tmp_path: Path) -> None:
    others = [f"tiny_teacher:build@{tiny.weights}", write_onnx(tiny, tmp_path / "other.onnx")]
    record = go(tiny, tmp_path / "run", last="quantize", teacher__others=others,
                distill__method="ensemble", quantize__mode="qat")  # fmt: skip
    rows = record["metrics"]["teacher"]["others"]
    assert [row["name"] for row in rows] == ["tiny_teacher:build", others[1]]
    assert all(row["accuracy"] > 0.9 and row["classes"] == 4 for row in rows)
    assert record["metrics"]["quantize"]["qat_selection_accuracy"] is not None


def test_networks_that_run_in_every_step_may_be_several(tiny: Tiny, tmp_path: Path) -> None:
    torch_one = f"tiny_teacher:build@{tiny.weights}"
    record = go(tiny, tmp_path / "run", teacher__others=[torch_one], distill__method="ensemble+fitnet",
                distill__epochs=1)  # fmt: skip
    assert record["metrics"]["distill"]["history"]
    with pytest.raises(UsageError, match="logits only"):
        go(tiny, tmp_path / "run", teacher__others=[write_onnx(tiny, tmp_path / "b.onnx")],
           distill__method="ensemble+fitnet")  # fmt: skip


def test_specialists_have_the_classes_of_their_subset(tiny: Tiny, tmp_path: Path) -> None:
    module = tiny.folder / "specialist.py"
    module.write_text("from tiny_teacher import Net\n\ndef build():\n    return Net(2)\n")
    state = load_file(tiny.weights)
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name][2:].clone()
    save_file(state, tmp_path / "s.safetensors")
    options = {"slices": {"specialists": True, "subsets": [[0, 1, 2, 3], [2, 3]]}}
    given: dict[str, Any] = {
        "teacher__others": [f"specialist:build@{tmp_path / 's.safetensors'}"],
        "distill__method": "slices",
        "distill__epochs": 1,
    }
    record = go(tiny, tmp_path / "run", distill__options=options, **given)
    (row,) = record["metrics"]["teacher"]["others"]
    assert row["classes"] == 2
    assert row["accuracy"] > 0.9
    with pytest.raises(TeacherError, match="has 2 outputs, the data has 4 classes"):
        go(tiny, tmp_path / "other", **given)


def test_a_further_teacher_with_other_classes_or_other_channels_is_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(EdgekdError, match="has 5 outputs") as caught:
        go(tiny, tmp_path / "run", teacher__others=["tiny_teacher:five_classes"], distill__method="ensemble")
    assert caught.value.exit_code == 12
    with pytest.raises(EdgekdError, match="nowhere"):
        go(tiny, tmp_path / "run", teacher__others=["tiny_teacher:build@nowhere.pt"],
           distill__method="ensemble")  # fmt: skip


def test_a_further_teacher_with_other_means_sees_its_own(tiny: Tiny) -> None:
    """The built-in teacher states a mean and a deviation; it gets them whatever the first teacher's are."""
    from edgekd.stages.others import load_other

    first = ModelSpec(Preprocessing(28, 28, "grey", (0.5,), (0.25,)), tuple("abcdefghij"))
    pixels = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    loaded, plain = load_other("demo", first), load_teacher(TeacherRecipe()).model
    assert loaded.model is not None
    assert plain is not None
    with torch.no_grad():
        ours, theirs = loaded.model((pixels - 0.5) / 0.25), plain((pixels - 0.2860) / 0.3530)
    assert torch.allclose(ours, theirs, atol=1e-4)
    with pytest.raises(TeacherError, match="channels"):
        load_other("demo", ModelSpec(Preprocessing(28, 28, "rgb", (0.0,) * 3, (1.0,) * 3), ("a", "b")))


# ---------------------------------------------------------------- suggested methods


def test_a_suggestion_is_tried_explained_and_used(tiny: Tiny, searched: Path) -> None:
    given: dict[str, Any] = {
        "distill__method": "suggest",
        "distill__suggest_from": ["kd", "dist", "fitnet+kd"],
        "distill__suggest_epochs": 1,
        "distill__suggest_seeds": 2,
    }
    with pytest.raises(Killed):
        go(tiny, searched, Watcher("distill"), **given)
    heard = Watcher("try kd")  # the trials are not repeated
    record = go(tiny, searched, heard, **given)
    distill = record["metrics"]["distill"]
    found = distill["suggestion"]
    assert distill["method"] == found["chosen"] in ("kd", "dist", "fitnet+kd")
    assert distill["phases"][0]["epochs"] == 2
    assert (found["epochs"], found["seeds"]) == (1, [0, 1])
    assert found["images"] == record["metrics"]["data"]["selection"]
    assert found["reason"] in " ".join(heard.lines)
    for row in found["methods"]:
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert len(row["accuracy_by_seed"]) == 2
    page = html_report(record)
    assert "Methods tried" in page
    assert "fitnet+kd" in page
    after = go(tiny, searched, last="quantize", **given)
    assert after["stages"]["distill"]["resumed"]
    assert after["metrics"]["quantize"]["history"]


def test_a_default_method_that_does_not_fit_is_left_out_and_a_named_one_is_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "distill__method": "suggest",
        "data__labelled_fraction": 0.5,
        "distill__suggest_epochs": 1,
        "distill__suggest_seeds": 1,
        "distill__epochs": 1,
    }
    record = go(tiny, tmp_path / "run", **given)
    found = record["metrics"]["distill"]["suggestion"]
    assert [row["method"] for row in found["methods"]] == ["dist", "lskd", "kd"]
    assert "labels" in found["left_out"]["dkd"]
    with pytest.raises(UsageError, match="labels"):
        go(tiny, tmp_path / "run", distill__suggest_from=["dkd", "kd"], **given)


def test_the_record_can_be_written_as_strict_json(tiny: Tiny, searched: Path) -> None:
    record = go(tiny, searched)
    json.dumps(record, allow_nan=False)
    assert record["metrics"]["distill"]["preparation"] is None
    assert record["metrics"]["distill"]["assistants"] == []


# ---------------------------------------------------------------- quantization-aware training


@pytest.mark.slow
def test_features_teach_a_fake_quantized_student(tiny: Tiny, searched: Path) -> None:
    options = {"fitnet": {"weight": 0.5}}
    given: dict[str, Any] = {"quantize__mode": "qat", "quantize__method": "dkd+fitnet"}
    given |= {"quantize__options": options}
    record = go(tiny, searched, last="quantize", distill__epochs=1, **given)
    quantize = record["metrics"]["quantize"]
    assert quantize["method"] == "dkd+fitnet" and len(quantize["history"]) == 1
    assert quantize["qat_selection_accuracy"] is not None
    again = go(tiny, searched, last="quantize", distill__epochs=1, **given | {"quantize__options": {}})
    assert again["metrics"]["quantize"]["history"][0]["loss"] != quantize["history"][0]["loss"]


def test_a_black_box_teacher_shows_a_quantized_student_no_features(tiny: Tiny, searched: Path) -> None:
    source = write_onnx(tiny, searched.parent / "teacher.onnx")
    with pytest.raises(UsageError, match="'fitnet' needs the teacher's"):
        go(tiny, searched, teacher__source=source, teacher__weights="", quantize__method="fitnet")
