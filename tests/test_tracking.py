"""Trackers of a run, through their own libraries, into local folders."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from samples import SHORT, Tiny

from edgekd.errors import MissingExtraError
from edgekd.pipeline import run_pipeline
from edgekd.recipe import Recipe, load_recipe, parse_override
from edgekd.run import Silent
from edgekd.tracking import Trackers, results_of, tracked

pytestmark = [pytest.mark.slow, pytest.mark.backends]
EPOCHS = 3


class Listener(Silent):
    """Hears what is said; may interrupt the training at a step."""

    def __init__(self, stop_at: int = 0) -> None:
        self.lines: list[str] = []
        self._stop_at = stop_at

    def say(self, text: str) -> None:
        self.lines.append(text)

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        if what == "distill" and done == self._stop_at:
            raise KeyboardInterrupt


def recipe_of(tiny: Tiny, **track: object) -> Recipe:
    given = dict(map(parse_override, SHORT)) | {
        "teacher.source": "tiny_teacher:build",
        "teacher.weights": str(tiny.weights),
        "data.source": str(tiny.data),
        "distill.epochs": EPOCHS,
    }
    return load_recipe(None, given | {f"track.{name}": str(place) for name, place in track.items()})


def test_mlflow_has_recipe_epochs_results_and_report_and_an_interrupted_run_goes_on(
    tiny: Tiny, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    recipe = recipe_of(tiny, mlflow=tmp_path / "tracked")
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(recipe, tmp_path / "run", Listener(stop_at=12), "quantize")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/tracked/mlflow.db")
    experiment = client.get_experiment_by_name("edgekd").experiment_id
    (begun,) = client.search_runs([experiment])
    assert begun.info.status == "KILLED" and begun.info.run_name == "run"
    assert [point.step for point in client.get_metric_history(begun.info.run_id, "distill/loss")] == [1]

    listener = Listener()
    record = run_pipeline(recipe, tmp_path / "run", listener, "quantize")
    assert not any("mlflow" in line for line in listener.lines)
    (done,) = client.search_runs([experiment])
    assert (done.info.run_id, done.info.status) == (begun.info.run_id, "FINISHED")
    assert done.data.params["distill.epochs"] == str(EPOCHS)
    assert done.data.params["teacher.source"] == "tiny_teacher:build"
    assert not any(key.startswith("track") for key in done.data.params)
    history = client.get_metric_history(done.info.run_id, "distill/loss")
    kept = record["metrics"]["distill"]["history"]
    assert [(point.step, point.value) for point in history] == [(row["epoch"], row["loss"]) for row in kept]
    assert done.data.metrics.items() >= results_of(record).items()
    assert done.data.metrics["teacher/accuracy"] == record["metrics"]["teacher"]["accuracy"]
    assert {"report.html", "record.json"} <= {file.path for file in client.list_artifacts(done.info.run_id)}

    run_pipeline(recipe_of(tiny, mlflow=tmp_path / "tracked"), tmp_path / "other", Listener(), "teacher")
    assert len(client.search_runs([experiment])) == 2


def test_tensorboard_has_epochs_results_recipe_and_report(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    listener = Listener()
    record = run_pipeline(recipe_of(tiny, tensorboard=tmp_path / "tb"), tmp_path / "run", listener, "distill")
    assert not any("tensorboard" in line for line in listener.lines)
    read = EventAccumulator(str(tmp_path / "tb" / "run")).Reload()
    found = [(event.step, event.value) for event in read.Scalars("distill/selection_accuracy")]
    kept = record["metrics"]["distill"]["history"]
    assert found == [(row["epoch"], pytest.approx(row["selection_accuracy"])) for row in kept]
    accuracy = read.Scalars("student_float/accuracy")[-1].value
    assert accuracy == pytest.approx(record["metrics"]["student_float"]["accuracy"])
    assert {"report/text_summary", "_hparams_/session_start_info"} <= set(read.summary_metadata)
    assert b"distill.epochs" in read.summary_metadata["_hparams_/session_start_info"].plugin_data.content


def test_a_server_that_is_gone_is_told_once_and_the_run_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    listener = Listener()
    record = run_pipeline(recipe_of(tiny, mlflow="http://127.0.0.1:9"), tmp_path / "run", listener, "distill")
    told = [line for line in listener.lines if "mlflow" in line]
    assert len(told) == 1 and "not told any more, the run goes on" in told[0]
    assert len(record["metrics"]["distill"]["history"]) == EPOCHS


def test_a_tracker_that_fails_later_leaves_the_others_alone() -> None:
    class Counting:
        def __init__(self, fails: bool) -> None:
            self.epochs, self._fails = 0, fails

        def epoch(self, step: int, values: object) -> None:
            self.epochs += 1
            if self._fails:
                raise OSError("no space left")

        def results(self, values: object, verdict: str) -> None: ...

        def close(self, status: str) -> None: ...

    said: list[str] = []
    trackers, failing, sound = Trackers(said.append), Counting(True), Counting(False)
    trackers.open("failing", lambda: failing)
    trackers.open("sound", lambda: sound)
    for epoch in (1.0, 2.0):
        trackers.epoch("distill", {"epoch": epoch, "loss": 1.0})
    assert (failing.epochs, sound.epochs) == (1, 2)
    assert said == ["  failing is not told any more, the run goes on: no space left"]


@pytest.mark.parametrize("name", ["mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_told_before_the_run(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(package: str, *more: str) -> ModuleSpec | None:
        return None if package == name else find(package, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(MissingExtraError) as told:
        run_pipeline(recipe_of(tiny, **{name: tmp_path / "t"}), tmp_path / "run")
    assert told.value.hint == f"python -m pip install 'edgekd[{name}]'"
    assert not (tmp_path / "run").exists()


def test_without_trackers_nothing_is_imported_or_written(tiny: Tiny, tmp_path: Path) -> None:
    with tracked(recipe_of(tiny), tmp_path, print) as trackers:
        trackers.epoch("distill", {"epoch": 1.0, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []
