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
from edgekd.quantize.bias import correct_biases
from edgekd.quantize.fakequant import (
    Origin,
    QuantizedParameters,
    Sites,
    activation_bits,
    calibrate,
    find_sites,
    insert,
    largest_codes,
    parameters_of,
    with_values_of,
)
from edgekd.quantize.quantizers import freeze_after
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

    def merit(self) -> tuple[float, float]:
        """Larger is better."""
        return self.right, -self.distance


class _Tries:
    """The candidates of one student and how they are judged."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._recipe, self._graph = bench, bench.recipe.quantize, bench.captured
        recipe, graph = self._recipe, self._graph
        self.scheme = scheme_for(bench.run.target, recipe.learn_offsets)
        self.sites = find_sites(graph, self.scheme)
        self.inputs, self.labels = bench.selection
        self._exact = evaluate(graph, self.inputs)
        allowed = bench.recipe.gate.max_quantization_drop_points / 100
        self._limit = accuracy(self._exact.numpy(), self.labels.numpy()) - allowed
        self._batches = _calibration_batches(bench)
        self.bits = activation_bits(self.sites, recipe.activation_bits, recipe.layer_activation_bits)
        self._grids = calibrate(graph, self.sites, self._batches, self.scheme, recipe.calibrator, self.bits)
        self._largest = largest_codes(graph, self.sites, self.scheme, recipe.weight_bits, recipe.layer_bits)
        first = insert(graph, self.sites, self._grids, self.scheme, self._largest, recipe.damping)
        self.made = [self._judge("ptq", first, self.sites)]

    def _judge(self, name: str, quantized: fx.GraphModule, sites: Sites) -> _Candidate:
        logits = evaluate(quantized, self.inputs)
        right = accuracy(logits.numpy(), self.labels.numpy())
        return _Candidate(name, quantized, right, float((logits - self._exact).square().mean()), sites)

    def train(self) -> list[dict[str, float]]:
        """Add the candidate that is trained; returns a row an epoch."""
        trained = copy.deepcopy(self.made[0].graph)
        history = _train(self._bench, trained)
        self.made.append(self._judge("qat", trained, self.sites))
        return history

    def correct(self) -> None:
        """Add each candidate with its biases corrected."""
        for made in tuple(self.made):
            moved = copy.deepcopy(made.graph)
            correct_biases(moved, self._graph, self._batches[0])
            self.made.append(self._judge(f"{made.name}, biases corrected", moved, made.sites))

    def spare(self) -> tuple[Sensitivity, ...]:
        """Where every candidate misses the limit, add the one with the fewest layers in float that does not,
        with the weights and scales of the best.
        Returns what each layer alone in float heals; nothing where nothing is missed or asked for."""
        missed = all(candidate.right < self._limit for candidate in self.made)
        if not missed and not self._recipe.sensitivity:
            return ()

        best = max(self.made, key=_Candidate.merit)

        def mixed(sites: Sites) -> _Candidate:
            made = insert(self._graph, sites, self._grids, self.scheme, self._largest)
            return self._judge("mixed", with_values_of(best.graph, made), sites)

        step = self._bench.run.reporter.step
        healed = sensitivity_of(self.sites, lambda sites: mixed(sites).distance, step)
        spared = None
        if missed:
            spared = spare_layers(self.sites, healed, lambda sites: mixed(sites).right >= self._limit)
        if spared is not None:
            self.made.append(mixed(spared))
        return healed


def run(bench: Bench) -> dict[str, Any]:
    """Metric `quantize`; leaves ``4-quantized.safetensors`` with trained values, scales and grids."""
    mode, recipe = quantize_mode(bench), bench.recipe.quantize
    path = bench.run.folder / FILE
    if mode == "none":
        reason = "asked for" if recipe.mode == "none" else f"the card: {bench.run.target.quant.source}"
        write_bytes(path, b"")
        return {
            "quantize": {"mode": "none", "chosen": "none", "reason": reason, "dialect": "none", "history": []}
        }
    tries = _Tries(bench)
    note = _narrow_note(bench, tries.bits)
    history = tries.train() if mode == "qat" else []
    if recipe.correct_biases:
        tries.correct()
    healed = tries.spare()
    chosen = max(tries.made, key=_Candidate.merit)
    reason = ", ".join(f"{c.name} {100 * c.right:.2f} %" for c in tries.made)
    _save(path, parameters_of(chosen.graph, chosen.sites), chosen.sites, tries.scheme)
    logits = evaluate(chosen.graph, bench.validation_inputs).numpy()
    right, count = accuracy(logits, bench.data.validation_labels), len(tries.labels)
    bench.run.reporter.say(f"  {chosen.name} kept ({reason} of {count} held-out images): {100 * right:.2f} %")
    by_name = {c.name: c.right for c in tries.made}
    method = quantized_phase(bench.recipe, bench.trainings[-1]).recipe.method if mode == "qat" else None
    return {
        "quantize": {
            "mode": mode,
            "chosen": chosen.name,
            "reason": f"higher accuracy on {count} held-out training images: {reason}",
            "dialect": tries.scheme.dialect,
            "float_layers": [name for name in tries.sites.weights if name not in chosen.sites.weights],
            "sensitivity": {row.name: row.damage for row in healed},
            "weight_bits": recipe.weight_bits,
            "activation_bits": min(tries.bits.values()),
            "activation_note": note,
            "calibrator": recipe.calibrator,
            "method": method,
            "accuracy": right,
            "fidelity": bench.fidelity(logits),
            "ptq_selection_accuracy": by_name["ptq"],
            "qat_selection_accuracy": by_name.get("qat"),
            "history": history,
        }
    }


def _narrow_note(bench: Bench, bits: dict[str, int]) -> str:
    """How activations of fewer than 8 bits are shipped, and why so; empty where there are none."""
    narrow = sorted({found for found in bits.values() if found < 8})
    if not narrow:
        return ""
    note = (
        f"activations of {' and '.join(map(str, narrow))} bits are kept in 8-bit containers with a clip and "
        f"computed by int8 kernels, because {' and '.join(bench.run.target.runtime)} have no narrower ones"
    )
    bench.run.reporter.say(f"  {note}")
    return note


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
    freeze = bench.recipe.quantize.freeze_after
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
            before_step=freeze_after(freeze) if freeze < 1 else None,
            on_epoch=bench.run.on_epoch,
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
