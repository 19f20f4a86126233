"""What the quantization of an ONNX file works on: the model, its samples in three parts, how it is run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgekd.backends import backend
from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.errors import BackendError, DataError
from edgekd.files import read_json, write_bytes, write_json
from edgekd.quantize.observe import not_finite
from edgekd.quantize.onnx_file import FloatModel, activation_bytes
from edgekd.quantize.quality import Kind, Quality, divergence, judge, kind_of_output
from edgekd.quantize.samples import Feeds, Samples, digest
from edgekd.run import Reporter
from edgekd.selection import farthest_first, softmax

Array = NDArray[np.float32]
_BATCH = 16
_ACTIVATIONS = 384 * 2**20  # bytes
_CHOOSE_SECONDS, _REPORT_SECONDS, _ROUGH_SECONDS = 3.0, 20.0, 0.4  # of the float model, for each look
CHOICES = ("stratified", "random", "coverage")


@dataclass(frozen=True)
class Parts:
    """Rows of samples: `calibration` fits, `choice` decides between tries, `report` is looked at once.
    `train` holds the calibration rows and whatever else is neither of the others."""

    calibration: NDArray[np.int64]
    choice: NDArray[np.int64]
    report: NDArray[np.int64]
    overlap: bool
    train: NDArray[np.int64]


@dataclass
class Job:
    """One file, one set of samples, one folder for what is made."""

    model: FloatModel
    samples: Samples
    folder: Path
    reporter: Reporter
    seed: int
    calibration_images: int
    choice: str = "stratified"
    trains: bool = False  # then two thirds of the samples are kept for it

    @cached_property
    def batch_size(self) -> int:
        """Samples a call: as many as keep what the graph holds between its operators, all of which is looked
        at, small."""
        return self.model.batch or max(1, min(_BATCH, _ACTIVATIONS // max(activation_bytes(self.model), 1)))

    def batches(self, rows: NDArray[np.int64], what: str = "") -> Iterator[Feeds]:
        """The inputs of these rows; a file with a fixed batch gets exactly so many samples a call. `what`
        names a progress bar."""
        if not self.samples.whole_calls and self.model.batch:
            rows = rows[: len(rows) // self.model.batch * self.model.batch]
        calls = len(rows) if self.samples.whole_calls else math.ceil(len(rows) / self.batch_size)
        for done, feeds in enumerate(self.samples.batches(rows, self.batch_size)):
            if what:
                self.reporter.step(what, done, calls)
            yield feeds
        if what:
            self.reporter.step(what, calls, calls)

    def outputs(self, model: onnx.ModelProto, rows: NDArray[np.int64], what: str = "") -> Array:
        """The first output on ONNX Runtime, optimised, of these rows; `what` as in `batches`."""
        session = OnnxRuntimeBackend().open_graph(model.SerializeToString(), optimize=True)
        first = self.model.outputs[0].name
        return np.concatenate([session.run(feeds)[first] for feeds in self.batches(rows, what)])

    def outputs_on(self, path: Path, runtime: str, precision: str, rows: NDArray[np.int64]) -> Array:
        """The first output of a file on a runtime.

        Raises:
            BackendError: the runtime refuses the file.
        """
        session = backend(runtime).open(path, precision=precision)
        return np.concatenate([session.run(feeds) for feeds in self.batches(rows)])

    @cached_property
    def float_path(self) -> Path:
        path = self.folder / "float.onnx"
        write_bytes(path, self.model.model.SerializeToString())
        return path

    @cached_property
    def parts(self) -> Parts:
        """Three parts without overlap where there are enough samples.

        Raises:
            DataError: fewer samples than one call of a file with a fixed batch needs.
        """
        if not self.samples.whole_calls and self.samples.count < (self.model.batch or 1):
            raise DataError(
                f"{self.samples.source}: {self.samples.count} samples; the file has a fixed batch of "
                f"{self.model.batch}"
            )
        made = self._kept_parts()
        if made is None:
            made = self._new_parts()
            if self.trains:
                lists = {
                    name: rows if name == "overlap" else rows.tolist() for name, rows in vars(made).items()
                }
                write_json(self.folder / "parts.json", {"of": self._identity, "parts": lists})
        return made

    @property
    def _identity(self) -> list[Any]:
        """What `parts` follow from, but for the speed of this machine, by which large ones are cut."""
        source = [self.samples.source, self.samples.count]
        return [self.model.sha256, *source, self.seed, self.calibration_images, self.choice]

    def _kept_parts(self) -> Parts | None:
        """Of a run that was interrupted in its training, which goes on with the same samples."""
        path = self.folder / "parts.json"
        held = read_json(path) if self.trains and path.exists() else None
        if held is None or held["of"] != self._identity:
            return None
        overlap = bool(held["parts"].pop("overlap"))
        rows = {name: np.array(value, np.int64) for name, value in held["parts"].items()}
        return Parts(rows["calibration"], rows["choice"], rows["report"], overlap, rows["train"])

    def _new_parts(self) -> Parts:
        order = np.random.default_rng(self.seed).permutation(self.samples.count).astype(np.int64)
        seconds = self._seconds_of_one(order)
        most = {what: max(self.batch_size, int(limit / seconds)) for what, limit in
                (("choice", _CHOOSE_SECONDS), ("report", _REPORT_SECONDS))}  # fmt: skip
        third = len(order) // 3
        if third < 2 * self.batch_size and third < 32:
            every = np.sort(order)
            return Parts(every[: self.calibration_images], every[: most["choice"]], every, True, every)
        calibration = self._calibration(order[:third] if self.choice == "random" else order[: 2 * third])
        rest = order[2 * third :] if self.trains else order[~np.isin(order, calibration)]
        half = min(len(rest) // 2, most["choice"], 512)
        judged = np.sort(rest[:half]), np.sort(rest[half:][: most["report"]])
        train = np.sort(order[~np.isin(order, np.concatenate(judged))])
        return Parts(calibration, *judged, False, train)

    def _calibration(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Half of the rows at most: as they come, evenly by class, or spread over the model's outputs."""
        count = min(self.calibration_images, max(len(rows) // 2, 2))
        if self.choice == "coverage":
            return self._spread(rows[: 4 * count], count)
        labels = self.samples.labels
        if self.choice == "random" or labels is None:
            return np.sort(rows[:count])
        by_class = [rows[labels[rows] == label] for label in np.unique(labels)]
        longest = max(map(len, by_class))
        turns = [part[i] for i in range(longest) for part in by_class if i < len(part)]
        return np.sort(np.array(turns[:count], np.int64))

    def _spread(self, rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Farthest first in the model's probability space, as PCoreSet does (`edgekd.selection`)."""
        logits = self.outputs(self.model.model, rows)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise DataError(
                f"calibration by coverage needs a classifier; the first output has shape {logits.shape}",
                "--set quantize.calibration_choice=random",
            )
        chosen, _ = farthest_first(softmax(logits), softmax(logits)[:0], min(count, len(logits)))
        return np.sort(rows[chosen])

    def _seconds_of_one(self, order: NDArray[np.int64]) -> float:
        feeds = next(self.batches(order[: self.batch_size]))
        session = OnnxRuntimeBackend().open_graph(self.model.model.SerializeToString(), optimize=True)
        session.run(feeds)
        started = time.process_time()
        session.run(feeds)
        count = 1 if self.samples.whole_calls else self.batch_size
        return max((time.process_time() - started) / count, 1e-5)

    @cached_property
    def exact(self) -> dict[str, Array]:
        """The float model's first output on the parts `choice` and `report`.

        Raises:
            DataError: it is not finite, or no float tensor.
        """
        found = {
            name: self.outputs(self.model.model, getattr(self.parts, name), "float outputs")
            for name in ("choice", "report")
        }
        for name, made in found.items():
            if made.dtype != np.float32:
                raise DataError(
                    f"the float model's output '{self.model.outputs[0].name}' is {made.dtype}",
                    "its first output must be float32",
                )
            if not np.isfinite(made).all():
                raise DataError(*not_finite(self.model.model, self._first_not_finite(name)))
        return found

    def _first_not_finite(self, part: str) -> Feeds:
        """The call whose output holds NaN or infinity."""
        session = OnnxRuntimeBackend().open_graph(self.model.model.SerializeToString(), optimize=True)
        name = self.model.outputs[0].name
        calls = self.batches(getattr(self.parts, part))
        return next(feeds for feeds in calls if not np.isfinite(session.run(feeds)[name]).all())

    def labels(self, part: str) -> NDArray[np.int64] | None:
        """Labels of a part, cut to whole calls as `batches` does; None without labels."""
        if self.samples.labels is None or self.exact[part].ndim != 2:
            return None
        rows: NDArray[np.int64] = getattr(self.parts, part)
        return self.samples.labels[rows[: len(self.exact[part])]]

    @property
    def kind(self) -> Kind:
        return kind_of_output(self.exact["report"], self.labels("report"))

    def quality(self, got: Array, part: str) -> Quality:
        """What the output `got` of a part loses."""
        return judge(self.exact[part], got, self.labels(part))

    def damage(self, model: onnx.ModelProto, *, rough: bool = False) -> float:
        """Divergence on the samples that choose; infinite for a graph that ONNX Runtime refuses."""
        rows, exact = self.parts.choice, self.exact["choice"]
        if rough:
            few = max(self.batch_size, int(_ROUGH_SECONDS / _CHOOSE_SECONDS * len(rows)))
            rows = rows[:few]
            exact = exact[: len(rows)]
        try:
            got = self.outputs(model, rows)
        except BackendError:
            return float("inf")
        return divergence(exact[: len(got)], got)

    def drop(self, model: onnx.ModelProto, runtime: str) -> float:
        """Points lost on the samples that choose, less one standard error: what is within the noise of these
        samples is no reason to leave an operator in float. Infinite where the runtime refuses the graph."""
        path = self.folder / "trial.onnx"
        write_bytes(path, model.SerializeToString())
        try:
            found = self.quality(self.outputs_on(path, runtime, "f32", self.parts.choice), "choice")
        except BackendError:
            return float("inf")
        finally:
            path.unlink()
        return found.drop - found.standard_error

    def calibration_facts(self) -> dict[str, Any]:
        """What the record keeps of the samples."""
        parts = self.parts
        return {
            "source": self.samples.source,
            "samples": self.samples.count,
            "choice": self.choice,
            "calibration": len(parts.calibration),
            "deciding": len(parts.choice),
            "reporting": len(parts.report),
            "overlap": parts.overlap,
            "training": len(parts.train) if self.trains else 0,
            "labels": self.samples.labels is not None,
            "sha256": digest(self.samples, parts.calibration, self.batch_size),
        }
