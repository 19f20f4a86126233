"""Training-free scores of given students, without a run: what `edgekd proxies score` prints."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgekd.errors import UsageError
from edgekd.proxies import Trial, check_teacher, proxy
from edgekd.ranking import rank_sum
from edgekd.recipe import Recipe
from edgekd.run import Run, Silent
from edgekd.stages.bench import Bench
from edgekd.stages.given import build_student, check_shape, cost_of
from edgekd.stages.search import predictor, scoring_batch, teacher_outputs
from edgekd.stages.student import Blueprint, given_blueprint
from edgekd.target import find_target


def score_students(
    recipe: Recipe, score: str, students: Sequence[str], genomes: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """Costs and terms of each student, and of several students their rank sum, 0 to 1.

    `students` are as `search.student`; `genomes` belong to the space, and the restrictions, of the one
    ``2-student.json`` among them, else to `search.space`. The batch, the weights and the labels are those a
    search by this recipe would use. A score that is not finite is None.

    Raises:
        UsageError: no student, no such score, or one that this teacher cannot serve.
        StudentError: a student cannot be read or built, or does not fit the data.
    """
    made = proxy(score)
    blueprints = _blueprints(recipe, students, genomes)
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        bench = Bench(Run(Path(folder), recipe, find_target(recipe.target), Silent()))
        inputs, labels = scoring_batch(bench)
        teacher = None
        if "teacher" in made.needs:
            teacher = teacher_outputs(bench, inputs)
            check_teacher(score, made.needs, teacher)
        model = predictor(bench, next((b.space for b in blueprints.values()), ""))
        rows: list[dict[str, Any]] = []
        try:
            for name, blueprint in blueprints.items():
                student = build_student(bench, blueprint, name)
                check_shape(student, bench, name)
                cost, reason = cost_of(bench, blueprint, student, model)
                classes = len(bench.spec.classes)
                terms = made.measure(Trial(student, inputs, labels, teacher, classes, recipe.seed))
                rows.append(
                    {
                        "student": name,
                        "parameters": cost.parameters,
                        "macs": cost.macs,
                        "latency_ms": cost.latency_ms,
                        "reason": reason,
                        "terms": {
                            key: value if math.isfinite(value) else None for key, value in terms.items()
                        },
                        "rank_sum": None,
                    }
                )
        finally:
            model.close()
        _rank(rows)
        return {
            "score": score,
            "needs": list(made.needs),
            "teacher": recipe.teacher.source if teacher is not None else None,
            "teacher_state": recipe.search.teacher_state if teacher is not None else None,
            "images": len(inputs),
            "seed": recipe.seed,
            "latency": {
                "kind": model.kind,
                "device": model.device,
                "error_percent": model.error_percent,
                "table": None if model.table is None else model.table.facts,
            },
            "students": rows,
        }


def _blueprints(
    recipe: Recipe, students: Sequence[str], genomes: Sequence[tuple[int, ...]]
) -> dict[str, Blueprint]:
    """What to build, by the name it is printed with."""
    found = {source: given_blueprint(source) for source in students}
    if genomes:
        files = [blueprint for blueprint in found.values() if not blueprint.factory]
        if len(files) > 1:
            raise UsageError("--genome with several 2-student.json: whose space?", "give one of them alone")
        basis = files[0] if files else Blueprint(space=recipe.search.space)
        named = {
            ",".join(map(str, genome)): msgspec.structs.replace(basis, genome=genome) for genome in genomes
        }
        found |= named
    if not found:
        raise UsageError("there is no student to score", "add --student package.module:factory, or --genome")
    return found


def _rank(rows: list[dict[str, Any]]) -> None:
    """The rank sum among the students whose terms are all finite; of one alone there is none."""
    known = [row for row in rows if row["terms"] and None not in row["terms"].values()]
    known = [row for row in known if row["terms"].keys() == known[0]["terms"].keys()]
    if len(known) > 1:
        for row, value in zip(known, rank_sum([row["terms"] for row in known]), strict=True):
            row["rank_sum"] = float(value)
