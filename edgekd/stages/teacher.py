"""Stage 1: the teacher and the data, checked against each other."""

from __future__ import annotations

from typing import Any

import torch

from edgekd.files import write_json
from edgekd.sources import summary
from edgekd.stages.bench import Bench
from edgekd.stages.others import check_others
from edgekd.teacher import check_teacher


def run(bench: Bench) -> dict[str, Any]:
    """Metrics `data` and `teacher`; leaves ``1-teacher.json``."""
    data, teacher = bench.data, bench.teacher
    accuracy = check_teacher(teacher, torch.from_numpy(bench.teacher_logits), data.validation_labels)
    metrics = {
        "data": summary(data)
        | {
            "train": len(bench.labels),
            "labelled": int((bench.labels >= 0).sum()),
            "selection": len(bench.split[1]),
            "pool": bench.training.pool,
        },
        "teacher": {
            "name": teacher.name,
            "accuracy": accuracy,
            "parameters": teacher.parameters,
            "macs": teacher.macs,
            "size_mib": teacher.size_mib,
            "size_kind": "float32 weights" if teacher.model is not None else "file",
            "sha256": teacher.sha256,
            "runtime": teacher.runtime,
            "logits_max_abs_diff": teacher.logits_max_abs_diff,
            "others": _others(bench),
        },
    }
    write_json(bench.run.folder / "1-teacher.json", metrics)
    if metrics["data"]["labelled"] < metrics["data"]["train"]:
        bench.run.reporter.say(_unlabelled(metrics["data"]))
    bench.run.reporter.say(
        f"  teacher {teacher.name}: {100 * accuracy:.2f} % of {len(data.validation_labels)} validation "
        f"images; its logits come from {teacher.runtime}"
    )
    return metrics


def _others(bench: Bench) -> list[dict[str, Any]]:
    """The further teachers, checked."""
    if not bench.others:
        return []
    slices = [phase.recipe.options.get("slices", {}) for phase in bench.trainings]
    subsets: list[list[int]] = next((own.get("subsets", []) for own in slices if own.get("specialists")), [])
    rows = check_others(bench.others, bench.validation_inputs, bench.data.validation_labels, subsets)
    for row in rows:
        bench.run.reporter.say(f"  further teacher {row['name']}: {100 * row['accuracy']:.2f} %")
    return rows


def _unlabelled(facts: dict[str, Any]) -> str:
    """What the training images are, where some have no label."""
    pool = facts["pool"]
    said = f"  {facts['train']} training images, {facts['labelled']} of them with a label"
    if pool is None:
        return said
    return (
        f"{said}; {pool['kept']} of {pool['found']} of the pool, "
        f"{pool['copies_of_held_out']} left out as copies of validation or held-out images"
    )
