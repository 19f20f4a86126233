"""Stage 3: the teacher's knowledge into the student."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgekd.distillers import terms
from edgekd.files import sha256_json, write_atomic
from edgekd.nets import count_macs, count_parameters
from edgekd.stages.bench import Bench
from edgekd.tasks.classification import accuracy, expected_calibration_error, top1_agreement
from edgekd.train import Plan, Stage, evaluate, fit, load_checkpoint, probe


def run(bench: Bench) -> dict[str, Any]:
    """Metrics `distill` and `student_float`; leaves ``3-distilled.safetensors``."""
    from safetensors.torch import save_file

    recipe = bench.recipe.distill
    student = bench.space.build(bench.genome, torch.Generator().manual_seed(bench.recipe.seed))
    plan, rates = choose_plan(bench, student)
    bench.run.reporter.say(f"  training in {plan}: " + ", ".join(f"{k} {v:.0f}/s" for k, v in rates.items()))
    history = fit(
        Stage(
            name="distill",
            model=student,
            views=bench.views,
            labels=bench.labels,
            teacher=bench.targets,
            terms=terms(recipe.method),
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            ema_decay=recipe.ema_decay,
            seed=bench.recipe.seed,
            plan=plan,
            checkpoint=bench.run.folder / "checkpoints" / f"distill-{_key(bench)}.pt",
            selection=bench.selection,
        ),
        bench.run.reporter.step,
    )
    state = {name: value.contiguous() for name, value in student.state_dict().items()}
    write_atomic(bench.run.folder / "3-distilled.safetensors", lambda path: save_file(state, path))
    logits = evaluate(student, bench.validation_inputs).numpy()
    labels = bench.data.validation_labels
    right = accuracy(logits, labels)
    bench.run.reporter.say(f"  student in float: {100 * right:.2f} %")
    return {
        "distill": {
            "method": recipe.method,
            "probe": {"chosen": str(plan), "images_per_second": rates},
            "history": history,
        },
        "student_float": {
            "accuracy": right,
            "parameters": count_parameters(student),
            "macs": count_macs(student, bench.spec.input_shape),
            "size_mib": 4 * count_parameters(student) / 2**20,
            "top1_agreement": top1_agreement(logits, bench.teacher_logits),
            "expected_calibration_error": expected_calibration_error(logits, labels),
            "negative_flips": float(
                np.mean((bench.teacher_logits.argmax(1) == labels) & (logits.argmax(1) != labels))
            ),
            "genome": list(bench.genome),
            "architecture": list(bench.space.describe(bench.genome)),
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
    stored = load_checkpoint(bench.run.folder / "checkpoints" / f"distill-{_key(bench)}.pt")
    if stored is not None:
        return Plan(**stored["plan"]), {}
    inputs = bench.views.batch(0, torch.arange(min(bench.recipe.distill.batch_size, len(bench.views))))
    return probe(student, inputs, bench.recipe.threads)
