"""Stage 4: fake quantization, calibrated and then trained with what the teacher gives as targets."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from edgekd.errors import StorageError
from edgekd.files import sha256_json, write_atomic, write_bytes
from edgekd.plan import Plan, probe
from edgekd.quantize.fakequant import (
    Origin,
    QuantizedParameters,
    Sites,
    calibrate,
    find_sites,
    insert,
    largest_codes,
    parameters_of,
)
from edgekd.quantize.scheme import Grid, QuantScheme, scheme_for
from edgekd.quantize.sensitivity import Sensitivity
from edgekd.quantize.spare import sensitivity_of, spare_layers
from edgekd.selection import farthest_first, softmax
from edgekd.stages.bench import Bench
from edgekd.stages.curriculum import quantized_phase
from edgekd.stages.lesson import prepare_graph, teacher_for
from edgekd.stages.search import quantize_mode
from edgekd.tasks.classification import accuracy, normalise, to_tensor
from edgekd.train import Stage, evaluate, fit, load_checkpoint
from edgekd.views import Views

FILE = "4-quantized.safetensors"


@dataclass
class _Candidate:
    """One way to quantize its `sites`; `distance` is the mean squared difference of logits to the float
    student on the held-out images, `right` its accuracy there."""

    name: str
    graph: fx.GraphModule
    right: float
    distance: float
    sites: Sites


def run(bench: Bench) -> dict[str, Any]:
    """Metric `quantize`; leaves ``4-quantized.safetensors`` with trained values, scales and grids."""
    mode = quantize_mode(bench)
    path = bench.run.folder / FILE
    if mode == "none":
        reason = (
            "asked for"
            if bench.recipe.quantize.mode == "none"
            else f"the card: {bench.run.target.quant.source}"
        )
        write_bytes(path, b"")
        return {
            "quantize": {"mode": "none", "chosen": "none", "reason": reason, "dialect": "none", "history": []}
        }
    scheme = scheme_for(bench.run.target)
    graph = bench.captured
    sites = find_sites(graph, scheme)
    inputs, labels = bench.selection
    exact = evaluate(graph, inputs)

    def judge(name: str, quantized: fx.GraphModule, places: Sites = sites) -> _Candidate:
        logits = evaluate(quantized, inputs)
        right = accuracy(logits.numpy(), labels.numpy())
        return _Candidate(name, quantized, right, float((logits - exact).square().mean()), places)

    grids = calibrate(graph, sites, _calibration_batches(bench), scheme, bench.recipe.quantize.calibrator)
    recipe = bench.recipe.quantize
    largest = largest_codes(graph, sites, scheme, recipe.weight_bits, recipe.layer_bits)
    candidates = [judge("ptq", insert(graph, sites, grids, scheme, largest, recipe.damping))]
    history: list[dict[str, float]] = []
    if mode == "qat":
        trained = copy.deepcopy(candidates[0].graph)
        history = _train(bench, trained)
        candidates.append(judge("qat", trained))
    limit = accuracy(exact.numpy(), labels.numpy()) - bench.recipe.gate.max_quantization_drop_points / 100
    missed = all(candidate.right < limit for candidate in candidates)
    healed: tuple[Sensitivity, ...] = ()
    if missed or recipe.sensitivity:

        def made_for(places: Sites) -> _Candidate:
            return judge("mixed", insert(graph, places, grids, scheme, largest), places)

        healed = sensitivity_of(sites, lambda places: made_for(places).distance, bench.run.reporter.step)
    if missed:
        spared = spare_layers(sites, healed, lambda places: made_for(places).right >= limit)
        if spared is not None:
            candidates.append(made_for(spared))
    chosen = max(candidates, key=lambda c: (c.right, -c.distance))
    reason = ", ".join(f"{c.name} {100 * c.right:.2f} %" for c in candidates)
    _save(path, parameters_of(chosen.graph, chosen.sites), chosen.sites, scheme)
    logits = evaluate(chosen.graph, bench.validation_inputs).numpy()
    right = accuracy(logits, bench.data.validation_labels)
    bench.run.reporter.say(
        f"  {chosen.name} kept ({reason} of {len(labels)} held-out images): {100 * right:.2f} %"
    )
    by_name = {c.name: c.right for c in candidates}
    return {
        "quantize": {
            "mode": mode,
            "chosen": chosen.name,
            "reason": f"higher accuracy on {len(labels)} held-out training images: {reason}",
            "dialect": scheme.dialect,
            "float_layers": [name for name in sites.weights if name not in chosen.sites.weights],
            "sensitivity": {row.name: row.damage for row in healed},
            "weight_bits": recipe.weight_bits,
            "calibrator": recipe.calibrator,
            "method": quantized_phase(bench.recipe, bench.trainings[-1]).recipe.method
            if mode == "qat"
            else None,
            "accuracy": right,
            "fidelity": bench.fidelity(logits),
            "ptq_selection_accuracy": by_name["ptq"],
            "qat_selection_accuracy": by_name.get("qat"),
            "history": history,
        }
    }


def _calibration_batches(bench: Bench) -> list[torch.Tensor]:
    """Training images without augmentation: drawn evenly from all classes and those without a label, at
    random, or spread over the teacher's probabilities."""
    recipe = bench.recipe.quantize
    count = min(recipe.calibration_images, len(bench.labels))
    order = torch.randperm(len(bench.labels), generator=torch.Generator().manual_seed(bench.recipe.seed))
    if recipe.calibration_choice == "stratified":
        by_class = [order[bench.labels[order] == label] for label in range(-1, len(bench.spec.classes))]
        turns = [part[i] for i in range(max(map(len, by_class))) for part in by_class if i < len(part)]
        order = torch.stack(turns)
    elif recipe.calibration_choice == "coverage":  # as PCoreSet does, among four times as many
        order = order[: 4 * count]
        pixels = normalise(to_tensor(bench.training.images[order.numpy()]), bench.spec.preprocessing)
        likely = softmax(bench.teacher.logits(pixels).numpy())
        order = order[torch.from_numpy(farthest_first(likely, likely[:0], count)[0])]
    images = to_tensor(bench.training.images[order[:count].numpy()])
    return list(torch.split(normalise(images, bench.spec.preprocessing), 128))


def _train(bench: Bench, graph: fx.GraphModule) -> list[dict[str, float]]:
    """Quantization-aware training: the distillation loop with fake quantization in the graph. Steps run in
    float32, because bfloat16 activations would be rounded twice."""
    distill = bench.recipe.distill
    before = bench.run.record["stages"]["distill"]["outputs_sha256"]
    key = sha256_json([bench.run.record["recipe"]["quantize"], bench.run.target.id, before])[:12]
    checkpoint = bench.run.folder / "checkpoints" / f"quantize-{key}.pt"
    stored = load_checkpoint(checkpoint)
    if stored is not None:
        plan = Plan(**stored["plan"])
    else:
        inputs = bench.views.batch(torch.arange(min(distill.batch_size, len(bench.views))))
        plan, _ = probe(graph, inputs, bench.recipe.threads, allow_bfloat16=False)
    images = to_tensor(bench.training.images)
    views = Views(images, bench.spec.preprocessing, "none", 1, bench.recipe.seed)
    phase = quantized_phase(bench.recipe, bench.trainings[-1])
    room = bench.room(phase, bench.teacher)
    lesson = prepare_graph(room, bench.student(), graph)
    history = fit(
        Stage(
            name="quantize",
            model=lesson.model,
            views=views,
            labels=bench.labels,
            teacher=teacher_for(room, lesson, views, plan),
            distillers=lesson.distillers,
            hard_weight=distill.hard_weight,
            epochs=phase.recipe.epochs,
            batch_size=distill.batch_size,
            learning_rate=phase.recipe.learning_rate,
            weight_decay=distill.weight_decay,
            ema_decay=phase.recipe.ema_decay,
            seed=bench.recipe.seed,
            plan=plan,
            checkpoint=checkpoint,
            selection=bench.selection,
        ),
        bench.run.reporter.step,
    )
    graph.eval()
    return history


def _save(path: Path, parameters: QuantizedParameters, sites: Sites, scheme: QuantScheme) -> None:
    from safetensors.numpy import save_file

    tensors = {f"value:{k}": np.ascontiguousarray(v) for k, v in parameters.tensors.items()}
    tensors |= {f"scale:{k}": np.ascontiguousarray(v) for k, v in parameters.weight_scales.items()}
    metadata = {
        "activations": json.dumps({k: asdict(v) for k, v in parameters.activations.items()}),
        "weight_bounds": json.dumps(parameters.weight_bounds),
        "sites": json.dumps(asdict(sites)),
        "scheme": json.dumps(asdict(scheme)),
    }
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_quantized(path: Path) -> tuple[QuantizedParameters, Sites, QuantScheme]:
    """Read back what this stage left."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    parameters = QuantizedParameters(
        {k.removeprefix("value:"): v for k, v in tensors.items() if k.startswith("value:")},
        {k.removeprefix("scale:"): v for k, v in tensors.items() if k.startswith("scale:")},
        {k: (low, high) for k, (low, high) in json.loads(metadata["weight_bounds"]).items()},
        {k: Grid(**v) for k, v in json.loads(metadata["activations"]).items()},
    )
    sites = json.loads(metadata["sites"])
    sites["activations"] = {k: tuple(v) for k, v in sites["activations"].items()}
    sites["weights"] = tuple(sites["weights"])
    sites["origins"] = {
        k: Origin(v["operator"], tuple(v["inputs"]), tuple(v["parameters"]), v["is_output"])
        for k, v in sites["origins"].items()
    }
    return parameters, Sites(**sites), QuantScheme(**json.loads(metadata["scheme"]))


def rebuild(bench: Bench) -> fx.GraphModule:
    """The fake-quantized torch graph from the file of this stage: the reference of all parity checks.

    Raises:
        StorageError: the file was not made from this student.
    """
    parameters, sites, scheme = load_quantized(bench.run.folder / FILE)
    largest = {name: high for name, (_, high) in parameters.weight_bounds.items()}
    graph = insert(bench.captured, sites, parameters.activations, scheme, largest)
    state = {name: torch.from_numpy(value) for name, value in parameters.tensors.items()}
    for name, scale in parameters.weight_scales.items():
        state["weight_" + name.replace(".", "_") + ".log_scale"] = torch.from_numpy(scale).log()
    trained = {name for name, _ in graph.named_parameters() if not name.startswith("activation_")}
    # Grids of activations are in place since `insert`; buffers and shared parameters are the graph's own.
    own = {name: value for name, value in graph.state_dict().items() if name not in trained}
    try:
        graph.load_state_dict(own | state)
    except RuntimeError as error:
        raise StorageError(
            f"{bench.run.folder / FILE} does not belong to the student in this folder: {error}",
            "delete it; the same command makes it again",
        ) from error
    return graph.eval()
