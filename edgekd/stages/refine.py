"""The search's second stage: a few of its candidates are distilled briefly, the best of those in full.

A ridge on training-free scores that is fitted on about twenty short distillations ranks better than any
score alone. All short trainings see one part of the training images and are compared on the rest; validation
images take no part. The largest student that fits is always among the compared ones.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from edgekd.blocks import deployed
from edgekd.errors import UsageError
from edgekd.files import sha256_json, write_atomic
from edgekd.plan import Plan, probe
from edgekd.ranking import Values, ranks
from edgekd.ranks import ALONE
from edgekd.recipe import Recipe
from edgekd.search import Found, Genome
from edgekd.shortlist import fit_ridge, shortlist, spread_of
from edgekd.stages.bench import Bench
from edgekd.stages.curriculum import SUGGEST, Phase
from edgekd.stages.lesson import prepare, teacher_for
from edgekd.stages.scorer import Scorer, Terms
from edgekd.stages.student import Blueprint
from edgekd.stages.training import Taught, stage_of, train
from edgekd.tasks.classification import normalise, to_tensor
from edgekd.train import evaluate, fit
from edgekd.views import CachedTeacher, Views

_SHARE = 0.5  # of the training images that short trainings see
_POOL = 100  # candidates of the highest merit that the ridge predicts
_SURPRISES = 2  # that the ridge ranks highest of those not trained: trained too
_EXTRA = "nwot+synflow"  # scores beside the search's own that the ridge reads


def check_refinable(recipe: Recipe) -> None:
    """Refuse what the finalists' full trainings could not repeat, where the second stage is asked for.

    Raises:
        UsageError: the student is given, or stage 3 would train it in another way.
    """
    if recipe.search.refine is True and (obstacle := _obstacle(recipe)):
        raise UsageError(*obstacle)


def second_stage(recipe: Recipe, record: dict[str, Any] | None = None) -> bool:
    """Whether the search has one: with "auto", where a CUDA device makes it cheap and nothing stands against
    it. A search that `record` tells of stays what it was, so that a run may go on without the device."""
    if recipe.search.refine != "auto":
        return recipe.search.refine
    if record is not None and (found := record["metrics"].get("search")) is not None:
        return "refine" in found
    return recipe.device != "cpu" and torch.cuda.is_available() and _obstacle(recipe) is None


def _obstacle(recipe: Recipe) -> tuple[str, str] | None:
    """What stands against a second stage, and what to do."""
    distill, finalists = recipe.distill, recipe.search.refine_finalists
    other = [name for name in ("prepare", "assistants") if getattr(distill, name)]
    other += ["method=suggest"] if distill.method == SUGGEST else []
    if recipe.search.student:
        return "search.refine compares students, and search.student gives one", "leave one out"
    if finalists > 1 and other:
        return (
            f"search.refine distils {finalists} finalists in full, which does not go with distill.{other[0]}",
            "--set search.refine_finalists=1 chooses by the short trainings alone",
        )
    return None


@dataclass(frozen=True)
class _Course:
    """What all short trainings share."""

    phase: Phase
    plan: Plan
    views: Views
    labels: Tensor
    held_out: tuple[Tensor, Tensor]  # inputs, and what is right of them
    labelled: bool


def refine(bench: Bench, found: Found, scorer: Scorer, key: str) -> tuple[int, dict[str, Any]]:
    """The row of `found` that is chosen, and what the record says of how."""
    bench = _alone(bench)
    recipe = bench.recipe.search
    rows = _pool(found)
    features, names = _features(bench, found, rows, scorer)
    position = {row: number for number, row in enumerate(rows)}
    score = np.array([found.score[row] or 0.0 for row in rows])
    macs = [found.candidates[row].macs for row in rows]
    nwot = features[:, names.index("nwot")]
    reasons: dict[int, str] = {}
    for row, why in (
        (found.chosen, "chosen by score and MACs"),
        (found.by_macs, "largest that fits"),
        (found.by_parameters, "most parameters"),
        (rows[int(np.argmax(score))], "best by score"),
        (rows[int(np.argmax(ranks(nwot) + ranks(macs)))], "best by NWOT and MACs"),
    ):
        reasons[row] = f"{reasons[row]}, {why}" if row in reasons else why
    forced = [position[row] for row in reasons]
    merit = score + spread_of(macs)
    first = shortlist(features, merit, forced, min(recipe.refine_candidates, len(rows)))
    course = _course(bench, found.candidates[found.chosen].genome)
    store = _Store(bench, key)
    reached = {
        n: store.accuracy(course, found.candidates[rows[n]].genome, number) for number, n in enumerate(first)
    }
    ridge, predicted = _calibrated(features, reached)
    if predicted is not None:
        unseen = [n for n in np.argsort(-predicted).tolist() if n not in reached][:_SURPRISES]
        for number, n in enumerate(unseen, len(first)):
            reached[n] = store.accuracy(course, found.candidates[rows[n]].genome, number)
            reasons[rows[n]] = "predicted by the ridge"
    order = sorted(reached, key=lambda n: -reached[n])
    finalists = [rows[n] for n in order[: recipe.refine_finalists]]
    full = _full(bench, found, finalists, key) if recipe.refine_finalists > 1 else []
    chosen = max(full, key=lambda row: row["selection_accuracy"])["row"] if full else finalists[0]
    table = [
        {
            "row": rows[n],
            "why": reasons.get(rows[n], "best and most diverse"),
            "accuracy": reached[n],
            "predicted": None if predicted is None else float(predicted[n]),
        }
        for n in order
    ]
    facts = {
        "epochs": recipe.refine_epochs,
        "images": len(course.labels),
        "held_out": len(course.held_out[1]),
        "compared_by": "labels" if course.labelled else "agreement with the teacher",
        "trained": table,
        "ridge": ridge | {"features": names} if ridge else None,
        "finalists": full,
        "control": found.by_macs,
        "chosen": chosen,
    }
    _say(bench, found, facts)
    return chosen, facts


def _alone(bench: Bench) -> Bench:
    """The same bench for trainings of this process alone: the others wait for stage 3."""
    made = copy.copy(bench)
    made.ranks = ALONE
    return made


def _pool(found: Found) -> list[int]:
    """Rows within the budget with a score, those of the highest score and MACs."""
    rows = [row for row, score in enumerate(found.score) if score is not None]
    merit = np.array([found.score[row] for row in rows], np.float64)
    merit = merit + spread_of([found.candidates[row].macs for row in rows])
    kept = {rows[n] for n in np.argsort(-merit)[:_POOL]} | {found.chosen, found.by_macs, found.by_parameters}
    return [row for row in rows if row in kept]


def _features(bench: Bench, found: Found, rows: list[int], scorer: Scorer) -> tuple[Values, list[str]]:
    """(rows, columns): terms of the search's score and of two more, and sizes."""
    extra = replace(scorer, score=_EXTRA)
    terms: list[Terms] = []
    for number, row in enumerate(rows, 1):
        terms.append(found.candidates[row].terms | extra(found.candidates[row].genome))
        bench.run.reporter.step("score candidates", number, len(rows))
    names = [name for name in terms[0] if all(name in each for each in terms)]
    columns = [np.array([each[name] for each in terms]) for name in names]
    for name in ("parameters", "macs", "latency_ms"):
        values = [getattr(found.candidates[row], name) for row in rows]
        if None not in values:
            columns.append(spread_of(values))
            names.append(name)
    return np.stack(columns, 1), names


def _calibrated(features: Values, reached: dict[int, float]) -> tuple[dict[str, Any], Values | None]:
    """The ridge on what was trained, and what it predicts of all; None of fewer than 6, which say nothing."""
    if len(reached) < 6:
        return {}, None
    rows = list(reached)
    ridge = fit_ridge(features[rows], np.array([reached[row] for row in rows]))
    return {"strength": ridge.strength, "left_out_tau": ridge.tau, "fitted_on": len(rows)}, ridge.predict(
        features
    )


def _course(bench: Bench, genome: Genome) -> _Course:
    """Half of the training images to learn from, the rest to compare on."""
    recipe = bench.recipe
    images, labels = to_tensor(bench.training.images), bench.labels
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(recipe.seed))
    cut = int(_SHARE * len(images))
    learnt, rest = order[:cut], order[cut:]
    inputs = normalise(images[rest], bench.spec.preprocessing)
    labelled = bool((labels[rest] >= 0).all())
    right = labels[rest] if labelled else bench.teacher.logits(inputs).argmax(1)
    phase = bench.trainings[0]
    epochs = recipe.search.refine_epochs
    phase = replace(phase, recipe=msgspec.structs.replace(phase.recipe, epochs=epochs))
    shown = min(2, epochs)
    preprocessing, margin = bench.spec.preprocessing, recipe.data.crop_margin or None
    views = Views(images[learnt], preprocessing, phase.augment, shown, recipe.seed, bench.device, margin)
    batch = views.batch(torch.arange(min(phase.recipe.batch_size, len(learnt)), device=views.device))
    plan, _ = probe(_network(bench, genome), batch, recipe.threads, device=bench.device)
    return _Course(phase, plan, views, labels[learnt], (inputs, right), labelled)


def _share(logits: Tensor, right: Tensor) -> float:
    return float((logits.argmax(1) == right).float().mean())


def _network(bench: Bench, genome: Genome) -> nn.Module:
    return bench.untrained(Blueprint(space=bench.recipe.search.space, genome=genome))


class _Store:
    """Accuracies after short trainings, kept in the run's folder: a start after an interruption goes on with
    the first that is missing."""

    def __init__(self, bench: Bench, key: str) -> None:
        self._bench, self._teacher = bench, None
        self._path = bench.run.folder / "checkpoints" / f"refine-{key}.jsonl"
        self._known: dict[str, float] = {}
        self._stored_teacher: CachedTeacher | None = None
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # cut off while it was written
                    break
                self._known[json.dumps(row["genome"])] = row["accuracy"]

    def accuracy(self, course: _Course, genome: Genome, number: int) -> float:
        """Of one candidate on the images that no short training saw."""
        name = json.dumps(list(genome))
        if name not in self._known:
            network = self._trained(course, genome, number)
            inputs, right = course.held_out
            self._known[name] = _share(evaluate(network, inputs, device=self._bench.device), right)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"genome": genome, "accuracy": self._known[name]}) + "\n")
        return self._known[name]

    def _trained(self, course: _Course, genome: Genome, number: int) -> nn.Module:
        bench, recipe = self._bench, course.phase.recipe
        room = replace(bench.room(course.phase, bench.teacher), labels=course.labels, keep=None)
        lesson = prepare(room, _network(bench, genome))
        teacher = teacher_for(room, lesson, course.views, course.plan)
        if isinstance(teacher, CachedTeacher):
            self._stored_teacher = self._stored_teacher or teacher
            teacher = self._stored_teacher
        taught = Taught(course.views, course.labels, teacher)
        name = f"try candidate {number + 1}"
        stage = stage_of(name, recipe, lesson, taught, bench.recipe.seed, course.plan)
        stage = replace(stage, ema_decay=0.0)  # an average over so few steps would lag behind
        fit(stage, bench.run.reporter.step)
        return deployed(lesson.deploy())


def _full(bench: Bench, found: Found, finalists: list[int], key: str) -> list[dict[str, Any]]:
    """Each finalist through the trainings of stage 3, compared on the held-out training images."""
    from safetensors.torch import save_file

    made = []
    inputs, labels = bench.selection
    for number, row in enumerate(finalists, 1):
        genome = found.candidates[row].genome
        label = f"finalist {number}"
        mark = f"{key}-{sha256_json(list(genome))[:8]}"
        trained = train(bench, _network(bench, genome), bench.trainings, bench.teacher, label, mark)
        network = deployed(trained.network)
        right = _share(evaluate(network, inputs, device=bench.device), labels)
        path = bench.run.folder / "checkpoints" / f"finalist-{mark}.safetensors"
        state = {name: value.clone().contiguous() for name, value in network.state_dict().items()}
        write_atomic(path, lambda to, state=state: save_file(state, to))  # type: ignore[misc]
        made.append(
            {
                "row": row,
                "selection_accuracy": right,
                "weights": f"checkpoints/{path.name}",
                "history": trained.history,
                "probe": {"chosen": str(trained.plan), "images_per_second": trained.rates},
            }
        )
    return made


def _say(bench: Bench, found: Found, facts: dict[str, Any]) -> None:
    say = bench.run.reporter.say
    say(
        f"  second stage: {len(facts['trained'])} candidates, {facts['epochs']} epochs on {facts['images']} "
        f"images, compared on {facts['held_out']} others by {facts['compared_by']}"
    )
    for line in facts["trained"]:
        candidate = found.candidates[line["row"]]
        latency = "" if candidate.latency_ms is None else f", {candidate.latency_ms:.4f} ms"
        mark = " <- chosen" if line["row"] == facts["chosen"] else ""
        say(
            f"    {100 * line['accuracy']:.2f} %  {candidate.parameters:,} parameters, "
            f"{candidate.macs / 1e6:.2f} MMACs{latency}: {line['why']}{mark}"
        )
    for line in facts["finalists"]:
        say(
            f"    in full: candidate {line['row']}, {100 * line['selection_accuracy']:.2f} % of the "
            f"{len(bench.selection[1])} held-out images"
        )
