"""Accuracy of two models on the same samples, and of the candidate's runtime against its own graph."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.checks import Check, accuracy_check, parity_check, wilson_interval
from edgekd.errors import DataError, UsageError
from edgekd.gating.subject import Normalisation, Subject, preprocess
from edgekd.profiler import Device, Protocol, Variant, evaluate
from edgekd.recipe import DataRecipe
from edgekd.sources import load_dataset

_PARITY_SAMPLES = 256
_MIN_PARITY = 0.97
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Evaluation:
    """Samples with labels: an image source (docs/data.md), or an ``.npz`` with the models' own inputs.

    `part`: "validation" of the source, or "all" of it.
    """

    source: str
    part: str = "validation"
    normalisation: Normalisation | None = None
    seed: int = 0


def accuracy_checks(
    candidate: Subject,
    reference: Subject,
    evaluation: Evaluation,
    limits: tuple[float, float | None],
    protocol: Protocol,
    device: Device,
) -> tuple[list[Check], dict[str, Any]]:
    """Lines of the gate, and the shares behind them.

    Args:
        limits: points of accuracy that may be lost; share of equal answers, `None` for no limit.

    Raises:
        DataError: the samples cannot be used.
        UsageError: a model has no scores to compare, or its preprocessing is not known.
    """
    sides = {"ref": reference, "cand": candidate}
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        labels = _write_inputs(Path(folder), sides, evaluation)
        found = _scores(Path(folder), sides, protocol, device)
    for name, scores in found.items():
        if len(labels) and scores.shape[1] <= int(labels.max()):
            raise UsageError(
                f"{sides[name if name in sides else 'cand'].given} gives {scores.shape[1]} scores a sample; "
                f"label {int(labels.max())} needs more",
                "--data needs classifiers whose first output holds one score for each class",
            )
    answers = {name: scores.argmax(axis=1) for name, scores in found.items()}
    max_drop, min_agreement = limits
    correct = {name: answers[name] == labels for name in sides}
    checks = [accuracy_check(correct["ref"], correct["cand"], max_drop_points=max_drop)]
    same = float(np.mean(answers["ref"] == answers["cand"]))
    alike = found["ref"].shape == found["cand"].shape
    difference = float(np.abs(found["ref"] - found["cand"]).max()) if alike else 0.0
    if min_agreement is not None:
        name = "agreement with the reference"
        checks.append(parity_check(same, min_agreement, len(labels), difference, name=name))
    count = len(found["graph"])
    parity = float(np.mean(answers["graph"] == answers["cand"][:count]))
    gap = float(np.abs(found["graph"] - found["cand"][:count]).max())
    name = f"agreement of {candidate.backend} with the graph as written"
    checks.append(parity_check(parity, _MIN_PARITY, count, gap, name=name))
    shares = {name: float(right.mean()) for name, right in correct.items()}
    return checks, {
        "samples": len(labels),
        "accuracy": {"reference": shares["ref"], "candidate": shares["cand"]},
        "accuracy_intervals": {
            "reference": wilson_interval(int(correct["ref"].sum()), len(labels)),
            "candidate": wilson_interval(int(correct["cand"].sum()), len(labels)),
        },
        "top1_agreement": same,
        "max_abs_diff": difference if alike and np.isfinite(difference) else None,
        "runtime_top1_agreement": parity,
        "runtime_max_abs_diff": gap if np.isfinite(gap) else None,
    }


def _scores(
    folder: Path, sides: dict[str, Subject], protocol: Protocol, device: Device
) -> dict[str, NDArray[np.float32]]:
    """(N, classes) of both sides, and under "graph" of the candidate as written, on fewer samples."""
    found = {}
    limits = Protocol(protocol.threads, 1, 1, 0, _TIMEOUT_S)
    jobs = {name: (side.measured(name), f"{name}.npz") for name, side in sides.items()}
    jobs["graph"] = (Variant("graph", "reference", str(sides["cand"].model)), "graph.npz")
    for name, (variant, data) in jobs.items():
        answers = folder / f"answers-{name}.npz"
        evaluate([variant], data=folder / data, answers=answers, protocol=limits, device=device)
        with np.load(answers, allow_pickle=False) as file:
            found[name] = file[name]
    return found


def _write_inputs(folder: Path, sides: dict[str, Subject], evaluation: Evaluation) -> NDArray[np.int64]:
    """What each side takes, ``NAME.npz``; "graph" is the beginning of the candidate's. Returns the labels."""
    path = Path(evaluation.source)
    stored = _stored(path, sides["cand"], sides["ref"]) if path.suffix.lower() == ".npz" else None
    if stored is None:
        arrays, labels = _from_images(sides, evaluation)
    else:
        arrays, labels = stored
    for name in sides:
        np.savez(folder / f"{name}.npz", **arrays[name])  # type: ignore[arg-type]
    few = {name: array[:_PARITY_SAMPLES] for name, array in arrays["cand"].items()}
    np.savez(folder / "graph.npz", **few)  # type: ignore[arg-type]
    return labels


def _stored(
    path: Path, candidate: Subject, reference: Subject
) -> tuple[dict[str, dict[str, NDArray[Any]]], NDArray[np.int64]] | None:
    """Ready inputs: one array for each input of the models, and ``labels``; None for an archive of images."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {feed.name for feed in candidate.feeds} <= set(file.files):
                return None
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}", "write it again with numpy.savez") from error
    if "labels" not in arrays or arrays["labels"].ndim != 1 or arrays["labels"].dtype.kind not in "iu":
        raise DataError(f"{path}: expected 'labels', whole numbers (N,), beside the inputs")
    labels = arrays.pop("labels").astype(np.int64)
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for name, side in (("cand", candidate), ("ref", reference)):
        found[name] = {}
        for feed in side.feeds:
            array = arrays.get(feed.name)
            if array is None:
                raise DataError(f"{path}: no array for the input '{feed.name}' of {side.given}")
            want = (len(labels), *feed.shape[1:])
            if array.shape != want or array.dtype.name != feed.dtype or not len(labels):
                got = f"{array.dtype} {array.shape}"
                raise DataError(f"{path}: '{feed.name}': expected {feed.dtype} {want}, got {got}")
            found[name][feed.name] = array
    return found, labels


def _from_images(
    sides: dict[str, Subject], evaluation: Evaluation
) -> tuple[dict[str, dict[str, NDArray[Any]]], NDArray[np.int64]]:
    """Inputs of both sides from the images of a source, each by its own preprocessing."""
    prepare = {name: preprocess(side, evaluation.normalisation) for name, side in sides.items()}
    shape = sides["cand"].feeds[0].shape
    if len(shape) != 4:
        raise UsageError(f"--data with images needs an input (1, C, H, W), got {sides['cand'].feeds[0]}")
    color = "grey" if shape[1] == 1 else "rgb"
    data = load_dataset(
        DataRecipe(source=evaluation.source),
        seed=evaluation.seed,
        image_size=(shape[2], shape[3]),
        color=color,
    )
    images: Sequence[NDArray[np.uint8]] = list(data.validation_images)
    labels = data.validation_labels
    if evaluation.part == "all":
        images = [*data.train_images, *images]
        labels = np.concatenate([data.train_labels, labels])
    classes, labels = _by_name(sides, data.classes, labels)
    for side in sides.values():
        _check_classes(side, classes)
    return {name: {side.feeds[0].name: prepare[name](images)} for name, side in sides.items()}, labels


def _by_name(
    sides: dict[str, Subject], classes: tuple[str, ...], labels: NDArray[np.int64]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The labels in the order of the bundles' classes, where the data have the same names in another one: a
    folder's classes come in the order of the alphabet."""
    orders = {side.labels for side in sides.values() if side.labels}
    if len(orders) == 1 and sorted(*orders) == sorted(classes):
        (order,) = orders
        labels = np.array([order.index(name) for name in classes])[labels]
        classes = order
    return classes, labels


def _check_classes(side: Subject, classes: tuple[str, ...]) -> None:
    """A bundle's classes are those of the data, in the same order; numbers alone say nothing of names.

    Raises:
        DataError: they are not.
    """
    named = not all(name.isdigit() for name in classes)
    if side.labels and (tuple(side.labels) != tuple(classes) if named else len(classes) > len(side.labels)):
        own = [name for name in side.labels if name not in classes] or side.labels
        others = [name for name in classes if name not in side.labels] or classes
        raise DataError(
            f"{side.given}: its classes are {_some(own)}, those of the data {_some(others)}",
            "the names must agree, and the order of two bundles; an .npz names its classes under 'classes'",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ("…" if len(names) > 5 else "")
