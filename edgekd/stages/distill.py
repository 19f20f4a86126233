"""Stage 3: the teacher's knowledge into the student."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.blocks import deployed
from edgekd.distillers import plain
from edgekd.files import read_json, sha256_file, sha256_json, write_atomic
from edgekd.nets import count_macs, count_parameters
from edgekd.quantize.capture import capture
from edgekd.stages.assistants import choose_assistants, teach_assistants
from edgekd.stages.bench import Bench
from edgekd.stages.curriculum import SUGGEST, Phase, quantized_phase
from edgekd.stages.lesson import prepare, prepare_graph
from edgekd.stages.preparation import check_preparable, prepared_teacher
from edgekd.stages.search import quantize_mode
from edgekd.stages.suggest import suggest
from edgekd.stages.training import train
from edgekd.tasks.classification import accuracy, expected_calibration_error, top1_agreement
from edgekd.train import evaluate
from edgekd.user_model import STUDENT, load_weights


def run(bench: Bench) -> dict[str, Any]:
    """Metrics `distill` and `student_float`; leaves ``3-distilled.safetensors``. Weights that are given are
    not trained."""
    recipe = bench.recipe.distill
    student = bench.untrained(bench.blueprint)
    if recipe.weights:
        path = Path(recipe.weights).expanduser()
        student = deployed(student)
        load_weights(student, path, STUDENT)
        bench.run.reporter.say(f"  weights given, not trained: {path}")
        given = {"source": recipe.weights, "sha256": sha256_file(path)}
        return _finish(bench, student, {"method": None, "weights": given, "probe": None, "history": []})
    key = _key(bench)
    _rehearse(bench, copy.deepcopy(student))
    if finalist := _finalist(bench):
        network = deployed(student)
        load_weights(network, bench.run.folder / finalist["weights"], STUDENT)
        bench.run.reporter.say("  trained in the search's second stage")
        return _finish(bench, network, _facts(bench, finalist["history"], finalist["probe"]))
    teacher, preparation = prepared_teacher(bench, key) if recipe.prepare else (bench.teacher, None)
    phases, suggestion = bench.trainings, None
    if recipe.method == SUGGEST:
        chosen, suggestion = suggest(bench, teacher, key)
        phases = (chosen,)
    assistants: list[dict[str, Any]] = []
    if recipe.assistants:
        macs = count_macs(deployed(copy.deepcopy(student)), bench.spec.input_shape)
        teacher, assistants = teach_assistants(bench, phases, teacher, macs, key)
    trained = train(bench, student, phases, teacher, "distill", key)
    probed = {"chosen": str(trained.plan), "images_per_second": trained.rates}
    distilled = {
        **_facts(bench, trained.history, probed, phases),
        "preparation": preparation,
        "assistants": assistants,
        "suggestion": suggestion,
    }
    return _finish(bench, deployed(trained.network), distilled)


def _facts(
    bench: Bench, history: list[dict[str, float]], probed: dict[str, Any], phases: tuple[Phase, ...] = ()
) -> dict[str, Any]:
    """What the record says of the trainings of the student."""
    phases = phases or bench.trainings
    return {
        "method": " then ".join(phase.recipe.method for phase in phases),
        "options": phases[-1].recipe.options,
        "probe": probed,
        "history": history,
        "phases": [phase.facts() for phase in phases],
        "preparation": None,
        "assistants": [],
        "suggestion": None,
    }


def _finalist(bench: Bench) -> dict[str, Any] | None:
    """The chosen student's full training in the search's second stage, where its weights are still there and
    the student is no more than its genome says."""
    found = (bench.run.record["metrics"].get("search") or {}).get("refine") or {}
    plainly = bench.recipe.distill.method != SUGGEST and all(
        plain(name) for phase in bench.trainings for name in phase.recipe.method.split("+")
    )
    for row in found.get("finalists", ()):
        if plainly and row["row"] == found["chosen"] and (bench.run.folder / row["weights"]).is_file():
            return dict(row)
    return None


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


def _rehearse(bench: Bench, student: torch.nn.Module) -> None:
    """Refuse what does not fit before anything is trained.

    Raises:
        UsageError: a method of a phase, or of quantization-aware training, needs what this teacher, student
            or data do not give; the teacher cannot be fine-tuned; or there are no assistants between it and
            the student.
    """
    recipe = bench.recipe.distill
    if recipe.prepare:
        check_preparable(bench)
    if recipe.assistants:
        choose_assistants(bench, count_macs(deployed(copy.deepcopy(student)), bench.spec.input_shape))
    for phase in () if recipe.method == SUGGEST else bench.trainings:
        student = prepare(bench.room(phase, bench.teacher), student).deploy()
    if bench.recipe.quantize.method and quantize_mode(bench) == "qat":
        phase, final = quantized_phase(bench.recipe, bench.trainings[-1]), deployed(student)
        prepare_graph(bench.room(phase, bench.teacher), final, capture(final, bench.spec.input_shape))
