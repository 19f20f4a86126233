"""Commands for images without labels: what to label next, and labels that a teacher gives."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.console import Console
from edgekd.errors import UsageError

if TYPE_CHECKING:
    from edgekd.recipe import Recipe

_STRATEGIES = ("pcoreset", "coreset", "entropy", "class-balanced", "random")  # of edgekd.selection


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--unlabeled", required=True, help="The pool: a folder of images, or a .npz file."),
        click.option("--teacher", help="As of `edgekd compress`; an exported student, FILE.onnx, will do."),
        click.option("--weights", help="The factory's weights: .safetensors, or a plain .pt state dict."),
        click.option("--mean", help="Input mean, per channel, of pixels in 0..1: 0.485,0.456,0.406"),
        click.option("--std", help="Input deviation, likewise."),
        click.option("--image-size", type=int, help="Resize images to N x N pixels."),
        click.option("--skip-bad", is_flag=True, default=None, help="Leave unreadable images out."),
        click.option("--threads", type=int, help="Of the teacher's runtime; 0: all."),
        click.option("--seed", type=int, help="Seed of all random choices."),
        click.option("--json", "as_json", is_flag=True, help="Print the result on stdout as JSON."),
    ]
    return functools.reduce(lambda made, option: option(made), reversed(options), command)


def _recipe(given: dict[str, Any]) -> Recipe:
    from edgekd.recipe import load_recipe

    keys = {
        "unlabeled": "data.unlabeled", "teacher": "teacher.source", "weights": "teacher.weights",
        "image_size": "data.image_size", "skip_bad": "data.skip_bad", "threads": "threads", "seed": "seed",
    }  # fmt: skip
    overrides = {key: given[name] for name, key in keys.items() if given[name] is not None}
    for name in ("mean", "std"):
        if given[name]:
            overrides[f"teacher.{name}"] = _numbers(f"--{name}", given[name], float)
    return load_recipe(None, overrides)


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        example = "100,300,1000" if kind is int else "0.485,0.456,0.406"
        raise UsageError(f"{option} {text}: expected numbers such as {example}") from error


@click.command()
@_model_options
@click.option("--data", "labelled", default="", help="Images that have a label already, as of compress.")
@click.option("--budget", required=True, type=int, help="How many images to choose.")
@click.option("--strategy", default="pcoreset", show_default=True, type=click.Choice(_STRATEGIES))
@click.option(
    "--out", default="picks.csv", show_default=True, type=click.Path(path_type=Path), help="CSV, in order."
)
def select(labelled: str, budget: int, strategy: str, out: Path, as_json: bool, **given: Any) -> None:
    """Which images of a pool should people label next?

    PCoreSet takes, one after the other, the image whose class probabilities are farthest from those of all
    labelled and chosen ones. The model may be the teacher, or a student that learnt from the labels so far.

    \b
    Example: edgekd select --unlabeled demo --budget 20 --out picks.csv
             edgekd select --teacher runs/mine/5-export/float.onnx --data labelled/ \\
               --unlabeled pool/ --budget 100 --out picks.csv
    """
    from edgekd.stages.picks import pick

    with Console() as console:
        found = pick(_recipe(given), labelled, budget, strategy, out, console)
        console.say(
            f"{len(found['picks'])} of {found['pool'] - found['labelled_already']} images chosen by "
            f"{strategy}, {found['start']} labelled at the start: {out}"
        )
    if as_json:
        click.echo(json.dumps(found))


@click.command()
@_model_options
@click.option("--classes", default="", help="Names in the order of the teacher's outputs: cat,dog,horse")
@click.option("--gold", default="", help="Images with human labels, as of --data: measures the agreement.")
@click.option(
    "--min-confidence", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Drop labels below."
)
@click.option("--curve", default="", help="Train a small student on so many labels each: 100,300,1000")
@click.option("--curve-steps", default=600, show_default=True, type=click.IntRange(1), help="Steps of each.")
@click.option(
    "--out", default="labels.npz", show_default=True, type=click.Path(path_type=Path), help=".npz or .csv"
)
def label(classes: str, curve: str, out: Path, as_json: bool, **given: Any) -> None:
    """Let a teacher label a corpus. The .npz is what --data reads; the same command again resumes.

    Beside it stand NAME.report.json, NAME.report.html, and in NAME.answers what the teacher said: another
    threshold or gold set asks it nothing again.

    \b
    Example: edgekd label --unlabeled demo --gold demo --min-confidence 0.9 --out labels.npz
             edgekd label --teacher teacher.onnx --unlabeled corpus/ --gold checked/ \\
               --curve 100,300,1000 --out labels.npz && edgekd compress --data labels.npz
    """
    from edgekd.stages.labels import Assignment
    from edgekd.stages.labels import label as work

    task = Assignment(
        out,
        tuple(name.strip() for name in classes.split(",")) if classes else (),
        given.pop("gold"),
        given.pop("min_confidence"),
        tuple(_numbers("--curve", curve, int)) if curve else (),
        given.pop("curve_steps"),
    )
    with Console() as console:
        found = work(_recipe(given), task, console)
        for line in _lines(found):
            console.say(line)
    if as_json:
        click.echo(json.dumps(found))


def _lines(found: dict[str, Any]) -> list[str]:
    """The report in a few lines."""
    images, agreed = found["images"], found["agreement"]
    lines = [f"{images['kept']} of {images['found']} images labelled: {found['out']}"]
    if missing := [row["class"] for row in images["by_class"] if not row["kept"]]:
        lines.append(f"no image of: {', '.join(missing)}; --data wants one of each class")
    if agreed:
        lines.append(
            f"on {agreed['images']} gold images: accuracy {100 * agreed['accuracy']:.1f} %, Cohen's kappa "
            f"{agreed['cohen_kappa']:.3f}, Krippendorff's alpha {agreed['krippendorff_alpha']:.3f}, "
            f"macro F1 {agreed['macro_f1']:.3f}"
        )
    for point in found["curve"]["points"] if found["curve"] else ():
        lines.append(f"  {point['labels']} labels: {100 * point['accuracy']:.1f} %")
    return lines
