"""Does the searched student beat its rivals of the same budget? Distils all of them equally.

    python tools/bench/search_vs_random.py --run runs/jetson --random 5 --epochs 15 --seeds 0 1 2

The run's folder must hold a finished search; one with `search.refine` has two students of its own. Rivals:
what further searches chose (`--also`, for instance with another score, each with and without its second
stage), the candidates of its search with the most multiply-accumulates and with the most parameters within
the budget, random students drawn uniformly from the same space that meet the budget and are within 10 % of
the chosen student's predicted latency, and the widest MobileNetV2 that meets the budget. Prints a line per
training as it ends, then a table with 95 % t intervals over the seeds and a JSON line. On a CUDA device all
train side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from mobilenet_v2 import MobileNetV2
from torch import nn

from edgekd.cost import CostModel
from edgekd.plan import probe
from edgekd.ranking import kendall_tau, ranks
from edgekd.recipe import load_recipe
from edgekd.run import Run, Silent
from edgekd.search import Candidate, Limits
from edgekd.spaces import SearchSpace
from edgekd.stages.bench import Bench
from edgekd.stages.search import make_scorer, predictor
from edgekd.stages.training import Course
from edgekd.target import find_target
from edgekd.tasks.classification import accuracy
from edgekd.train import evaluate, fit_together

Genome = tuple[int, ...]
# Two-sided 95 % quantiles of Student's t with 1 to 9 degrees of freedom.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_NEAR = 0.1  # a random rival's predicted latency may differ by this share


@dataclass(frozen=True)
class Student:
    """One row of the table."""

    name: str
    space: SearchSpace | MobileNetV2
    candidate: Candidate

    def build(self, seed: int) -> nn.Module:
        return self.space.build(self.candidate.genome, torch.Generator().manual_seed(seed))

    @property
    def key(self) -> str:
        """Tells networks apart: several rows may be one network."""
        return f"{type(self.space).__name__} {list(self.candidate.genome)}"


Job = tuple[Student, int]  # and a seed


class Rivals:
    """Who competes, under the budget of a finished search."""

    def __init__(self, bench: Bench, others: list[Path]) -> None:
        """`others`: folders of further searches under the same budget."""
        self.bench, self._found = bench, bench.run.record["metrics"]["search"]
        records = [json.loads((folder / "record.json").read_text()) for folder in others]
        self._others = [record["metrics"]["search"] for record in records]
        budget = self._found["budget"]
        names = ("latency_ms", "size_mib", "macs", "memory_mib")
        self._limits = Limits(*(budget[f"max_{name}"] for name in names))

    def all(self, random: int, seed: int) -> list[Student]:
        """The searched student first."""
        model = predictor(self.bench)
        space, rows = self.bench.space, self._found["candidates"]
        named = {"searched": "chosen"}
        if "chosen_without_refine" in self._found:
            named = {"searched, second stage": "chosen", "searched": "chosen_without_refine"}
        named |= {"most MACs": "by_macs", "most parameters": "by_parameters"}
        students = []
        for name, key in named.items():
            genome = tuple(rows[self._found[key]]["genome"])
            students.append(Student(name, space, self._costed(space, genome, model)))
        for other in self._others:
            by = f"searched by {other['score']}"
            names = {by: other["chosen"]}
            if "chosen_without_refine" in other:
                names = {f"{by}, second stage": other["chosen"], by: other["chosen_without_refine"]}
            for name, row in names.items():
                genome = tuple(other["candidates"][row]["genome"])
                students.append(Student(name, space, self._costed(space, genome, model)))
        wanted, first = students[0].candidate.latency_ms, len(students)
        rng = np.random.default_rng(seed)
        while len(students) < first + random:
            genome = tuple(int(rng.integers(options)) for options in space.choices)
            drawn = Student(f"random {len(students) - first + 1}", space, self._costed(space, genome, model))
            if wanted is None or drawn.candidate.latency_ms is None:
                raise SystemExit("the target's card predicts no latency: rivals cannot be matched")
            near = abs(drawn.candidate.latency_ms / wanted - 1) <= _NEAR
            if (
                near
                and not drawn.candidate.excess(self._limits)
                and drawn.key not in {s.key for s in students}
            ):
                students.append(drawn)
        widest = self._by_hand(model)
        model.close()
        return [*students, *widest]

    def _by_hand(self, model: CostModel) -> list[Student]:
        by_hand = MobileNetV2(self.bench.spec)
        for percent in range(200, 9, -5):
            candidate = self._costed(by_hand, (percent,), model)
            if not candidate.excess(self._limits):
                return [Student(f"MobileNetV2 x{percent / 100:.2f}", by_hand, candidate)]
        print("no MobileNetV2 meets this budget, not even a tenth as wide", file=sys.stderr)
        return []

    @staticmethod
    def _costed(space: SearchSpace | MobileNetV2, genome: Genome, model: CostModel) -> Candidate:
        layers = space.layers(genome)
        cost, macs = model.predict(layers), sum(layer.macs for layer in layers)
        parameters = sum(layer.parameters for layer in layers)
        return Candidate(genome, parameters, macs, cost.latency_ms, cost.size_mib, {})


class Trainings:
    """Trainings by the run's own recipe with another number of epochs. All learn from the same stored logits;
    each architecture trains in the number format that is fastest for it."""

    def __init__(self, bench: Bench, epochs: int) -> None:
        phase = bench.trainings[0]
        self.bench = bench
        self.phase = replace(phase, recipe=msgspec.structs.replace(phase.recipe, epochs=epochs))
        self._courses: dict[str, Course] = {}

    def course(self, student: Student) -> Course:
        """The course of trainings in the form that is fastest for a student."""
        bench = self.bench
        inputs = bench.views.batch(torch.arange(self.phase.recipe.batch_size))
        plan, _ = probe(student.build(0), inputs, bench.recipe.threads, device=bench.device)
        return self._courses.setdefault(str(plan), Course(bench, bench.teacher, plan))

    def accuracies(self, jobs: list[Job]) -> Iterator[tuple[Job, float]]:
        """Validation accuracy of each job: side by side on a CUDA device, one by one elsewhere."""
        bench = self.bench
        together = len(jobs) if bench.device != "cpu" else 1
        for start in range(0, len(jobs), max(1, together)):
            part = jobs[start : start + together]
            course = self.course(part[0][0])
            lessons = [course.lesson(self.phase, student.build(seed)) for student, seed in part]
            stages = [
                course.stage(self.phase, lesson, name="distill", checkpoint=None, seed=seed)
                for lesson, (_, seed) in zip(lessons, part, strict=True)
            ]
            fit_together(stages, lambda what, done, total: None)
            for lesson, job in zip(lessons, part, strict=True):
                logits = evaluate(lesson.deploy(), bench.validation_inputs, device=bench.device).numpy()
                yield job, accuracy(logits, bench.data.validation_labels)


def read_done(path: Path | None) -> dict[tuple[str, int], float]:
    """What an interrupted comparison had finished; it must have been one of the same run and epochs."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return {(row["student"], row["seed"]): row["accuracy"] for row in map(json.loads, lines)}


def interval(runs: list[float]) -> float:
    """Half of the 95 % t interval of the mean; nan of a single run."""
    if len(runs) < 2:
        return math.nan
    return _T95[min(len(runs), 10) - 2] * statistics.stdev(runs) / math.sqrt(len(runs))


def table(students: list[Student], made: dict[tuple[str, int], float], seeds: list[int]) -> str:
    """Accuracies in percent, and the searched student's lead over each, paired by seed."""
    lines = [
        "| student | MMACs | parameters | predicted ms | top-1, % | searched leads by |",
        "|---" * 6 + "|",
    ]
    first = [made[students[0].key, seed] for seed in seeds]
    for student in students:
        runs, found = [made[student.key, seed] for seed in seeds], student.candidate
        lead = [100 * (ours - theirs) for ours, theirs in zip(first, runs, strict=True)]
        latency = "-" if found.latency_ms is None else f"{found.latency_ms:.4f}"
        ahead = "" if student is students[0] else f"{statistics.mean(lead):+.2f} ± {interval(lead):.2f}"
        accurate = f"{100 * statistics.mean(runs):.2f} ± {100 * interval(runs):.2f}"
        size = f"{found.macs / 1e6:.2f} | {found.parameters:,}"
        lines.append(f"| {student.name} | {size} | {latency} | {accurate} | {ahead} |")
    return "\n".join(lines)


def orders(
    bench: Bench, scores: list[str], students: list[Student], made: dict[tuple[str, int], float]
) -> str:
    """Kendall's tau of each score with the mean accuracy of the different students of the space, alone and
    with the ranks of the multiply-accumulates added."""
    scorer = replace(make_scorer(bench), score="+".join(scores))
    ours = {student.key: student for student in students if student.space is bench.space}
    different = list(ours.values())
    right = [statistics.mean(a for (key, _), a in made.items() if key == s.key) for s in different]
    terms = [scorer(student.candidate.genome) for student in different]
    macs = ranks([s.candidate.macs for s in different])
    lines = ["| score | tau | with MACs |", "|---|---|---|"]
    for name in terms[0]:
        values = [found[name] for found in terms]
        both = ranks(values) + macs
        lines.append(f"| {name} | {kendall_tau(values, right):.2f} | {kendall_tau(both, right):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--random", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], help="runs whose chosen students compete too"
    )
    parser.add_argument("--scores", nargs="+", default=[], help="print how these order the students")
    parser.add_argument("--done", type=Path, help="JSON lines of finished trainings, read and added to")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.run / "recipe.toml", {"threads": arguments.threads})
    bench = Bench(Run(arguments.run, recipe, find_target(recipe.target), Silent()))
    begin = time.perf_counter()
    students = Rivals(bench, arguments.also).all(arguments.random, recipe.seed)
    made = read_done(arguments.done)
    different = {student.key: student for student in students}.values()
    jobs = [(s, seed) for s in different for seed in arguments.seeds if (s.key, seed) not in made]
    for (student, seed), right in Trainings(bench, arguments.epochs).accuracies(jobs):
        made[student.key, seed] = right
        line = json.dumps({"student": student.key, "seed": seed, "accuracy": right})
        print(line, file=sys.stderr, flush=True)
        if arguments.done is not None:
            with arguments.done.open("a") as file:
                file.write(line + "\n")
    print(table(students, made, arguments.seeds))
    if arguments.scores:
        print(orders(bench, arguments.scores, students, made))
    means = {s.name: statistics.mean(made[s.key, seed] for seed in arguments.seeds) for s in students}
    drawn = [mean for name, mean in means.items() if name.startswith("random")]
    facts = {"epochs": arguments.epochs, "seeds": arguments.seeds, "accuracy": means}
    facts |= {"random_median": statistics.median(drawn), "random_best": max(drawn)} if drawn else {}
    print(json.dumps(facts | {"seconds": round(time.perf_counter() - begin)}))


if __name__ == "__main__":
    main()
