"""How many images a CPU-second distillation trains on: a textbook loop, torchdistill, and edgekd.

    OMP_NUM_THREADS=1 python tools/bench/distill_speed.py --rounds 11 --out distill_speed.json

Same data (the demonstration images, shifted by up to one pixel), same teacher, same student, same batch, same
loss (KD, temperature 4, 0.1 labels and 0.9 teacher), same optimiser (AdamW), one thread. All contenders take
turns in one process, in another order every round; time is CPU time of the process, so that other work on
the machine counts less. Ratios are of the same round; their median has a 95 % bootstrap interval.

- textbook: DataLoader over a Dataset, float32, the torch teacher in every step.
- torchdistill: its DistillationBox on the same Dataset (needs ``pip install torchdistill``; else not run).
- edgekd: `edgekd.train.fit` in the plan that the probe chooses, teacher logits stored from the fastest
  faithful runtime, with everything the recipe does beside it (averaged weights, schedule). The stored logits
  of a recipe's V views serve its E epochs, so V / E of their cost belongs to each image trained on; it is
  counted in, and also stated apart.
- edgekd, recipe: the same with the recipe's own loss (dist) and blended views, which the others have not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from msgspec.structs import replace as with_fields
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdistill_box import TorchDistillBox

from edgekd import export
from edgekd.nets import count_macs, count_parameters
from edgekd.plan import Plan, probe
from edgekd.quantize.capture import capture
from edgekd.recipe import DataRecipe, DistillRecipe, Recipe, TeacherRecipe
from edgekd.sources import load_dataset
from edgekd.spaces import search_space
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.lesson import Classroom, Lesson, prepare
from edgekd.stages.training import Taught, stage_of
from edgekd.tasks.classification import normalise, to_tensor
from edgekd.teacher import Teacher, load_teacher, use_fastest_runtime
from edgekd.train import fit
from edgekd.views import CachedTeacher, Views

STUDENTS = {
    # What `edgekd search --target jetson` chooses with the default recipe: residual blocks.
    "searched": (3, 0, 1, 0, 0, 0, 2, 1, 1, 1, 0, 0, 1, 0, 0, 0, 3, 0),
    # Inverted residuals with depthwise convolutions in every stage.
    "depthwise": (1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0),
}
TEMPERATURE, MARGIN = 4.0, 1
RECIPE = Recipe().distill


class Contender(Protocol):
    """Someone who trains."""

    def epoch(self) -> float:
        """One pass over the images, CPU-seconds."""


class Shifted(Dataset[tuple[Tensor, int]]):
    """Normalised float32 images, each shifted at random when it is read."""

    def __init__(self, images: Tensor, labels: Tensor, preprocessing: Preprocessing, seed: int) -> None:
        self._padded, self._labels = F.pad(images, (MARGIN,) * 4), labels
        self._size = images.shape[-1]
        self._mean, self._std, self._scale = preprocessing.mean[0], preprocessing.std[0], preprocessing.scale
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row, column = torch.randint(0, 2 * MARGIN + 1, (2,), generator=self._generator).tolist()
        pixels = self._padded[index, :, row : row + self._size, column : column + self._size].float()
        return (pixels * self._scale - self._mean) / self._std, int(self._labels[index])


class Textbook:
    """The loop of every tutorial."""

    def __init__(self, teacher: nn.Module, student: nn.Module, data: Shifted, seed: int) -> None:
        self._teacher, self._student = teacher.eval(), student
        generator = torch.Generator().manual_seed(seed)
        self._loader = DataLoader(data, RECIPE.batch_size, shuffle=True, drop_last=True, generator=generator)
        self._optimizer = torch.optim.AdamW(
            student.parameters(), RECIPE.learning_rate, weight_decay=RECIPE.weight_decay
        )

    def epoch(self) -> float:
        begin = time.process_time()
        self._student.train()
        for inputs, labels in self._loader:
            with torch.no_grad():
                taught = self._teacher(inputs)
            logits = self._student(inputs)
            soft = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, 1),
                F.softmax(taught / TEMPERATURE, 1),
                reduction="batchmean",
            )
            loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * TEMPERATURE**2 * soft
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        return time.process_time() - begin


@dataclass
class Edgekd:
    """`fit` for an epoch, on logits that are stored just before, each part timed."""

    room: Classroom
    lesson: Lesson
    images: Tensor
    augment: str
    plan: Plan
    storing: list[float] = field(default_factory=list)  # CPU-seconds an epoch
    training: list[float] = field(default_factory=list)

    def epoch(self) -> float:
        """CPU-seconds of training and of this recipe's share of storing."""
        recipe, room = self.room.recipe, self.room
        views = Views(
            self.images, room.spec.preprocessing, self.augment, recipe.views, room.seed, margin=MARGIN
        )
        teacher = CachedTeacher(room.teacher.logits, views)
        begin = time.process_time()
        teacher.of(views.of_epoch(0))
        stored = time.process_time()
        taught = Taught(views, room.labels, teacher)
        once = with_fields(recipe, epochs=1)
        stage = stage_of("distill", once, self.lesson, taught, room.seed, self.plan)
        fit(stage, lambda what, done, total: None)
        self.training.append(time.process_time() - stored)
        self.storing.append(stored - begin)
        return self.training[-1] + recipe.views / recipe.epochs * self.storing[-1]


@dataclass(frozen=True)
class Scene:
    """What all contenders share."""

    spec: ModelSpec
    images: Tensor
    labels: Tensor
    teacher: Teacher
    seed: int

    @classmethod
    def demo(cls, images: int, seed: int, folder: Path) -> Scene:
        """The demonstration set and teacher, with the teacher's ONNX file in `folder`."""
        loaded = load_teacher(TeacherRecipe())
        data = load_dataset(DataRecipe(), seed=seed, image_size=loaded.image_size, color="grey")
        assert loaded.model is not None
        spec = ModelSpec(Preprocessing(28, 28, "grey", loaded.mean, loaded.std), data.classes)
        teacher = Teacher("demo", spec, loaded.sha256, loaded.size_mib, loaded.model, folder / "teacher.onnx")
        export.save(export.to_onnx(capture(loaded.model, spec.input_shape), spec), folder / "teacher.onnx")
        pixels = to_tensor(data.train_images[:images])
        use_fastest_runtime(teacher, normalise(pixels[:256], spec.preprocessing), 1)
        return cls(spec, pixels, torch.from_numpy(data.train_labels[:images]), teacher, seed)

    def student(self, genome: tuple[int, ...]) -> nn.Module:
        """A fresh one, the same each time."""
        space = search_space("mobile-cnn", self.spec, 8, (3, 5))
        return space.build(genome, torch.Generator().manual_seed(self.seed))

    def edgekd(self, genome: tuple[int, ...], recipe: DistillRecipe, augment: str, plan: Plan) -> Edgekd:
        """One of the two rows of this package."""
        room = Classroom(recipe, self.teacher, self.spec, self.labels, self.seed, augment == "crop-mix")
        return Edgekd(room, prepare(room, self.student(genome)), self.images, augment, plan)


def contenders(scene: Scene, genome: tuple[int, ...], plan: Plan) -> tuple[dict[str, Contender], str]:
    """All that can run here, and why torchdistill cannot, or ""."""
    data = Shifted(scene.images, scene.labels, scene.spec.preprocessing, scene.seed)
    model = scene.teacher.model
    assert model is not None
    kd = with_fields(RECIPE, method="kd", options={"kd": {"temperature": TEMPERATURE}})
    made: dict[str, Contender] = {"textbook": Textbook(model, scene.student(genome), data, scene.seed)}
    reason = ""
    try:
        made["torchdistill"] = TorchDistillBox(
            model,
            scene.student(genome),
            data,
            RECIPE.batch_size,
            {"lr": RECIPE.learning_rate, "weight_decay": RECIPE.weight_decay},
            TEMPERATURE,
        )
    except (ImportError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
    made["edgekd"] = scene.edgekd(genome, kd, "crop", plan)
    made["edgekd, recipe"] = scene.edgekd(genome, RECIPE, "crop-mix", plan)
    return made, reason


def interval(ratios: Sequence[float], seed: int, draws: int = 10_000) -> tuple[float, float, float]:
    """Median and its 95 % percentile bootstrap interval."""
    values = np.asarray(ratios)
    index = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(np.median(values[index], axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def measure(scene: Scene, name: str, rounds: int) -> dict[str, Any]:
    """Rates and ratios for one student. The first round warms up and is not counted."""
    genome = STUDENTS[name]
    inputs = normalise(scene.images[: RECIPE.batch_size], scene.spec.preprocessing)
    plan, rates = probe(scene.student(genome), inputs, threads=1)
    found, reason = contenders(scene, genome, plan)
    seconds: dict[str, list[float]] = {who: [] for who in found}
    order = np.random.default_rng(scene.seed)
    for round_ in range(rounds + 1):
        for who in order.permutation(list(found)):
            spent = found[str(who)].epoch()
            if round_:
                seconds[str(who)].append(spent)
        print(f"{name}: round {round_} of {rounds}", flush=True)
    trained = len(scene.labels) // RECIPE.batch_size * RECIPE.batch_size
    row: dict[str, Any] = {
        "student": name,
        "macs": count_macs(scene.student(genome), scene.spec.input_shape),
        "parameters": count_parameters(scene.student(genome)),
        "plan": str(plan),
        "probe_images_per_second": rates,
        "images_per_cpu_second": {who: round(trained / float(np.median(s))) for who, s in seconds.items()},
        "torchdistill_not_run": reason or None,
    }
    ours = found["edgekd"]
    assert isinstance(ours, Edgekd)
    row["stored_logits_per_cpu_second"] = round(len(scene.labels) / float(np.median(ours.storing[1:])))
    row["edgekd_without_storing"] = round(trained / float(np.median(ours.training[1:])))
    row["ratios"] = {
        f"{mine} over {theirs}": [
            round(value, 2)
            for value in interval([b / a for a, b in zip(seconds[mine], seconds[theirs], strict=True)], 0)
        ]
        for mine in ("edgekd", "edgekd, recipe")
        for theirs in ("textbook", "torchdistill")
        if theirs in seconds
    }
    return row


def processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def show(row: dict[str, Any]) -> None:
    """A few lines for people."""
    print(f"\n{row['student']}: {row['macs'] / 1e6:.2f} MMACs, {row['parameters']} parameters, {row['plan']}")
    for who, rate in row["images_per_cpu_second"].items():
        print(f"  {who:<16}{rate:>7} images a CPU-second")
    if row["torchdistill_not_run"]:
        print(f"  torchdistill    not run: {row['torchdistill_not_run']}")
    print(
        f"  stored logits   {row['stored_logits_per_cpu_second']:>7} images a CPU-second; "
        f"edgekd without that cost {row['edgekd_without_storing']}"
    )
    for name, (middle, low, high) in row["ratios"].items():
        print(f"  {name}: {middle:.2f} times [{low:.2f}, {high:.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", choices=sorted(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--images", type=int, default=2560, help="a round, each contender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene.demo(arguments.images, arguments.seed, Path(folder))
        rows = [measure(scene, name, arguments.rounds) for name in arguments.students]
    for row in rows:
        show(row)
    summary = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "teacher_runtime": scene.teacher.runtime,
        "views_and_epochs": [RECIPE.views, RECIPE.epochs],
        "batch_size": RECIPE.batch_size,
        "rounds": arguments.rounds,
        "images_per_round": arguments.images,
        "cpu_seconds_in_all": round(time.process_time() - begin),
        "rows": rows,
    }
    print(json.dumps(summary))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
