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


def distilled_accuracies(
    bench: Bench, jobs: list[tuple[Genome, int]], epochs: int
) -> Iterator[tuple[Genome, float]]:
    """Validation accuracy of each (genome, seed) by the run's own recipe with `epochs` epochs: side by side
    on a CUDA device, one by one elsewhere. All learn from the same stored logits."""
    phase = bench.trainings[0]
    phase = replace(phase, recipe=msgspec.structs.replace(phase.recipe, epochs=epochs))
    trial = bench.space.build(jobs[0][0], torch.Generator().manual_seed(0))
    inputs = bench.views.batch(torch.arange(phase.recipe.batch_size))
    plan, _ = probe(trial, inputs, bench.recipe.threads, device=bench.device)
    course = Course(bench, bench.teacher, plan)
    together = len(jobs) if bench.device != "cpu" else 1
    for start in range(0, len(jobs), together):
        part = jobs[start : start + together]
        students = [bench.space.build(genome, torch.Generator().manual_seed(seed)) for genome, seed in part]
        lessons = [course.lesson(phase, student) for student in students]
        stages = [
            course.stage(phase, lesson, name="distill", checkpoint=None, seed=seed)
            for lesson, (_, seed) in zip(lessons, part, strict=True)
        ]
        fit_together(stages, lambda what, done, total: None)
        for lesson, (genome, seed) in zip(lessons, part, strict=True):
            logits = evaluate(lesson.deploy(), bench.validation_inputs).numpy()
            right = accuracy(logits, bench.data.validation_labels)
            print(f"{genome} seed {seed}: {100 * right:.2f} %", file=sys.stderr, flush=True)
            yield genome, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--random", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.run / "recipe.toml", {"threads": arguments.threads})
    bench = Bench(Run(arguments.run, recipe, find_target(recipe.target), Silent()))
    chosen: Genome = bench.genome
    rivals = random_students(bench, arguments.random, recipe.seed)
    students = (chosen, *rivals)
    begin = time.perf_counter()
    jobs = [(genome, seed) for genome in students for seed in arguments.seeds]
    found: dict[Genome, list[float]] = {}
    for genome, right in distilled_accuracies(bench, jobs, arguments.epochs):
        found.setdefault(genome, []).append(right)
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
