"""The flow: teacher, search, distill, quantize, export, profile, gate, bundle; then the report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from edgekd.distillers import refuse_unmet
from edgekd.errors import UsageError, unknown_name
from edgekd.layout import TAPS
from edgekd.proxies import proxy
from edgekd.quantize.calibrators import calibrator
from edgekd.quantize.scheme import scheme_for
from edgekd.ranks import Ranks, join
from edgekd.recipe import Recipe, load_recipe
from edgekd.report import write_reports
from edgekd.run import STAGES, Reporter, Run, Silent, fingerprint, machine
from edgekd.spaces import space_names
from edgekd.stages import bundle, distill, export, gate, given, profile, quantize, search, teacher
from edgekd.stages.bench import Bench
from edgekd.stages.curriculum import check_curriculum
from edgekd.stages.others import source_and_weights
from edgekd.stages.refine import check_refinable, second_stage
from edgekd.stages.student import check_given
from edgekd.stages.training_set import has_unlabelled
from edgekd.target import find_target
from edgekd.tracking import check_trackers, tracked


def compress(
    *,
    target: str = "jetson",
    out: str | Path | None = None,
    recipe: str | Path | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Compress a teacher for a target; returns the record (docs/record.md).

    Overrides are recipe keys with ``__`` for the dot: ``compress(target="x86", distill__epochs=10)``.

    Raises:
        EdgekdError: see `edgekd.errors`; every leaf names what to do next.
    """
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    resolved = load_recipe(Path(recipe) if recipe else None, {"target": target} | dotted)
    return run_pipeline(resolved, Path(out) if out else default_folder(resolved))


def default_folder(recipe: Recipe) -> Path:
    """``runs/<target>``, with the data's name where it is not the demo."""
    name = Path(recipe.target).stem
    data = Path(recipe.data.source).stem
    return Path("runs") / (name if data == "demo" else f"{name}-{data}")


def run_pipeline(
    recipe: Recipe, folder: Path, reporter: Reporter | None = None, last: str = STAGES[-1]
) -> dict[str, Any]:
    """Run all stages up to `last`, skipping those that are up to date; returns the record. Of processes that
    ``torchrun`` started, the first does so; the others train along with it and return an empty record."""
    if last not in STAGES:
        raise UsageError(*unknown_name("stage", last, STAGES))
    _check_names(recipe)
    own = check_given(recipe)
    ranks = join(cuda=recipe.device != "cpu")
    if not ranks.first:
        return _come_along(recipe, folder, ranks)
    run = Run(folder, recipe, find_target(recipe.target), reporter or Silent())
    bench = Bench(run, ranks)
    refined = second_stage(recipe, run.record)
    outside = {
        "teacher": [recipe.teacher, *map(fingerprint, _teacher_files(recipe))],
        "data": [recipe.data, fingerprint(recipe.data.source), fingerprint(recipe.data.unlabeled)],
    }
    steps: dict[str, tuple[dict[str, object], tuple[str, ...], Callable[[Bench], dict[str, Any]]]] = {
        "teacher": (outside | {"seed": recipe.seed}, ("1-teacher.json",), teacher.run),
        "search": (
            {
                "search": recipe.search,
                "budget": recipe.budget,
                "target": run.target,
                "mode": recipe.quantize.mode,
                "student": own["student"],
                **({"distill": recipe.distill, "augment": recipe.data.augment} if refined else {}),
            },
            ("2-student.json",),
            given.run if recipe.search.student else partial(search.run, refined=refined),
        ),
        "distill": (
            {"distill": recipe.distill, "weights": own["weights"]},
            ("3-distilled.safetensors",),
            _distill_together,
        ),
        "quantize": ({"quantize": recipe.quantize}, (quantize.FILE,), quantize.run),
        "export": ({}, (export.FOLDER,), export.run),
        "profile": ({"profile": recipe.profile, "machine": machine()}, (profile.LOGITS,), profile.run),
        "gate": ({"gate": recipe.gate, "budget": recipe.budget, "machine": machine()}, (), gate.run),
        "bundle": ({}, ("6-bundle",), bundle.run),
    }
    with ranks.dismissed(), run.locked(), tracked(recipe, folder, run.reporter.say) as trackers:
        run.on_epoch = trackers.epoch
        for name, (inputs, artefacts, work) in steps.items():
            run.stage(name, inputs, artefacts, lambda work=work: work(bench))  # type: ignore[misc]
            if name == last:
                break
        run.save()
        write_reports(run.record, folder)
        trackers.results(run.record)
    return run.record


def _distill_together(bench: Bench) -> dict[str, Any]:
    """Stage 3 on all processes; afterwards the first is alone."""
    bench.ranks.call()
    found = distill.run(bench)
    bench.ranks.leave()
    return found


def _come_along(recipe: Recipe, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What all processes but the first do: wait for the training, take part in it, leave."""
    if ranks.called():
        run = Run(folder, recipe, find_target(recipe.target), Silent())
        _distill_together(Bench(run, ranks))
    return {}


def _teacher_files(recipe: Recipe) -> list[str]:
    """What the teachers are made of."""
    others = [part for text in recipe.teacher.others for part in source_and_weights(text)]
    return [recipe.teacher.source, recipe.teacher.weights, *others]


def _check_names(recipe: Recipe) -> None:
    """Refuse an unknown method, score, space or calibrator before any work, not when its stage comes; and a
    method that needs what a black box does not give, or labels which some images will not have.

    Raises:
        UsageError: names the unknown one and the nearest known one.
        MissingExtraError: a tracker is not installed.
    """
    trainings = check_curriculum(recipe)
    check_refinable(recipe)
    taps, labels = (
        ("logits",) if recipe.teacher.source.endswith(".onnx") else TAPS,
        not has_unlabelled(recipe.data),
    )
    for parts in trainings:
        refuse_unmet(parts, teacher_taps=taps, student_taps=TAPS, labels=labels)
    check_trackers(recipe)
    if recipe.search.score != "auto":
        proxy(recipe.search.score)
    calibrator(recipe.quantize.calibrator)
    if (engine := recipe.quantize.engine) != "edgekd":
        raise UsageError(
            f"quantize.engine={engine}: of `edgekd quantize MODEL.onnx`, not of a student that edgekd trains",
            f"edgekd quantize RUN/5-export/float.onnx --data … --set quantize.engine={engine}",
        )
    scheme_for(find_target(recipe.target), recipe.quantize.learn_offsets)
    if recipe.search.space not in space_names():
        raise UsageError(*unknown_name("search space", recipe.search.space, space_names()))
