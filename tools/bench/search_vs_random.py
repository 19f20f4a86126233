"""Does the searched student beat random ones of the same predicted latency? Distils all of them equally.

    python tools/bench/search_vs_random.py --run runs/jetson --random 5 --epochs 15 --seeds 0 1

The run's folder must hold a finished search. Random students are drawn uniformly from the same space, kept
when they meet the run's budget and are within 10 % of the chosen student's predicted latency. Prints a line
per training as it ends, then one per student and a JSON summary with the median of the random ones. On a CUDA
device all train side by side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from edgekd.cost import cost_model
from edgekd.plan import probe
from edgekd.recipe import load_recipe
from edgekd.run import Run, Silent
from edgekd.search import Candidate, Limits
from edgekd.stages.bench import Bench
from edgekd.stages.search import executed_precision
from edgekd.stages.training import Course
from edgekd.target import find_target
from edgekd.tasks.classification import accuracy
from edgekd.train import evaluate, fit_together

Genome = tuple[int, ...]
Job = tuple[Genome, int]  # architecture and seed


def random_students(bench: Bench, count: int, seed: int) -> list[Genome]:
    """Feasible genomes whose predicted latency is within 10 % of the chosen one's."""
    record = bench.run.record["metrics"]["search"]
    chosen = record["candidates"][record["chosen"]]
    budget = record["budget"]
    limits = Limits(budget["max_latency_ms"], budget["max_size_mib"], budget["max_macs"])
    model = cost_model(bench.run.target, executed_precision(bench))
    rng = np.random.default_rng(seed)
    found: list[Genome] = []
    while len(found) < count:
        genome = tuple(int(rng.integers(options)) for options in bench.space.choices)
        layers = bench.space.layers(genome)
        cost = model.predict(layers)
        candidate = Candidate(
            genome,
            sum(layer.parameters for layer in layers),
            sum(layer.macs for layer in layers),
            cost.latency_ms,
            cost.size_mib,
            {},
        )
        if candidate.excess(limits) or cost.latency_ms is None:
            continue
        if abs(cost.latency_ms / chosen["latency_ms"] - 1) <= 0.1 and genome not in found:
            found.append(genome)
    model.close()
    return found


class Trainings:
    """Trainings by the run's own recipe with another number of epochs. All learn from the same stored logits;
    each architecture trains in the number format that is fastest for it."""

    def __init__(self, bench: Bench, epochs: int) -> None:
        phase = bench.trainings[0]
        self.bench = bench
        self.phase = replace(phase, recipe=msgspec.structs.replace(phase.recipe, epochs=epochs))
        self._courses: dict[str, Course] = {}

    def build(self, genome: Genome, seed: int) -> torch.nn.Module:
        return self.bench.space.build(genome, torch.Generator().manual_seed(seed))

    def course(self, genome: Genome) -> Course:
        """The course of trainings in the form that is fastest for a genome."""
        bench = self.bench
        inputs = bench.views.batch(torch.arange(self.phase.recipe.batch_size))
        plan, _ = probe(self.build(genome, 0), inputs, bench.recipe.threads, device=bench.device)
        return self._courses.setdefault(str(plan), Course(bench, bench.teacher, plan))

    def accuracies(self, jobs: list[Job]) -> Iterator[tuple[Job, float]]:
        """Validation accuracy of each job: side by side on a CUDA device, one by one elsewhere."""
        bench = self.bench
        together = len(jobs) if bench.device != "cpu" else 1
        for start in range(0, len(jobs), max(1, together)):
            part = jobs[start : start + together]
            course = self.course(part[0][0])
            lessons = [course.lesson(self.phase, self.build(*job)) for job in part]
            stages = [
                course.stage(self.phase, lesson, name="distill", checkpoint=None, seed=seed)
                for lesson, (_, seed) in zip(lessons, part, strict=True)
            ]
            fit_together(stages, lambda what, done, total: None)
            for lesson, job in zip(lessons, part, strict=True):
                logits = evaluate(lesson.deploy(), bench.validation_inputs).numpy()
                yield job, accuracy(logits, bench.data.validation_labels)


def read_done(path: Path | None) -> dict[Job, float]:
    """What an interrupted comparison had finished; it must have been one of the same run and epochs."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(tuple(row["genome"]), row["seed"]): row["accuracy"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--random", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--done", type=Path, help="JSON lines of finished trainings, read and added to")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.run / "recipe.toml", {"threads": arguments.threads})
    bench = Bench(Run(arguments.run, recipe, find_target(recipe.target), Silent()))
    chosen: Genome = bench.genome
    rivals = random_students(bench, arguments.random, recipe.seed)
    students = (chosen, *rivals)
    begin = time.perf_counter()
    jobs = [(genome, seed) for genome in students for seed in arguments.seeds]
    made = read_done(arguments.done)
    for (genome, seed), right in Trainings(bench, arguments.epochs).accuracies(
        [job for job in jobs if job not in made]
    ):
        made[genome, seed] = right
        line = json.dumps({"genome": genome, "seed": seed, "accuracy": right})
        print(line, file=sys.stderr, flush=True)
        if arguments.done is not None:
            with arguments.done.open("a") as file:
                file.write(line + "\n")
    found = {genome: [made[genome, seed] for seed in arguments.seeds] for genome in students}
    rows = []
    for genome, runs in found.items():
        layers = bench.space.layers(genome)
        row = {
            "genome": genome,
            "searched": genome == chosen,
            "macs": sum(layer.macs for layer in layers),
            "parameters": sum(layer.parameters for layer in layers),
            "accuracy": statistics.mean(runs),
            "runs": runs,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    random_accuracies = [float(row["accuracy"]) for row in rows[1:]]  # type: ignore[arg-type]
    print(
        json.dumps(
            {
                "searched": rows[0]["accuracy"],
                "random_median": statistics.median(random_accuracies),
                "random_best": max(random_accuracies),
                "epochs": arguments.epochs,
                "seeds": arguments.seeds,
                "seconds": round(time.perf_counter() - begin),
            }
        )
    )


if __name__ == "__main__":
    main()
