"""Trainings that differ in the method and the seed only, and the table of their accuracies."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar100 import load_module
from msgspec.structs import replace as with_fields
from torch import Tensor, nn

from edgekd import export
from edgekd.logit_store import LogitStore
from edgekd.nets import count_macs, count_parameters
from edgekd.plan import Plan, probe
from edgekd.quantize.capture import capture
from edgekd.recipe import DistillRecipe, TeacherRecipe
from edgekd.spec import ModelSpec
from edgekd.stages.lesson import Classroom, Lesson, prepare, teacher_for
from edgekd.stages.training import Taught, stage_of
from edgekd.tasks.classification import normalise
from edgekd.teacher import LoadedTeacher, Teacher, load_teacher, use_fastest_runtime
from edgekd.train import Stage, evaluate, fit_together
from edgekd.views import CachedTeacher, Views

LABELS_ALONE = "ce"


@dataclass(frozen=True)
class Job:
    """One training: `name` is its row in the table, `method` one of `edgekd.distillers` or "ce"."""

    name: str
    method: str
    seed: int
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """`accuracy` of the last epoch on all test images, 0 to 1; CPU-seconds and seconds of the training, or
    of all that ran together with it."""

    name: str
    seed: int
    accuracy: float
    cpu_seconds: float
    seconds: float


@dataclass
class Course:
    """What the trainings share. Images uint8 (N, C, H, W), labels int64, -1 where there is none. A seed of a
    job decides its first weights and its order of images; the views are the same for all."""

    spec: ModelSpec
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    teacher: Teacher
    student: Callable[[], nn.Module]
    recipe: DistillRecipe
    augment: str = "crop-flip"
    margin: int = 4

    def views_on(self, device: str) -> Views:
        """The views of the training images, in the memory of a device."""
        preprocessing, count = self.spec.preprocessing, self.recipe.views
        return Views(self.images, preprocessing, self.augment, count, 0, device, margin=self.margin)

    @cached_property
    def views(self) -> Views:
        """On the CPU, where one training runs at a time and all use the same ones."""
        return self.views_on("cpu")

    @cached_property
    def taught(self) -> CachedTeacher:
        """The teacher's logits on `views`."""
        return CachedTeacher(self.teacher.logits, self.views)

    @cached_property
    def test_inputs(self) -> Tensor:
        """Normalised float32."""
        return normalise(self.test_images, self.spec.preprocessing)

    def store(self) -> float:
        """Store the teacher's logits on every view; CPU-seconds."""
        begin = time.process_time()
        for view in range(self.views.count):
            self.taught.of(view)
        return time.process_time() - begin

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory()

    def _kept(self, teachers: Sequence[Teacher], views: Views) -> LogitStore:
        """Trainings side by side have views of their own, and share what the teacher says of them."""
        depends_on: list[object] = [teacher.sha256 for teacher in teachers]
        depends_on.append(views.digest())
        return LogitStore(Path(self._folder.name), "logits", depends_on, print, writes=True)

    def untrained(self, seed: int) -> nn.Module:
        """The student with the first weights of this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.student()

    def teacher_accuracy(self) -> float:
        """Top-1 on the test images, 0 to 1, in the runtime that teaches."""
        logits = torch.cat([self.teacher.logits(part) for part in torch.split(self.test_inputs, 250)])
        return float((logits.argmax(1) == self.test_labels).float().mean())

    def stage(self, job: Job, plan: Plan) -> tuple[Stage, Callable[[], nn.Module]]:
        """A training, and what gives its network when it has ended."""
        recipe, student = self.recipe, self.untrained(job.seed)
        views = self.views if plan.device == "cpu" else self.views_on(plan.device)
        if job.method == LABELS_ALONE:
            taught = Taught(views, self.labels, None)
            return stage_of(job.name, recipe, Lesson(student, ()), taught, job.seed, plan), lambda: student
        recipe = with_fields(recipe, method=job.method, options=job.options)
        keep = None if plan.device == "cpu" else self._kept
        room = Classroom(recipe, self.teacher, self.spec, self.labels, job.seed, mixes=False, keep=keep)
        lesson = prepare(room, student)
        teacher = teacher_for(room, lesson, views, plan)
        if isinstance(teacher, CachedTeacher) and plan.device == "cpu":
            teacher = self.taught
        taught = Taught(views, self.labels, teacher)
        return stage_of(job.name, recipe, lesson, taught, job.seed, plan), lesson.deploy


def add_options(parser: ArgumentParser, *, epochs: int, processes: int) -> None:
    """What every tool of such trainings asks for."""
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--form", choices=("fastest", "f32", "bf16"), default="fastest")
    parser.add_argument("--processes", type=int, default=processes)
    parser.add_argument("--out", type=Path)


def write_summary(
    path: Path | None, facts: dict[str, Any], course: Course, results: Sequence[Result], seconds: float
) -> None:
    """Print `facts` and what was trained as one line of JSON, and leave it at `path`."""
    student = course.untrained(0)
    facts = facts | {
        "parameters": count_parameters(student),
        "macs": count_macs(student, course.spec.input_shape),
        "images": len(course.labels),
        "test_images": len(course.test_labels),
        "epochs": course.recipe.epochs,
        "cpu_seconds_of_trainings": round(sum(result.cpu_seconds for result in results)),
        "seconds": round(seconds),
        "runs": [asdict(result) for result in results],
    }
    print(json.dumps(facts))
    if path is not None:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def train(course: Course, jobs: Sequence[Job], plan: Plan) -> list[Result]:
    """All jobs: one after the other on a CPU, side by side on other devices."""
    together = 1 if plan.device == "cpu" else len(jobs)
    if plan.device == "cpu":
        print(f"stored the teacher's logits in {course.store():.0f} CPU-seconds", file=sys.stderr)
    results: list[Result] = []
    for start in range(0, len(jobs), together):
        part = jobs[start : start + together]
        begin, wall = time.process_time(), time.perf_counter()
        stages = [course.stage(job, plan) for job in part]
        fit_together([stage for stage, _ in stages], lambda what, done, total: None)
        spent, seconds = time.process_time() - begin, time.perf_counter() - wall
        for job, (_, network) in zip(part, stages, strict=True):
            logits = evaluate(network().to(plan.device), course.test_inputs)
            right = float((logits.argmax(1) == course.test_labels).float().mean())
            results.append(Result(job.name, job.seed, right, spent, seconds))
            print(
                f"{job.name} seed {job.seed}: {100 * right:.2f} %, {spent:.0f} CPU-seconds", file=sys.stderr
            )
    return results


def train_in_processes(
    course: Course, make: Callable[[Namespace], Course], arguments: Namespace, jobs: Sequence[Job], plan: Plan
) -> list[Result]:
    """The same in `arguments.processes` processes, which is the way to use several cores on a CPU; `make`
    gives `course` anew in each."""
    count = arguments.processes if plan.device == "cpu" else 1
    if count == 1:
        return train(course, jobs, plan)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(_worker, make, arguments, jobs[n::count], plan) for n in range(count)]
        return [result for part in parts for result in part.result()]


def _worker(
    make: Callable[[Namespace], Course], arguments: Namespace, jobs: Sequence[Job], plan: Plan
) -> list[Result]:
    torch.set_num_threads(1)
    return train(make(arguments), jobs, plan)


def choose_plan(student: nn.Module, spec: ModelSpec, batch_size: int, form: str) -> Plan:
    """`form`: "fastest" of the probe with one thread, or "f32" or "bf16", so that a result can be repeated on
    another machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if form != "fastest":
        return Plan(bfloat16=form == "bf16", device=device, graphed=device == "cuda")
    inputs = torch.randn(batch_size, *spec.input_shape, generator=torch.Generator().manual_seed(0))
    plan, _ = probe(student, inputs, threads=1, device=device)
    return replace(plan, one_thread_rate=0.0)


def teacher_of(
    name: str, network: nn.Module, spec: ModelSpec, inputs: Tensor, *, black_box: bool = False
) -> Teacher:
    """A trained network in its fastest faithful runtime; a black box is only its ONNX file, of which no more
    than logits can be had."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        export.save(export.to_onnx(capture(network.eval(), spec.input_shape), spec), path)
        loaded = LoadedTeacher(network, path, "", 0.0)
        if black_box:
            loaded = load_teacher(TeacherRecipe(source=str(path)))
        teacher = Teacher(name, spec, loaded.sha256, loaded.size_mib, loaded.model, path)
        use_fastest_runtime(teacher, inputs, 1)
    return teacher


def read_images(folder: Path, *names: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """uint8 (N, 3, H, W) images, int64 labels and class names of packed sets."""
    loader = load_module(folder / "load_shared.py")
    parts = [loader.images(folder / name) for name in names]
    images = np.ascontiguousarray(np.concatenate([part[0] for part in parts]).transpose(0, 3, 1, 2))
    labels = np.concatenate([part[1] for part in parts]).astype(np.int64)
    return torch.from_numpy(images), torch.from_numpy(labels), tuple(parts[0][2])


def per_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` random samples of each class, in random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = torch.cat([order[labels[order] == label][:count] for label in labels.unique()])
    return order[torch.isin(order, kept)]


def read_part(
    folder: Path, names: Sequence[str], count: int, seed: int = 0
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """`count` random images of packed sets, equally many of each class; all where the sets have no more."""
    images, labels, classes = read_images(folder, *names)
    if count < len(labels):
        chosen = per_class(labels, count // len(classes), seed)
        images, labels = images[chosen], labels[chosen]
    return images, labels, classes


def table(results: Sequence[Result], against: Sequence[str]) -> str:
    """Markdown: mean and sample standard deviation over seeds, and of the differences to other rows, seed by
    seed, in percentage points."""
    rows: dict[str, dict[int, Result]] = {}
    for result in results:
        rows.setdefault(result.name, {})[result.seed] = result
    rivals = [name for name in against if name in rows]
    lines = [
        "| method | top-1, % | " + "".join(f"over {name} | " for name in rivals) + "CPU-seconds a training |"
    ]
    lines.append("|---|---|" + "---|" * len(rivals) + "---|")
    for name, runs in rows.items():
        seeds = sorted(runs)
        cells = [_spread([100 * runs[seed].accuracy for seed in seeds])]
        for rival in rivals:
            gaps = [100 * (runs[seed].accuracy - rows[rival][seed].accuracy) for seed in seeds]
            cells.append("" if rival == name else _spread(gaps, sign="+"))
        cost = statistics.mean(run.cpu_seconds for run in runs.values())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {cost:.0f} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], sign: str = "") -> str:
    middle = f"{statistics.mean(values):{sign}.2f}"
    return f"{middle} ± {statistics.stdev(values):.2f}" if len(values) > 1 else middle
