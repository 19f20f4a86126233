"""Which method fits this student and this data: short trainings of several, compared on held-out images.

Inspired by AutoDistiller, Liu et al. 2023 (arXiv:2303.01197), which predicts the outcome of configurations
from a table of earlier ones; here each is tried. Validation images take no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgekd.errors import UsageError
from edgekd.stages.bench import Bench
from edgekd.stages.curriculum import DEFAULT, Phase, tried
from edgekd.stages.lesson import Lesson
from edgekd.stages.training import Course, choose_plan
from edgekd.tasks.classification import correct
from edgekd.teacher import Teacher
from edgekd.train import Stage, evaluate, fit_together
from edgekd.views import CachedTeacher

_DRAWS = 4000
_LEVEL = 0.95

Right = NDArray[np.bool_]  # (seeds, images) of one method: which held-out images it gets right


@dataclass(frozen=True)
class Ranked:
    """A comparison. `leads` are intervals of (method - default) in accuracy, at 95 % for all together;
    `like_best` the methods that are not told apart from the best one."""

    chosen: str
    best: str
    default: str
    accuracy: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    leads: dict[str, tuple[float, float]]
    like_best: tuple[str, ...]

    @property
    def decided(self) -> bool:
        """Whether the best method is known to be better than all others."""
        return not self.like_best

    @property
    def reason(self) -> str:
        """For people: what was found, and what was not."""
        shown = f"'{self.best}' is first with {100 * self.accuracy[self.best]:.2f} %"
        unclear = ", ".join(f"'{name}'" for name in self.like_best)
        if self.decided:
            return f"{shown}, ahead of all others"
        if self.chosen != self.best:
            return (
                f"{shown}, but it cannot be told apart from {unclear} on so few images and seeds: the "
                f"default '{self.chosen}' is taken"
            )
        if self.best == self.default:
            return f"{shown} and is the default; it cannot be told apart from {unclear}"
        return f"{shown}, ahead of the default '{self.default}'; it cannot be told apart from {unclear}"


def rank(right: dict[str, Right], seed: int) -> Ranked:
    """Compare methods by accuracy, with bootstrap intervals over seeds and images together (Efron &
    Tibshirani 1993, chapter 13: percentiles of resampled means).

    Each resample draws seeds and images with replacement, the same ones for all methods, so that what all
    share cancels in differences. Intervals of differences are wider for many methods (Bonferroni). The
    default is ``dist`` where it takes part, else the first; another method is chosen only where the interval
    of its lead over the default is above zero.
    """
    names = list(right)
    default = DEFAULT if DEFAULT in names else names[0]
    accuracy = {name: float(right[name].mean()) for name in names}
    best = max(names, key=lambda name: (accuracy[name], name == default))
    draws = _resampled(np.stack([right[name] for name in names]), seed)
    of = dict(zip(names, draws.T, strict=True))
    share = (1 - _LEVEL) / max(1, len(names) - 1)
    leads = {name: _interval(of[name] - of[default], share) for name in names if name != default}
    behind = {name: _interval(of[best] - of[name], share) for name in names if name != best}
    return Ranked(
        chosen=best if best == default or leads[best][0] > 0 else default,
        best=best,
        default=default,
        accuracy=accuracy,
        intervals={name: _interval(of[name], 1 - _LEVEL) for name in names},
        leads=leads,
        like_best=tuple(name for name, (low, _) in behind.items() if low <= 0),
    )


def _resampled(right: NDArray[np.bool_], seed: int) -> NDArray[np.float64]:
    """(draws, methods) mean accuracies of resampled seeds and images; `right` is (methods, seeds, images)."""
    rng = np.random.default_rng([seed, 2])
    _, seeds, images = right.shape
    made = np.empty((_DRAWS, len(right)))
    for row in made:
        by_seed = right[:, rng.integers(0, seeds, seeds)].mean(1)
        row[:] = by_seed[:, rng.integers(0, images, images)].mean(1)
    return made


def _interval(values: NDArray[np.float64], outside: float) -> tuple[float, float]:
    low, high = np.quantile(values, (outside / 2, 1 - outside / 2))
    return float(low), float(high)


def suggest(bench: Bench, teacher: Teacher, key: str) -> tuple[Phase, dict[str, Any]]:
    """The full training by the method that is chosen, and what the record says of all that were tried.

    Raises:
        UsageError: a method of `distill.suggest_from` does not fit this teacher, student or data.
    """
    recipe, augment = bench.recipe.distill, bench.recipe.data.augment
    phases = tried(recipe, augment)
    seeds = [bench.recipe.seed + number for number in range(recipe.suggest_seeds)]
    probes, left_out = _probes(bench, teacher, phases, seeds, f"suggest-{key}")
    bench.run.reporter.say(
        f"  trying {', '.join(probes)}: {recipe.suggest_epochs} epochs, {len(seeds)} seeds each"
    )
    _fill_stores([stage for pairs in probes.values() for stage, _ in pairs])
    fit_together([stage for pairs in probes.values() for stage, _ in pairs], bench.run.reporter.step)
    right = {
        name: np.stack([_right(bench, lesson.deploy()) for _, lesson in pairs])
        for name, pairs in probes.items()
    }
    found = rank(right, bench.recipe.seed)
    bench.run.reporter.say(f"  {found.reason}")
    chosen = phases[found.chosen].recipe
    full = msgspec.structs.replace(chosen, epochs=recipe.epochs)
    facts = {
        "chosen": found.chosen,
        "best": found.best,
        "decided": found.decided,
        "reason": found.reason,
        "epochs": recipe.suggest_epochs,
        "seeds": seeds,
        "images": len(bench.selection[1]),
        "left_out": left_out,
        "methods": [_row(phases[name], found, right[name]) for name in right],
    }
    return Phase(full, augment), facts


def _probes(
    bench: Bench, teacher: Teacher, phases: dict[str, Phase], seeds: Sequence[int], stem: str
) -> tuple[dict[str, list[tuple[Stage, Lesson]]], dict[str, str]]:
    """One training for each method and seed, and why a method of the default list is left out. Each seed
    starts with the same weights and shows the images in the same order to all methods."""
    recipe, folder = bench.recipe.distill, bench.run.folder / "checkpoints"
    paths = {(name, seed): folder / f"{stem}-{name}-{seed}.pt" for name in phases for seed in seeds}
    student = bench.untrained(bench.blueprint)
    plan, _ = choose_plan(bench, student, next(iter(paths.values())), recipe.batch_size)
    views = min(recipe.views or recipe.suggest_epochs, recipe.suggest_epochs)
    course = Course(bench, teacher, plan, views)
    made: dict[str, list[tuple[Stage, Lesson]]] = {}
    left_out: dict[str, str] = {}
    for name, phase in phases.items():
        pairs = []
        try:
            for seed in seeds:
                lesson = course.lesson(phase, bench.untrained(bench.blueprint, seed))
                path = paths[name, seed]
                stage = course.stage(phase, lesson, name=f"try {name}", checkpoint=path, seed=seed)
                pairs.append((stage, lesson))
        except UsageError as error:
            if recipe.suggest_from:
                raise
            left_out[name] = error.message
        else:
            made[name] = pairs
    return made, left_out


def _fill_stores(stages: Sequence[Stage]) -> None:
    """Compute all stored logits before the trainings, which run side by side on streams of their own."""
    for stage in stages:
        if isinstance(stage.teacher, CachedTeacher):
            for view in range(stage.views.count):
                stage.teacher.of(view)
    if stages[0].plan.device != "cpu":
        torch.cuda.synchronize()


def _right(bench: Bench, network: nn.Module) -> NDArray[np.bool_]:
    """Which held-out images a network gets right."""
    inputs, labels = bench.selection
    return correct(evaluate(network, inputs, device=bench.device).numpy(), labels.numpy())


def _row(phase: Phase, found: Ranked, right: Right) -> dict[str, Any]:
    name = phase.recipe.method
    return {
        "method": name,
        "options": phase.recipe.options,
        "accuracy": found.accuracy[name],
        "interval": list(found.intervals[name]),
        "lead": list(found.leads[name]) if name in found.leads else None,
        "accuracy_by_seed": [float(row.mean()) for row in right],
    }
