"""Stage 3: the teacher's knowledge into the student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.files import read_json, sha256_file, sha256_json, write_atomic
from edgekd.nets import count_macs, count_parameters
from edgekd.plan import Plan, probe
from edgekd.stages.bench import Bench
from edgekd.stages.lesson import prepare, teacher_for
from edgekd.tasks.classification import accuracy, expected_calibration_error, top1_agreement
from edgekd.train import Stage, evaluate, fit, load_checkpoint
from edgekd.user_model import STUDENT, load_weights


def run(bench: Bench) -> dict[str, Any]:
    """Metrics `distill` and `student_float`; leaves ``3-distilled.safetensors``. Weights that are given are
    not trained."""
    recipe = bench.recipe.distill
    student = bench.untrained(bench.blueprint)
    if recipe.weights:
        path = Path(recipe.weights).expanduser()
        load_weights(student, path, STUDENT)
        bench.run.reporter.say(f"  weights given, not trained: {path}")
        given = {"source": recipe.weights, "sha256": sha256_file(path)}
        return _finish(bench, student, {"method": None, "weights": given, "probe": None, "history": []})
    lesson = prepare(bench.classroom, student)
    plan, rates = choose_plan(bench, student)
    bench.run.reporter.say(f"  training in {plan}: " + ", ".join(f"{k} {v:.0f}/s" for k, v in rates.items()))
    views = bench.views_on(plan.device)
    history = fit(
        Stage(
            name="distill",
            model=lesson.model,
            views=views,
            labels=bench.labels,
            teacher=teacher_for(bench.classroom, lesson, views, plan),
            distillers=lesson.distillers,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            ema_decay=recipe.ema_decay,
            seed=bench.recipe.seed,
            plan=plan,
            checkpoint=bench.run.folder / "checkpoints" / f"distill-{_key(bench)}.pt",
            selection=bench.selection,
            optimizer=recipe.optimizer,
            milestones=recipe.milestones,
            hard_weight=recipe.hard_weight,
            ranks=bench.ranks,
        ),
        bench.run.reporter.step,
    )
    student = lesson.deploy()
    probed = {"chosen": str(plan), "images_per_second": rates}
    return _finish(bench, student, {"method": recipe.method, "probe": probed, "history": history})


def _finish(bench: Bench, student: torch.nn.Module, distilled: dict[str, Any]) -> dict[str, Any]:
    """Write the weights and measure the float student; `distilled` is how it came by them."""
    from safetensors.torch import save_file

    if not bench.ranks.first:
        return {}
    # Copies, because the file format refuses tensors that share memory.
    state = {k: v.clone(memory_format=torch.contiguous_format) for k, v in student.state_dict().items()}
    write_atomic(bench.run.folder / "3-distilled.safetensors", lambda path: save_file(state, path))
    logits = evaluate(student, bench.validation_inputs).numpy()
    labels = bench.data.validation_labels
    right = accuracy(logits, labels)
    bench.run.reporter.say(f"  student in float: {100 * right:.2f} %")
    return {
        "distill": distilled,
        "student_float": {
            "accuracy": right,
            "parameters": count_parameters(student),
            "macs": count_macs(student, bench.spec.input_shape),
            "size_mib": 4 * count_parameters(student) / 2**20,
            "top1_agreement": top1_agreement(logits, bench.teacher_logits),
            "expected_calibration_error": expected_calibration_error(logits, labels),
            "fidelity": bench.fidelity(logits),
            "negative_flips": float(
                np.mean((bench.teacher_logits.argmax(1) == labels) & (logits.argmax(1) != labels))
            ),
            "genome": list(bench.genome),
            "architecture": read_json(bench.run.folder / "2-student.json")["architecture"],
        },
    }


def _key(bench: Bench) -> str:
    """A checkpoint belongs to one recipe and one student; another one must not continue it."""
    recipe = bench.run.record["recipe"]
    stages = bench.run.record["stages"]
    before = [stages["teacher"]["inputs_sha256"], stages["search"]["outputs_sha256"]]
    return sha256_json([recipe["distill"], recipe["seed"], before])[:12]


def choose_plan(bench: Bench, student: torch.nn.Module) -> tuple[Plan, dict[str, float]]:
    """The plan of an interrupted training, so that it continues exactly; else the fastest one measured."""
    ranks = bench.ranks
    if not ranks.first:
        return ranks.of_first((Plan(), {}))
    stored = load_checkpoint(bench.run.folder / "checkpoints" / f"distill-{_key(bench)}.pt")
    if stored is not None:
        return ranks.of_first((Plan(**stored["plan"]), {}))
    own = max(2, bench.recipe.distill.batch_size // ranks.count)
    inputs = bench.views.batch(torch.arange(min(own, len(bench.views))))
    plan, rates = probe(student, inputs, ranks.threads(bench.recipe.threads), device=bench.device)
    return ranks.of_first((replace(plan, compiled=bench.recipe.distill.compile), rates))
