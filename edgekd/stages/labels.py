"""`edgekd label`: a teacher annotates a corpus; what its labels are worth is measured on a gold set.

The specification of IPTC's teacher and student (news classification without human labels): one label with a
confidence, agreement with people on a small set, and a learning curve over the number of automatic labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd import __version__
from edgekd.errors import DataError, UsageError
from edgekd.files import write_atomic, write_json, write_text
from edgekd.recipe import Recipe
from edgekd.report.label_page import label_page
from edgekd.run import Reporter
from edgekd.sources.unlabeled import Corpus
from edgekd.stages.annotator import Annotator, class_names, open_annotator, read_labelled, read_pool
from edgekd.stages.curve import Course, Labelled, check_sizes, learning_curve
from edgekd.stages.picks import answers_beside, as_csv
from edgekd.tasks.agreement import agreement
from edgekd.teacher import load_teacher


@dataclass(frozen=True)
class Assignment:
    """What to label and how to judge it. `classes`: names in the order of the teacher's outputs, or empty;
    `gold`: a source of images with human labels, or empty; `curve`: numbers of labels, ascending."""

    out: Path
    classes: tuple[str, ...] = ()
    gold: str = ""
    min_confidence: float = 0.0
    curve: tuple[int, ...] = ()
    curve_steps: int = 600

    def check(self) -> None:
        """Refuse what cannot be done before any image is read.

        Raises:
            UsageError: an unknown form of file, or a curve without a gold set.
        """
        if self.out.suffix not in (".npz", ".csv"):
            raise UsageError(f"--out {self.out}: labels are written as .npz or .csv", "--out labels.npz")
        if self.curve and not self.gold:
            raise UsageError(
                "--curve measures students on images with human labels, and there are none",
                "--gold FOLDER or FILE.npz",
            )


def label(recipe: Recipe, task: Assignment, reporter: Reporter) -> dict[str, Any]:
    """Label the images that ``data.unlabeled`` names; returns the report, which also stands in
    ``OUT.report.json`` and ``OUT.report.html``.

    Raises:
        UsageError: see `Assignment.check`.
        DataError: no images, none that is sure enough, a gold set with other classes, a curve too long.
    """
    task.check()
    loaded = load_teacher(recipe.teacher)
    corpus = read_pool(recipe, loaded, reporter)
    shape = corpus.images.shape[1:]
    gold = read_labelled(recipe, task.gold, shape) if task.gold else None
    classes = class_names(loaded, shape, task.classes, gold[2] if gold else ())
    human = Labelled(gold[0], gold_labels(gold[1], gold[2], classes)) if gold else None
    folder = answers_beside(task.out)
    annotator = open_annotator(recipe, loaded, corpus.images, classes, folder, reporter)
    probabilities = annotator.probabilities(corpus.images)
    confidence = probabilities.max(1).astype(np.float32)
    kept = np.flatnonzero(confidence >= task.min_confidence)
    if not len(kept):
        raise DataError(
            f"none of {len(confidence)} images reaches a confidence of {task.min_confidence}; the largest is "
            f"{confidence.max():.3f}",
            "lower --min-confidence",
        )
    check_sizes(task.curve, len(kept))
    report = _facts(recipe, task, annotator, corpus, probabilities, kept)
    if human is not None:
        report["agreement"] = agreement(human.labels, annotator.probabilities(human.images), classes)
    answers = Labelled(corpus.images[kept], probabilities[kept].argmax(1), probabilities[kept])
    if human is not None and task.curve:
        course = Course(annotator.teacher.spec, task.curve_steps, recipe.seed)
        report["curve"] = learning_curve(answers, human, course, task.curve, reporter.step)
    _write(task.out, corpus, kept, answers, human, report)
    write_json(task.out.with_suffix(".report.json"), report)
    write_text(task.out.with_suffix(".report.html"), label_page(report))
    return report


def gold_labels(
    labels: NDArray[np.int64], names: tuple[str, ...], classes: tuple[str, ...]
) -> NDArray[np.int64]:
    """Labels of a gold set as the teacher numbers its classes; the set may lack some of them.

    Raises:
        DataError: the gold set has a class that the teacher does not know.
    """
    if unknown := sorted(set(names) - set(classes)):
        raise DataError(
            f"the gold set has classes that the teacher does not know: {', '.join(unknown[:12])}; it knows "
            f"{', '.join(classes[:12])}",
            "rename the class folders, or name the teacher's classes in the order of its outputs: --classes",
        )
    number = np.array([classes.index(name) for name in names], np.int64)
    translated: NDArray[np.int64] = number[labels]
    return translated


def _facts(
    recipe: Recipe,
    task: Assignment,
    annotator: Annotator,
    corpus: Corpus,
    probabilities: NDArray[np.float16],
    kept: NDArray[np.int64],
) -> dict[str, Any]:
    """The report without what a gold set tells."""
    teacher, given = annotator.teacher, probabilities.argmax(1)
    classes = teacher.spec.classes
    found = np.bincount(given, minlength=len(classes))
    left = np.bincount(given[kept], minlength=len(classes))
    return {
        "edgekd_version": __version__,
        "teacher": {"name": teacher.name, "sha256": teacher.sha256, "runtime": teacher.runtime},
        "preprocessing": asdict(teacher.spec.preprocessing),
        "preprocessing_sha256": annotator.preprocessing_sha256,
        "classes": list(classes),
        "images": {
            "source": recipe.data.unlabeled,
            "found": len(probabilities),
            "kept": len(kept),
            "below_min_confidence": len(probabilities) - len(kept),
            "min_confidence": task.min_confidence,
            "skipped": list(corpus.skipped),
            "by_class": [
                {"class": name, "found": int(a), "kept": int(b)}
                for name, a, b in zip(classes, found, left, strict=True)
            ],
        },
        "gold": task.gold or None,
        "agreement": None,
        "curve": None,
        "out": str(task.out),
    }


def _write(
    out: Path,
    corpus: Corpus,
    kept: NDArray[np.int64],
    answers: Labelled,
    human: Labelled | None,
    report: dict[str, Any],
) -> None:
    """The labels as a file. An ``.npz`` holds the images too, and the gold set as validation part, so that
    ``--data`` reads it; a ``.csv`` names the images."""
    assert answers.probabilities is not None
    confidence = answers.probabilities.max(1).astype(np.float32)
    digests = report["teacher"]["sha256"], report["preprocessing_sha256"]
    names = [corpus.names[row] for row in kept]
    classes = report["classes"]
    if out.suffix == ".csv":
        heads = ("index", "name", "label", "class", "confidence", "teacher_sha256", "preprocessing_sha256")
        rows = [
            [int(row), name, int(own), classes[own], f"{sure:.4f}", *digests, *(f"{p:.4g}" for p in soft)]
            for row, name, own, sure, soft in zip(
                kept, names, answers.labels, confidence, answers.probabilities, strict=True
            )
        ]
        write_text(out, as_csv((*heads, *(f"p:{name}" for name in classes)), rows))
        return
    arrays: dict[str, Sequence[Any] | NDArray[Any]] = {
        "train_images": answers.images,
        "train_labels": answers.labels.astype(np.int64),
        "classes": np.array(classes),
        "confidence": confidence,
        "probabilities": answers.probabilities,
        "index": kept,
        "names": np.array(names),
        "teacher_sha256": np.array(digests[0]),
        "preprocessing_sha256": np.array(digests[1]),
    }
    if human is not None:
        arrays |= {"val_images": human.images, "val_labels": human.labels}

    def store(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomic(out, store)
