"""One network through its trainings, by the one training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from edgekd.plan import Plan, probe
from edgekd.recipe import DistillRecipe
from edgekd.stages.bench import Bench
from edgekd.stages.curriculum import Phase
from edgekd.stages.lesson import Lesson, prepare, teacher_for
from edgekd.teacher import Teacher
from edgekd.train import Stage, fit, load_checkpoint
from edgekd.views import CachedTeacher, Views

DISTILL_RATE = "distill.learning_rate"


@dataclass(frozen=True)
class Trained:
    """A network after its trainings. `rates`: images per second of each plan that was tried."""

    network: nn.Module
    history: list[dict[str, float]]
    plan: Plan
    rates: dict[str, float]


@dataclass(frozen=True)
class Taught:
    """What a training reads: views, their labels, and the teacher's answers to them."""

    views: Views
    labels: Tensor
    teacher: CachedTeacher | nn.Module | None


def stage_of(
    name: str, recipe: DistillRecipe, lesson: Lesson, taught: Taught, seed: int, plan: Plan
) -> Stage:
    """One training by a recipe as the loop takes it, without a checkpoint."""
    return Stage(
        name=name,
        model=lesson.model,
        views=taught.views,
        labels=taught.labels,
        teacher=taught.teacher,
        distillers=lesson.distillers,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        ema_decay=recipe.ema_decay,
        seed=seed,
        plan=plan,
        optimizer=recipe.optimizer,
        milestones=recipe.milestones,
        hard_weight=recipe.hard_weight,
        rate_key=DISTILL_RATE,
    )


class Course:
    """Trainings by one teacher and one plan. Trainings on the same images share the teacher's logits."""

    def __init__(self, bench: Bench, teacher: Teacher, plan: Plan, views: int | None = None) -> None:
        """`views`: how many views are stored; None is what the recipe says."""
        self._bench, self._teacher, self._plan, self._count = bench, teacher, plan, views
        self._views: dict[str, Views] = {}
        self._stored: dict[str, CachedTeacher] = {}

    def lesson(self, phase: Phase, network: nn.Module) -> Lesson:
        """The network as it is trained in a phase."""
        return prepare(self._bench.room(phase, self._teacher), network)

    def stage(
        self,
        phase: Phase,
        lesson: Lesson,
        *,
        name: str,
        checkpoint: Path | None,
        seed: int | None = None,
    ) -> Stage:
        """One training as the loop takes it; `seed` None is the recipe's."""
        bench = self._bench
        seed = bench.recipe.seed if seed is None else seed
        made = stage_of(name, phase.recipe, lesson, self._taught(phase, lesson), seed, self._plan)
        return replace(made, checkpoint=checkpoint, selection=bench.selection, ranks=bench.ranks)

    def _taught(self, phase: Phase, lesson: Lesson) -> Taught:
        kind = phase.augment
        if kind not in self._views:
            self._views[kind] = self._bench.views_on(self._plan.device, kind, self._count)
        views = self._views[kind]
        teacher = teacher_for(self._bench.room(phase, self._teacher), lesson, views, self._plan)
        if isinstance(teacher, CachedTeacher):
            teacher = self._stored.setdefault(kind, teacher)
        return Taught(views, self._bench.labels, teacher)


def train(
    bench: Bench, network: nn.Module, phases: tuple[Phase, ...], teacher: Teacher, label: str, key: str
) -> Trained:
    """Train a fresh `network` through all phases, each from where the one before left it. A start after an
    interruption continues with the last whole epoch; `label` and `key` tell the checkpoints apart.

    Raises:
        UsageError: a method needs what this teacher, network or data do not give.
    """
    several = len(phases) > 1
    stem = bench.run.folder / "checkpoints" / f"{label.replace(' ', '-')}-{key}"
    ends = [f"-{number}.pt" for number in range(1, len(phases) + 1)] if several else [".pt"]
    paths = [stem.with_name(stem.name + end) for end in ends]
    plan, rates = choose_plan(bench, network, paths[0], phases[0].recipe.batch_size)
    tried = ", ".join(f"{form} {rate:.0f}/s" for form, rate in rates.items()) or "as before"
    if since := _done(paths, bench.ranks.first):
        tried += f"; {since}"
    who = "" if label == "distill" else f"{label}: "
    bench.run.reporter.say(f"  {who}training in {plan}: {tried}")
    course = Course(bench, teacher, plan)
    history: list[dict[str, float]] = []
    for number, (phase, path) in enumerate(zip(phases, paths, strict=True), 1):
        lesson = course.lesson(phase, network)
        shown = f"{label} {number} of {len(phases)}" if several else label
        stage = course.stage(phase, lesson, name=shown, checkpoint=path)
        rows = fit(replace(stage, on_epoch=bench.run.on_epoch), bench.run.reporter.step)
        network = lesson.deploy()
        done, part = len(history), {"phase": float(number)} if several else {}
        history += [row | part | {"epoch": done + row["epoch"]} for row in rows]
    return Trained(network, history, plan, rates)


def _done(paths: Sequence[Path], first: bool) -> str:
    """Where an interrupted training goes on, for people; only the first process speaks."""
    stored = {path: load_checkpoint(path) for path in paths if first and path.exists()}
    if not stored:
        return ""
    path, last = list(stored.items())[-1]
    epoch = len(last["history"]) if last else 0
    return f"going on after epoch {epoch}" + f" of phase {paths.index(path) + 1}" * (len(paths) > 1)


def choose_plan(
    bench: Bench, network: nn.Module, checkpoint: Path, batch_size: int
) -> tuple[Plan, dict[str, float]]:
    """The plan of an interrupted training, so that it continues exactly; else the fastest one measured."""
    ranks = bench.ranks
    if not ranks.first:
        return ranks.of_first((Plan(), {}))
    stored = load_checkpoint(checkpoint)
    if stored is not None:
        return ranks.of_first((Plan(**stored["plan"]), {}))
    own = max(2, batch_size // ranks.count)
    inputs = bench.views.batch(torch.arange(min(own, len(bench.views))))
    plan, rates = probe(network, inputs, ranks.threads(bench.recipe.threads), device=bench.device)
    return ranks.of_first((replace(plan, compiled=bench.recipe.distill.compile), rates))
