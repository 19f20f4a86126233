"""`edgekd select`: which images of a pool a person should label next, within a budget."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import DataError
from edgekd.files import write_text
from edgekd.recipe import Recipe
from edgekd.run import Reporter
from edgekd.selection import Pool, choose, entropy
from edgekd.sources.unlabeled import without_copies
from edgekd.stages.annotator import class_names, open_annotator, read_labelled, read_pool
from edgekd.teacher import load_teacher

COLUMNS = ("rank", "index", "name", "class", "confidence", "entropy", "score", "reason")


def pick(
    recipe: Recipe, labelled: str, budget: int, strategy: str, out: Path, reporter: Reporter
) -> dict[str, Any]:
    """Choose `budget` images of ``data.unlabeled`` and write them to `out` as CSV, the first to label first.

    `labelled` is a source of images that have a label already, or empty; images of the pool with exactly
    their pixels are not chosen. The answers of the teacher are kept beside `out`.

    Raises:
        DataError: no pool, one smaller than the budget, or labelled images with other classes.
    """
    loaded = load_teacher(recipe.teacher)
    corpus = read_pool(recipe, loaded, reporter)
    shape = corpus.images.shape[1:]
    known = read_labelled(recipe, labelled, shape) if labelled else None
    rows = without_copies(corpus.images, [known[0]] if known else [])
    if not len(rows):
        raise DataError(f"all {len(corpus.images)} images of the pool are labelled already")
    classes = class_names(loaded, shape, (), known[2] if known else ())
    if known and known[2] != classes:
        raise DataError(
            f"the labelled images have the classes {', '.join(known[2][:12])}; the teacher has "
            f"{', '.join(classes[:12])}",
            "use the same class folders, in the same order",
        )
    images = corpus.images[rows]
    annotator = open_annotator(recipe, loaded, images, classes, answers_beside(out), reporter)
    probabilities = annotator.probabilities(images).astype(np.float64)
    start = annotator.probabilities(known[0]).astype(np.float64) if known else probabilities[:0]
    labels = known[1] if known else np.zeros(0, np.int64)
    embeddings = annotator.embeddings(images) if strategy == "coreset" else None
    start_embeddings = None
    if embeddings is not None:
        start_embeddings = annotator.embeddings(known[0]) if known else embeddings[:0]
    pool = Pool(probabilities, start, labels, embeddings, start_embeddings)
    uncertain = entropy(probabilities)
    picks = [
        {
            "rank": rank,
            "index": int(rows[one.index]),
            "name": corpus.names[rows[one.index]],
            "class": classes[int(probabilities[one.index].argmax())],
            "confidence": round(float(probabilities[one.index].max()), 4),
            "entropy": round(float(uncertain[one.index]), 4),
            "score": round(one.score, 6),
            "reason": one.reason,
        }
        for rank, one in enumerate(choose(pool, budget, strategy, recipe.seed), 1)
    ]
    write_text(out, as_csv(COLUMNS, [[row[key] for key in COLUMNS] for row in picks]))
    return {
        "strategy": strategy,
        "budget": budget,
        "pool": len(corpus.images),
        "labelled_already": len(corpus.images) - len(rows),
        "start": len(labels),
        "skipped": list(corpus.skipped),
        "teacher": annotator.teacher.name,
        "teacher_sha256": annotator.teacher.sha256,
        "preprocessing_sha256": annotator.preprocessing_sha256,
        "picks": picks,
        "out": str(out),
    }


def answers_beside(out: Path) -> Path:
    """The folder in which a teacher's answers are kept."""
    return out.with_suffix(".answers")


def as_csv(heads: tuple[str, ...], rows: list[list[Any]]) -> str:
    """Rows as comma-separated text, quoted where needed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue()
