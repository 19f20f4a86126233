"""How fast are students scored? Against the published procedure, and a whole search of thousands.

    OMP_NUM_THREADS=1 python tools/bench/search_speed.py --students 12        # paired, on the demonstration
    OMP_NUM_THREADS=1 python tools/bench/search_speed.py --search 500 2000 --processes 2
    OMP_NUM_THREADS=1 python tools/bench/search_speed.py --scored 1024 --device cuda --processes 1 4 8

Paired: for each student the plain procedure and `Scorer` take turns in one process, with one thread, in CPU
time. Plain is DisWOT as its scripts run it: teacher and student with fresh weights for every candidate, both
forward and backward for the gradient of the classifier, class after class. Both compute the same two terms,
which is checked. Half the batch: ours with 32 images, and how like the order is that it gives. Search: the
whole stage on the demonstration, in a fresh process for each size, with its wall and CPU seconds and the
largest memory of its processes. Scored: random students in one process or several that share the device,
against one thread of the CPU, and how far the scores lie apart; everything is warm before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.executor import Workers
from edgekd.nets import Outputs, tapped_forward
from edgekd.probing import randomised
from edgekd.ranking import kendall_tau
from edgekd.recipe import load_recipe
from edgekd.run import Run, Silent
from edgekd.search import Genome
from edgekd.stages.bench import Bench
from edgekd.stages.scorer import OneThread, Scorer, Terms, in_groups
from edgekd.stages.search import budget_limits, make_scorer, predictor
from edgekd.target import find_target

_WARM, _ALONE = 64, 64  # students that each process scores before the clock starts; those of the CPU


def plain_terms(
    space_build: nn.Module, teacher: nn.Module, inputs: Tensor, labels: Tensor, classes: int, seed: int
) -> dict[str, float]:
    """Both terms of one candidate, nothing kept from the one before."""
    seen: list[tuple[Outputs, Tensor]] = []
    for network in (space_build.train(), randomised(teacher, seed).train()):
        outputs = tapped_forward(network, inputs, classes)
        loss = F.cross_entropy(outputs.logits, labels)
        parameters = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters)
        weight = next(
            g for p, g in zip(reversed(parameters), reversed(gradients), strict=True) if p.dim() == 2
        )
        seen.append((outputs, weight))
    (student, of_student), (taught, of_teacher) = seen
    assert student.features is not None
    assert taught.features is not None
    maps = [F.normalize(f.flatten(1) @ f.flatten(1).T, dim=1) for f in (student.features, taught.features)]
    relation = -(maps[0] - maps[1]).square().sum() / len(inputs) ** 2
    width = min(of_student.shape[1], of_teacher.shape[1])
    of_student, of_teacher = (_to_width(w, width) for w in (of_student, of_teacher))
    total = torch.zeros((), device=inputs.device)
    for one, other in zip(of_student, of_teacher, strict=True):
        pair = [F.normalize(torch.outer(w, w), dim=1) for w in (one, other)]
        total = total + (pair[0] - pair[1]).square().sum()
    return {"relation": relation.item(), "semantic": (-total / of_student.numel()).item()}


def _to_width(gradient: Tensor, width: int) -> Tensor:
    """As `edgekd.proxies.diswot.to_width` does with the embedding, of which the gradient is linear."""
    if gradient.shape[1] == width:
        return gradient
    generator = torch.Generator().manual_seed(gradient.shape[1])
    drawn = torch.randn(gradient.shape[1], width, generator=generator) / width**0.5
    made: Tensor = gradient @ drawn.to(gradient.device)
    return made


def demonstration(folder: Path, settings: dict[str, object]) -> Bench:
    recipe = load_recipe(None, {"threads": 1, "search.teacher_state": "random", **settings})
    return Bench(Run(folder, recipe, find_target(recipe.target), Silent()))


def students(bench: Bench, count: int) -> list[Genome]:
    """Random ones within the budget, as a search scores them."""
    model = predictor(bench)
    limits, rng = budget_limits(bench, model), np.random.default_rng(bench.recipe.seed)
    found: list[Genome] = []
    while len(found) < count:
        genome = tuple(int(rng.integers(options)) for options in bench.space.choices)
        layers = bench.space.layers(genome)
        latency = model.predict(layers).latency_ms
        fits = latency is None or limits.latency_ms is None or latency <= limits.latency_ms
        if fits and (limits.macs is None or sum(layer.macs for layer in layers) <= limits.macs):
            found.append(genome)
    return found


def paired(bench: Bench, count: int) -> dict[str, object]:
    """CPU milliseconds a student of both, in turns."""
    teacher = bench.loaded.model
    assert teacher is not None
    classes, seed = len(bench.spec.classes), bench.recipe.seed
    scorer = make_scorer(bench)
    inputs = scorer.inputs
    fewer = _first(scorer, len(inputs) // 2)
    times: dict[str, list[float]] = {"plain": [], "ours": [], "ours_half_batch": []}
    scores: list[tuple[dict[str, float], dict[str, float]]] = []
    for number, genome in enumerate(students(bench, count + 1)):
        begin = time.process_time()
        student = bench.space.build(genome, torch.Generator().manual_seed(seed))
        plain = plain_terms(student, teacher, scorer.inputs, scorer.labels, classes, seed)
        middle = time.process_time()
        ours = scorer(genome)
        end = time.process_time()
        scores.append((ours, fewer(genome)))
        last = time.process_time()
        for term, value in plain.items():
            if not np.isclose(value, ours[term], rtol=1e-2, atol=1e-4):
                raise SystemExit(f"{genome}: {term} is {value} plainly and {ours[term]} here")
        if number:  # the first call of both is not counted
            times["plain"].append(1e3 * (middle - begin))
            times["ours"].append(1e3 * (end - middle))
            times["ours_half_batch"].append(1e3 * (last - end))
    found: dict[str, object] = {"students": count, "load_average": os.getloadavg()}
    found["plain_ms"] = round(float(np.mean(times["plain"])), 1)
    for name in ("ours", "ours_half_batch"):
        ratios = np.array(times["plain"]) / np.array(times[name])
        draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
        low, high = np.quantile(np.median(draws, 1), (0.025, 0.975))
        found[name] = {
            "ms": round(float(np.mean(times[name])), 1),
            "students_a_second": round(1e3 / float(np.mean(times[name])), 1),
            "ratio": round(float(np.median(ratios)), 1),
            "interval": [round(float(low), 1), round(float(high), 1)],
        }
    found["tau_of_half_the_batch"] = {
        term: round(kendall_tau([a[term] for a, _ in scores], [b[term] for _, b in scores]), 3)
        for term in scores[0][0]
    }
    return found


def _first(scorer: Scorer, count: int) -> Scorer:
    """The same score of the first images alone."""
    teacher = scorer.teacher
    assert teacher is not None
    parts = (teacher.logits, teacher.embedding, teacher.features)
    cut = Outputs(*(None if part is None else part[:count] for part in parts))  # type: ignore[arg-type]
    return replace(scorer, inputs=scorer.inputs[:count], labels=scorer.labels[:count], teacher=cut)


@dataclass(frozen=True)
class _Ready:
    """Scores for a while, and waits until as many processes have as there shall be."""

    scorer: Scorer
    folder: str
    processes: int

    def __call__(self, genomes: Sequence[Genome]) -> list[Terms]:
        found = OneThread(self.scorer)(genomes)
        (Path(self.folder) / str(os.getpid())).touch()
        while len(list(Path(self.folder).iterdir())) < self.processes:
            time.sleep(0.01)
        return found


def scored(bench: Bench, count: int, processes: int) -> dict[str, object]:
    """Random students a second on the bench's device, all processes warm, and on one thread of the CPU."""
    scorer, seed = make_scorer(bench), bench.recipe.seed
    genomes = students(bench, count + _WARM)
    first, timed = genomes[:_WARM], genomes[_WARM:]
    alone = timed[: min(count, _ALONE)]
    on_cpu = OneThread(replace(scorer, device="cpu"))
    on_cpu(first[:4])
    begin = time.process_time()
    expected = on_cpu(alone)
    cpu_seconds = time.process_time() - begin
    executor = "local" if processes == 1 else f"local:{processes}"
    with tempfile.TemporaryDirectory() as folder, Workers(executor) as workers:
        ready = _Ready(scorer, folder, processes)
        list(workers.run(ready, [first] * processes))
        groups = in_groups(timed, bench.device, processes)
        begin = time.perf_counter()
        done = list(workers.run(OneThread(scorer), groups))
        wall = time.perf_counter() - begin
    found = {g: terms for group, made in done for g, terms in zip(group, made or [], strict=True)}
    terms = {name: [[row[name] for row in rows] for rows in (expected, [found[g] for g in alone])]
             for name in expected[0]}  # fmt: skip
    rate, cpu_rate = count / wall, len(alone) / cpu_seconds
    return {
        "device": torch.cuda.get_device_name() if bench.device == "cuda" else bench.device,
        "processes": processes,
        "students": count,
        "images": len(scorer.inputs),
        "seed": seed,
        "students_a_second": round(rate, 1),
        "one_cpu_thread": round(cpu_rate, 1),
        "times": round(rate / cpu_rate, 1),
        "largest_difference": {
            name: float(np.max(np.abs(np.subtract(pair[0], pair[1]))) / np.std(pair[0]))
            for name, pair in terms.items()
        },
        "tau": {name: round(kendall_tau(*pair), 4) for name, pair in terms.items()},
        "load_average": os.getloadavg(),
    }


def searched(evaluations: int, processes: int, score: str) -> dict[str, object]:
    """A whole `edgekd search` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "edgekd", "search", "--target", "jetson", "--out", folder, "--json"]
        words += ["--executor", f"local:{processes}"]
        for key, value in {"evaluations": evaluations, "score": score}.items():
            words += ["--set", f"search.{key}={value}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begin = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    record = json.loads(done.stdout)
    search = record["metrics"]["search"]
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "evaluations": evaluations,
        "processes": processes,
        "different": search["evaluated"],
        "scored": sum(bool(row["terms"]) for row in search["candidates"]),
        "stage_seconds": record["stages"]["search"]["seconds"],
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(spent, 1),
        "largest_process_mib": round(after.ru_maxrss / 1024),
        "load_average": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--students", type=int, default=0, help="paired with the plain procedure")
    parser.add_argument("--search", type=int, nargs="*", default=[], help="evaluations of whole searches")
    parser.add_argument("--scored", type=int, default=0, help="students, on --device")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of --scored")
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--score", default="diswot", help="of the whole searches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.students:
        with tempfile.TemporaryDirectory() as folder:
            bench = demonstration(Path(folder), {"device": "cpu"})
            print(json.dumps(paired(bench, arguments.students)), flush=True)
    for processes in arguments.processes:
        for evaluations in arguments.search:
            print(json.dumps(searched(evaluations, processes, arguments.score)), flush=True)
        if arguments.scored:
            with tempfile.TemporaryDirectory() as folder:
                settings = {"device": arguments.device, "search.score": arguments.score}
                bench = demonstration(Path(folder), settings)
                print(json.dumps(scored(bench, arguments.scored, processes)), flush=True)


if __name__ == "__main__":
    main()
