"""Stage 2: find a student for the device without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekd.backends import backend
from edgekd.black_box import cut_out
from edgekd.blocks import deployed
from edgekd.calibrated import Subject, calibrate_command, told_tables
from edgekd.cost import CostModel, LayerTable, Roofline, cost_model
from edgekd.errors import BackendError, MissingExtraError
from edgekd.executor import Workers
from edgekd.files import sha256_json, write_json
from edgekd.nets import Outputs, count_parameters, layer_shapes, tapped_forward
from edgekd.probing import randomised, untouched
from edgekd.proxies import check_teacher, proxy
from edgekd.search import Candidate, Effort, Found, Genome, Limits, search
from edgekd.stages.bench import Bench
from edgekd.stages.finalists import Measured, measure_finalists
from edgekd.stages.refine import refine
from edgekd.stages.scorer import OneThread, Scorer, in_groups, one_by_one
from edgekd.tasks.classification import normalise, to_tensor
from edgekd.teacher import run_in_batches

_FAR_OFF_PERCENT = 25  # of a prediction that the user is told of


def run(bench: Bench, *, refined: bool) -> dict[str, Any]:
    """Metric `search`, with a second stage where it is `refined`; leaves ``2-student.json``. Evaluations are
    stored as they come, so a cut-off search continues on the same path."""
    recipe = bench.recipe
    model = predictor(bench)
    limits = budget_limits(bench, model)
    evaluate = _Evaluator(bench, model, limits)
    score, teacher = evaluate.scorer.score, evaluate.scorer.teacher
    missing = [] if teacher is None else left_out(score, teacher)
    for text in missing:
        bench.run.reporter.say(f"  left out of the score '{score}': {text}")
    try:
        with evaluate.workers:
            found = search(
                bench.space.choices,
                evaluate,
                limits,
                Effort(
                    recipe.search.evaluations, recipe.search.population, recipe.seed, recipe.search.algorithm
                ),
                lambda done, total, front: bench.run.reporter.step("search students", done, total, front),
            )
    finally:
        evaluate.close()
        model.close()
    predicted = found.chosen
    row, measured = measure_finalists(bench, found, limits, executed_precision(bench))
    found = replace(found, chosen=row)
    metrics: dict[str, Any] = {
        "search": _metrics(bench, found, model, limits) | _measurements(found, predicted, measured),
        "_unverified": list(model.unverified),
    }
    metrics["search"]["left_out"] = missing
    if measured is not None and model.error_percent is None:
        error = measured.error_percent(found)
        metrics["search"]["cost_model"] |= {
            "error_percent": error,
            "note": f"{model.note}; error: that of the finalists, {len(measured.measured_ms)} measured",
        }
        if error > _FAR_OFF_PERCENT:
            correct = calibrate_command(recipe.target, executed_precision(bench), _subject(bench))
            bench.run.reporter.say(
                f"  finalists measured: predictions are {error:.0f} % off; {correct} corrects them"
            )
    if refined:
        resolved = bench.run.record["recipe"]
        how = [resolved["distill"], resolved["data"], recipe.search.refine_epochs]
        key = sha256_json([_search_key(bench, model), how])[:12]
        row, facts = refine(bench, found, evaluate.scorer, key)
        metrics["search"] |= {"chosen": row, "chosen_without_refine": found.chosen, "refine": facts}
        metrics["search"] |= _remeasured(row, measured)
    _leave(bench, found, metrics["search"], model.kind)
    return metrics


def _leave(bench: Bench, found: Found, metrics: dict[str, Any], kind: str) -> None:
    """Write ``2-student.json`` and say which student it is."""
    chosen = found.candidates[metrics["chosen"]]
    restrictions = bench.run.target.space
    write_json(
        bench.run.folder / "2-student.json",
        {
            "space": bench.recipe.search.space,
            "genome": list(chosen.genome),
            "channel_multiple": int(float(restrictions.channel_multiple.value)),
            "kernels": list(restrictions.kernels),
            "forbidden_ops": list(restrictions.forbidden_ops),
            "architecture": list(bench.space.describe(chosen.genome)),
            "candidate": asdict(chosen),
        },
    )
    latency = (
        "latency unknown" if chosen.latency_ms is None else f"{chosen.latency_ms:.4f} ms predicted ({kind})"
    )
    done_ms = metrics["latency_measured_ms"]
    bench.run.reporter.say(
        f"  student: {chosen.parameters:,} parameters, {chosen.macs / 1e6:.2f} MMACs, {latency}"
        + (f", {done_ms:.4f} ms measured" if done_ms is not None else "")
        + f"; best of {len(found.candidates)} candidates"
        + (f", {found.dropped} left out without a finite score" if found.dropped else "")
    )


def _measurements(found: Found, predicted: int, measured: Measured | None) -> dict[str, Any]:
    """What the record says of the finalists."""
    if measured is None:
        return {"finalists": None, "latency_measured_ms": None, "latency_measured_on": None}
    return {
        "finalists": measured.facts(found) | {"chosen_by_prediction": predicted},
        "latency_measured_ms": measured.measured_ms[found.chosen],
        "latency_measured_on": f"{measured.device}, {measured.precision}, {measured.clock} clock",
    }


def _remeasured(chosen: int, measured: Measured | None) -> dict[str, Any]:
    """The measured latency of what the second stage chose; null where it was no finalist of the first."""
    if measured is not None and chosen in measured.measured_ms:
        return {"latency_measured_ms": measured.measured_ms[chosen]}
    return {"latency_measured_ms": None, "latency_measured_on": None}


def predictor(bench: Bench, space: str | None = None) -> CostModel:
    """What predicts the costs of students of `space`, by default the recipe's; says which table it is. Layers
    are counted for square images of the longer side."""
    target, precision, name = bench.run.target, executed_precision(bench), bench.recipe.target
    subject = _subject(bench, space)
    model = cost_model(target, precision, subject)
    told = told_tables(target, name, precision, subject, model.table)
    if isinstance(model, Roofline) and not model.known:
        told = f"{model.note}; {calibrate_command(name, precision, subject)} measures it"
    elif isinstance(model, LayerTable) and bench.recipe.budget.max_latency_ms is not None and not told:
        told = (
            "latency is a sum of layers, which for whole students has erred by 3 to 107 %; "
            f"{calibrate_command(name, precision, subject)} corrects it"
        )
    if told:
        bench.run.reporter.say(f"  {told}")
    return model


def _subject(bench: Bench, space: str | None = None) -> Subject:
    """What a table of layers has to be about."""
    channels, height, width = bench.spec.input_shape
    side = max(height, width)
    space = bench.recipe.search.space if space is None else space
    return Subject(space, (channels, side, side), len(bench.spec.classes))


def executed_precision(bench: Bench) -> str:
    """What the deployed student will run in, for the cost model."""
    return "fp32" if quantize_mode(bench) == "none" else "int8"


def quantize_mode(bench: Bench) -> str:
    """The recipe's mode, with "card" resolved."""
    mode = bench.recipe.quantize.mode
    if mode != "card":
        return mode
    return "none" if bench.run.target.quant.dialect == "none" else "qat"


def budget_limits(bench: Bench, model: CostModel) -> Limits:
    """The budget; without a latency of its own, a share of what the teacher would take in that precision."""
    budget, teacher = bench.recipe.budget, bench.teacher
    teacher_macs = teacher.macs
    latency_ms = budget.max_latency_ms
    if latency_ms is None and teacher.model is not None:
        predicted = model.predict(layer_shapes(teacher.model, bench.spec.input_shape)).latency_ms
        latency_ms = None if predicted is None else predicted * budget.max_latency_ratio
    return Limits(
        latency_ms,
        budget.max_size_mib,
        None if teacher_macs is None else int(teacher_macs * budget.max_macs_ratio),
        budget.max_memory_mib,
        teacher_macs,
    )


def scoring_batch(bench: Bench) -> tuple[Tensor, Tensor]:
    """Normalised training images, drawn by the recipe's seed, and their labels: what a score looks at."""
    generator = torch.Generator().manual_seed(bench.recipe.seed)
    index = torch.randperm(len(bench.data.train_labels), generator=generator)
    index = index[: bench.recipe.search.batch_size]
    inputs = normalise(to_tensor(bench.data.train_images[index.numpy()]), bench.spec.preprocessing)
    if bench.recipe.data.labelled_fraction < 1:  # the teacher's answers, where labels may not be known
        return inputs, bench.teacher.logits(inputs).argmax(1)
    return inputs, torch.from_numpy(bench.data.train_labels)[index]


def teacher_outputs(bench: Bench, inputs: Tensor) -> Outputs:
    """The teacher's, as it is trained; or of N(0, 1) weights, as the published scripts draw them, in
    training mode. A teacher without a network is always the trained one."""
    model, seed, classes = bench.loaded.model, bench.recipe.seed, len(bench.spec.classes)
    if model is None:
        return _black_box(bench, inputs)
    with torch.no_grad():
        if bench.recipe.search.teacher_state == "trained":
            return tapped_forward(model, inputs, classes)
        with untouched(randomised(model, seed), seed) as fresh:
            return tapped_forward(fresh, inputs, classes)


def _black_box(bench: Bench, inputs: Tensor) -> Outputs:
    """Logits of an ONNX teacher, and the classifier's input and the last maps where its graph shows them."""
    teacher = bench.teacher
    assert teacher.onnx is not None
    folder = bench.run.folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Tensor] = {}
    for part, path in cut_out(teacher.onnx, folder).items():
        try:
            session = backend("onnxruntime").open(path, threads=1)
            made = run_in_batches(session, inputs.numpy(), teacher.batch)
        except (BackendError, MissingExtraError) as error:
            bench.run.reporter.say(f"  the teacher's {part} cannot be read from its graph: {error.message}")
            continue
        found[part] = torch.from_numpy(made)
    return Outputs(teacher.logits(inputs), found.get("embedding"), found.get("features"))


def left_out(score: str, teacher: Outputs) -> list[str]:
    """What a score beside this teacher does without, in words."""
    needs = proxy(score).needs
    said = []
    if "teacher" in needs and teacher.features is None:
        said.append("relations are those of the teacher's logits: it shows no feature maps")
    if "teacher" in needs and "labels" in needs and teacher.embedding is None:
        said.append("the semantic term: the teacher does not show its classifier's input")
    return said


class _Evaluator:
    """Genomes to candidates. Costs come first; only a student within the budget is built and scored."""

    def __init__(self, bench: Bench, model: CostModel, limits: Limits) -> None:
        self._space, self._model, self._limits = bench.space, model, limits
        self._say = bench.run.reporter.say
        self.scorer = make_scorer(bench)
        self.workers = Workers(bench.recipe.executor)
        self._path = bench.run.folder / "checkpoints" / "search.jsonl"
        self._known = _stored(self._path, bench, model)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")

    def __call__(self, genomes: Sequence[Genome]) -> list[Candidate]:
        within: dict[Genome, Candidate] = {}
        for genome in genomes:
            if json.dumps(genome) not in self._known:
                candidate = self._costs(genome)
                if candidate.excess(self._limits):
                    self._keep(candidate)
                else:
                    within[genome] = candidate
        score = self.scorer.many if self.workers.here else OneThread(self.scorer)
        groups = in_groups(list(within), self.scorer.device, self.workers.processes)
        for group, found in self.workers.run(score, groups, then=one_by_one):
            if found is None and len(group) > 1:
                continue
            if found is None:
                self._say(f"  a worker died while scoring {list(group[0])}: the student is left out")
            for genome, terms in zip(group, found or [{}], strict=True):
                within[genome].terms.update(terms)
                self._keep(within[genome])
        return [self._known[json.dumps(genome)] for genome in genomes]

    def _keep(self, candidate: Candidate) -> None:
        self._known[json.dumps(candidate.genome)] = candidate
        self._file.write(json.dumps(asdict(candidate)) + "\n")
        self._file.flush()

    def _costs(self, genome: Genome) -> Candidate:
        layers = self._space.layers(genome)
        cost = self._model.predict(layers)
        return Candidate(
            genome,
            parameters=sum(layer.parameters for layer in layers),
            macs=sum(layer.macs for layer in layers),
            latency_ms=cost.latency_ms,
            size_mib=cost.size_mib,
            terms={},
            memory_mib=cost.memory_mib,
        )

    def close(self) -> None:
        self._file.close()


def score_of(bench: Bench) -> str:
    """The search's score; "auto" goes by what trains the students (docs/decisions/0002-search-score.md)."""
    if bench.recipe.search.score != "auto":
        return bench.recipe.search.score
    return "diswot" if bench.device == "cpu" else "nwot"


def make_scorer(bench: Bench) -> Scorer:
    """What scores a student, on the device that networks are trained on."""
    score = score_of(bench)
    inputs, labels = scoring_batch(bench)
    teacher = teacher_outputs(bench, inputs)
    check_teacher(score, proxy(score).needs, teacher)
    classes, seed = len(bench.spec.classes), bench.recipe.seed
    return Scorer(bench.space, score, inputs, labels, teacher, classes, seed, bench.device)


def _stored(path: Path, bench: Bench, model: CostModel) -> dict[str, Candidate]:
    """Evaluations of an earlier start of the same search; a torn last line is dropped."""
    key = _search_key(bench, model)
    if not path.exists() or bench.run.record.get("search_started") != key:
        path.unlink(missing_ok=True)
        bench.run.record["search_started"] = key
        bench.run.save()
        return {}
    known = {}
    kept = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        row["genome"] = tuple(row["genome"])
        known[json.dumps(row["genome"])] = Candidate(**row)
        kept += line + "\n"
    path.write_text(kept, encoding="utf-8")
    return known


def _search_key(bench: Bench, model: CostModel) -> str:
    """Costs and scores belong to one teacher, device, prediction and budget: beyond it nothing was scored."""
    recipe, before = bench.run.record["recipe"], bench.run.record["stages"]["teacher"]
    later = ("finalists", "refine", "refine_candidates", "refine_epochs", "refine_finalists")
    how = {key: value for key, value in recipe["search"].items() if key not in later}
    how["score"] = score_of(bench)
    parts = [recipe["seed"], how, recipe["budget"], recipe["quantize"]["mode"], model.kind, model.device]
    parts += [] if model.table is None else [model.table.line, model.table.entries_ms]
    return sha256_json([before["inputs_sha256"], before["outputs_sha256"], parts, bench.run.target])


def _metrics(bench: Bench, found: Found, model: CostModel, limits: Limits) -> dict[str, Any]:
    rows = zip(found.candidates, found.score, found.feasible, found.generation, strict=True)
    return {
        "score": score_of(bench),
        "teacher_state": bench.recipe.search.teacher_state,
        "algorithm": bench.recipe.search.algorithm,
        "evaluated": len(found.candidates),
        "dropped": found.dropped,
        **cost_facts(model, limits),
        "candidates": [
            asdict(candidate) | {"score": score, "feasible": feasible, "generation": generation}
            for candidate, score, feasible, generation in rows
        ],
        "chosen": found.chosen,
        "by_macs": found.by_macs,
        "by_parameters": found.by_parameters,
        "front": list(found.front),
        "built_parameters": count_parameters(
            deployed(bench.space.build(found.candidates[found.chosen].genome, torch.Generator()))
        ),
    }


def cost_facts(model: CostModel, limits: Limits) -> dict[str, Any]:
    """How costs were predicted, and the limits on them."""
    return {
        "cost_model": {
            "kind": model.kind,
            "device": model.device,
            "error_percent": model.error_percent,
            "note": model.note,
            "table": None if (table := model.table) is None else table.facts,
        },
        "budget": {
            "max_latency_ms": limits.latency_ms,
            "max_size_mib": limits.size_mib,
            "max_macs": limits.macs,
            "max_memory_mib": limits.memory_mib,
        },
    }
