"""Optional trackers of a run: MLflow and TensorBoard, through their own libraries.

Parameters are the resolved recipe, metrics the epochs of the trainings as they end and the results of the
run, artefacts its reports. A tracker that fails is told once and then left alone: the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edgekd.errors import missing_extra
from edgekd.files import read_json, sha256_json, write_json
from edgekd.recipe import Recipe

Values = Mapping[str, float]
FILES = ("report.html", "report.md", "record.json", "recipe.toml")
_STATE = "tracking.json"  # in the run's folder: a start that continues a run continues its tracking
_EXPERIMENT = "edgekd"
_BATCH, _LONGEST = 100, 6000  # of MLflow: parameters a request, characters of a value
_RESULTS = (
    "accuracy", "parameters", "macs", "size_mib", "top1_agreement", "int8_coverage_macs", "latency_p50_ms",
    "latency_p90_ms", "memory_mib",
)  # fmt: skip


class Tracker(Protocol):
    """Where a run is told to; any method may raise whatever its library raises."""

    def epoch(self, step: int, values: Values) -> None:
        """Metrics of a training after an epoch."""

    def results(self, values: Values, verdict: str) -> None:
        """What came out, and the files of the folder."""

    def close(self, status: str) -> None:
        """``FINISHED``, ``FAILED`` or ``KILLED``."""


class Trackers:
    """All trackers of a recipe; those that fail drop out."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}

    def open(self, name: str, make: Callable[[], Tracker]) -> None:
        """Add one."""
        with self._guarded(name):
            self._open[name] = make()

    def epoch(self, training: str, row: Values) -> None:
        """A row of a training's history; its metrics are named ``TRAINING/KEY``."""
        values = {f"{training}/{key}": value for key, value in row.items() if key != "epoch"}
        self._each(lambda tracker: tracker.epoch(int(row["epoch"]), values))

    def results(self, record: Mapping[str, Any]) -> None:
        """Numbers of the record."""
        self._each(lambda tracker: tracker.results(results_of(record), str(record.get("verdict", ""))))

    def close(self, status: str) -> None:
        self._each(lambda tracker: tracker.close(status))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                do(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries about themselves
                yield
        except Exception as error:  # noqa: BLE001 (whatever a tracker's library raises, the training goes on)
            self._open.pop(name, None)
            said = " ".join(str(error).split()) or type(error).__name__
            self._say(f"  {name} is not told any more, the run goes on: {said[:300]}")


def check_trackers(recipe: Recipe) -> None:
    """Raises MissingExtraError where the package of a tracker is not installed."""
    for package, wanted in msgspec.to_builtins(recipe.track).items():
        if wanted and importlib.util.find_spec(package) is None:
            raise missing_extra(package, package, f"track.{package}")


@contextmanager
def tracked(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Iterator[Trackers]:
    """The trackers that the recipe names, closed at the end."""
    track = recipe.track
    trackers, status = Trackers(say), "FAILED"
    if track.mlflow:
        trackers.open("mlflow", lambda: MlflowTracker(track.mlflow, recipe, folder))
    if track.tensorboard:
        trackers.open("tensorboard", lambda: TensorboardTracker(Path(track.tensorboard), recipe, folder))
    try:
        yield trackers
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        trackers.close(status)


def results_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record that runs are compared by, as ``MODEL/KEY``; what is not measured is absent."""
    metrics = record["metrics"]
    models = {name: metrics.get(name) or {} for name in ("teacher", "student_float")}
    models |= {row["id"]: row for row in metrics.get("variants", ())}
    return {
        f"{name}/{key}": float(model[key])
        for name, model in models.items()
        for key in _RESULTS
        if model.get(key) is not None
    }


def _parameters(recipe: Recipe) -> dict[str, str]:
    """Dotted keys; without the trackers' own, whose addresses may hold a password."""
    flat: dict[str, str] = {}
    for name, value in msgspec.to_builtins(recipe).items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{key}".rstrip("."): _text(item) for key, item in rows if name != "track"}
    return flat


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class MlflowTracker:
    """A run of the experiment ``edgekd`` (or ``MLFLOW_EXPERIMENT_NAME``): on a server, or in a folder."""

    def __init__(self, place: str, recipe: Recipe, folder: Path) -> None:
        # A server that is gone holds a training up for seconds, not for MLflow's own minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
        self._metric, self._tag, self._folder = Metric, RunTag, folder
        files = None
        if "://" not in place:
            own = Path(place).resolve()
            own.mkdir(parents=True, exist_ok=True)
            place, files = f"sqlite:///{own}/mlflow.db", (own / "artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=place)
        state = {"place": place, "recipe": sha256_json(_parameters(recipe))}
        path = folder / _STATE
        before = read_json(path) if path.exists() else {}
        if before.items() >= state.items():
            self._run = str(before["run"])
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(
            self._experiment(files), run_name=folder.resolve().name
        ).info.run_id
        given = [Param(key, value[:_LONGEST]) for key, value in _parameters(recipe).items()]
        for start in range(0, len(given), _BATCH):
            self._client.log_batch(self._run, params=given[start : start + _BATCH])
        write_json(path, state | {"run": self._run})

    def _experiment(self, files: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        made = found.experiment_id if found else self._client.create_experiment(name, artifact_location=files)
        return str(made)

    def _log(self, step: int, values: Values, tags: Mapping[str, str]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics, tags=[self._tag(*pair) for pair in tags.items()])

    def epoch(self, step: int, values: Values) -> None:
        """See `Tracker`."""
        self._log(step, values, {})

    def results(self, values: Values, verdict: str) -> None:
        """See `Tracker`."""
        self._log(0, values, {"verdict": verdict})
        for name in FILES:
            if (self._folder / name).exists():
                self._client.log_artifact(self._run, str(self._folder / name))

    def close(self, status: str) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run, status)


class TensorboardTracker:
    """Event files below ``FOLDER/NAME OF THE RUN``."""

    def __init__(self, place: Path, recipe: Recipe, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._recipe, self._folder = recipe, folder
        self._writer: Any = SummaryWriter(str(place / folder.resolve().name))

    def epoch(self, step: int, values: Values) -> None:
        """See `Tracker`."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def results(self, values: Values, verdict: str) -> None:
        """See `Tracker`; parameters and results together are a row of the page HPARAMS."""
        self._writer.add_hparams(_parameters(self._recipe) | {"verdict": verdict}, dict(values), run_name=".")
        if (self._folder / "report.md").exists():
            self._writer.add_text("report", (self._folder / "report.md").read_text(encoding="utf-8"))

    def close(self, status: str) -> None:
        """See `Tracker`."""
        self._writer.close()
