"""Networks between teacher and student: each is taught by the one before, the last one teaches the student.

Mirzadeh et al. 2020 (arXiv:1902.03393): a student far below its teacher learns less from it than from an
assistant of a size in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekd.blocks import deployed
from edgekd.errors import UsageError
from edgekd.nets import count_parameters
from edgekd.spaces import Genome
from edgekd.stages.bench import Bench
from edgekd.stages.curriculum import Phase
from edgekd.stages.lesson import prepare
from edgekd.stages.preparation import taught_network
from edgekd.stages.student import Blueprint
from edgekd.stages.training import train
from edgekd.tasks.classification import accuracy
from edgekd.teacher import Teacher
from edgekd.train import evaluate

_NEAR = 1.25  # a searched candidate within this factor of the wanted size is taken before drawn ones
_DRAWN = 1000


@dataclass(frozen=True)
class Assistant:
    """A network of the space. `found`: ``candidates`` of the search, or ``space``, drawn from it."""

    genome: Genome
    macs: int
    found: str


def wanted_macs(teacher: int, student: int, count: int) -> list[float]:
    """Sizes in equal ratios between teacher and student, the largest first."""
    return [teacher * (student / teacher) ** (number / (count + 1)) for number in range(1, count + 1)]


def choose(wanted: Sequence[float], pools: Sequence[Sequence[Assistant]]) -> list[Assistant]:
    """For each size the nearest network by ratio, each smaller than the one before. Of the pools the first
    that has one within a factor of 1.25 is taken, else the nearest of all; fewer where none is left."""
    chosen: list[Assistant] = []
    for size in wanted:
        below = chosen[-1].macs if chosen else math.inf
        left = [[item for item in pool if item.macs < below] for pool in pools]

        def distance(item: Assistant, size: float = size) -> float:
            return abs(math.log(item.macs / size))

        nearest = [min(pool, key=distance) for pool in left if pool]
        if nearest:
            close = [item for item in nearest if distance(item) <= math.log(_NEAR)]
            chosen.append(close[0] if close else min(nearest, key=distance))
    return chosen


def choose_assistants(bench: Bench, student_macs: int) -> list[Assistant]:
    """As many as the recipe asks for.

    Raises:
        UsageError: the teacher's multiply-accumulates are not known, or the space has too few in between.
    """
    count, teacher_macs = bench.recipe.distill.assistants, bench.teacher.macs
    if teacher_macs is None or teacher_macs <= student_macs:
        raise UsageError(
            f"distill.assistants asks for {count} networks between teacher and student; the teacher takes "
            f"{'an unknown number of' if teacher_macs is None else f'{teacher_macs:,}'} "
            f"multiply-accumulates, the student {student_macs:,}",
            "--set distill.assistants=0",
        )
    rows = bench.run.record["metrics"]["search"]["candidates"]
    searched = [Assistant(tuple(row["genome"]), row["macs"], "candidates") for row in rows]
    pools = [
        [item for item in pool if student_macs < item.macs < teacher_macs]
        for pool in (searched, list(_drawn(bench)))
    ]
    chosen = choose(wanted_macs(teacher_macs, student_macs, count), pools)
    if len(chosen) < count:
        raise UsageError(
            f"distill.assistants asks for {count} networks between {student_macs:,} and {teacher_macs:,} "
            f"multiply-accumulates; the space '{bench.recipe.search.space}' gives {len(chosen)}",
            f"--set distill.assistants={len(chosen)}",
        )
    return chosen


def _drawn(bench: Bench) -> Iterator[Assistant]:
    """Networks of the space from its smallest to its largest: genes scatter around a level, drawn for each;
    even draws of all genes would nearly all be of a middle size."""
    rng, space = np.random.default_rng(bench.recipe.seed), bench.space
    options = np.asarray(space.choices)
    levels = rng.random((_DRAWN, 1)) + rng.normal(0, 0.2, (_DRAWN, len(options)))
    for row in (np.clip(levels, 0, 0.999) * options).astype(int):
        genome = tuple(int(gene) for gene in row)
        yield Assistant(genome, sum(layer.macs for layer in space.layers(genome)), "space")


def teach_assistants(
    bench: Bench, phases: tuple[Phase, ...], teacher: Teacher, student_macs: int, key: str
) -> tuple[Teacher, list[dict[str, Any]]]:
    """Train the chain by the student's own phases. Returns the last assistant, and all for the record.

    Raises:
        UsageError: as `choose_assistants`; or a method leaves other layers in the network than its genome
            says, and the student's are then not known without it.
    """
    rows: list[dict[str, Any]] = []
    chosen = choose_assistants(bench, student_macs)
    for number, assistant in enumerate(chosen, 1):
        blueprint = Blueprint(space=bench.recipe.search.space, genome=assistant.genome)
        _refuse_changed(bench, blueprint, phases, teacher)
        bench.run.reporter.say(f"  assistant {number} of {len(chosen)}: {assistant.macs / 1e6:.2f} MMACs")
        trained = train(bench, bench.untrained(blueprint), phases, teacher, f"assistant {number}", key)
        logits = evaluate(trained.network, bench.validation_inputs, device=bench.device)
        right = accuracy(logits.numpy(), bench.data.validation_labels)
        bench.run.reporter.say(f"  assistant {number} of {len(chosen)}: {100 * right:.2f} %")
        rows.append(
            {
                "genome": list(assistant.genome),
                "found": assistant.found,
                "macs": assistant.macs,
                "parameters": count_parameters(deployed(trained.network)),
                "accuracy": right,
                "taught_by": teacher.name,
                "architecture": list(bench.space.describe(assistant.genome)),
                "history": trained.history,
            }
        )
        teacher = taught_network(bench, trained.network, f"assistant {number}")
    return teacher, rows


def _refuse_changed(bench: Bench, blueprint: Blueprint, phases: tuple[Phase, ...], teacher: Teacher) -> None:
    names = bench.untrained(blueprint).state_dict().keys()
    for phase in phases:
        made = prepare(bench.room(phase, teacher), bench.untrained(blueprint)).deploy()
        if made.state_dict().keys() != names:
            raise UsageError(
                f"method '{phase.recipe.method}' leaves other layers in the network that it trains, which "
                "does not go with assistants",
                "choose another method, or --set distill.assistants=0",
            )
