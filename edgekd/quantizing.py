"""`edgekd quantize MODEL.onnx`: from the options of the command to the candidates' table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.console import Console
from edgekd.errors import UsageError

if TYPE_CHECKING:
    from edgekd.recipe import QuantizeRecipe
    from edgekd.stages.onnx_choice import Training

# Options of the stage `quantize` that mean nothing for a file.
_OF_A_RUN = ("teacher", "weights", "student", "student_weights", "method", "quantize_mode", "skip_bad")
_OF_A_STUDENT = (
    "mode", "weight_bits", "layer_bits", "activation_bits", "layer_activation_bits", "learn_offsets",
    "freeze_after", "correct_biases", "damping",
)  # fmt: skip


def quantize_model(model: Path, given: dict[str, Any], mean: list[float], std: list[float]) -> None:
    """Run the command for a file and print its table.

    Raises:
        UsageError: an option of a run was given, or no samples.
    """
    from edgekd.quantize.samples import Pixels
    from edgekd.recipe import load_recipe, parse_override
    from edgekd.stages.onnx_choice import Wanted
    from edgekd.stages.quantize_file import quantize_file
    from edgekd.target import find_target

    options = {name: f"--{name.removesuffix('_mode').replace('_', '-')}" for name in _OF_A_RUN}
    wrong = [option for name, option in options.items() if given.get(name) is not None]
    if wrong:
        raise UsageError(
            f"{', '.join(wrong)}: not an option of `edgekd quantize MODEL.onnx`",
            "without a file, `edgekd quantize` runs the stages of a student up to quantization",
        )
    if not given["data"]:
        raise UsageError(
            f"quantize {model}: no samples to calibrate with",
            "--data FOLDER of images, or --data FILE.npz with one array for each input of the model",
        )
    recipe = load_recipe(given["recipe_file"], dict(parse_override(text) for text in given["settings"]))
    target = find_target(given["target"] or recipe.target)
    quantize = recipe.quantize
    _check(quantize)
    if quantize.engine != "edgekd" and (given["qat"] or quantize.sensitivity):
        raise UsageError(
            f"quantize.engine={quantize.engine}: --qat and quantize.sensitivity are edgekd's own",
            "leave one out; --compare-engines makes all candidates",
        )
    default = quantize.calibrator == type(quantize)().calibrator
    calibrators = ("mse", "min-max", "percentile") if default else (quantize.calibrator,)
    wanted = Wanted(
        model,
        target,
        given["data"],
        given["out"] or Path("runs") / f"{model.stem}-{given['target'] or recipe.target}",
        Pixels(tuple(mean), tuple(std), given["image_size"] or 0),
        calibrators,
        quantize.calibration_images,
        quantize.calibration_choice,
        given["max_drop"],
        given["max_latency_ms"],
        given["max_size_mib"],
        int(given["weights_only"] or 0),
        given["compare_engines"],
        given["threads"] or recipe.profile.threads,
        recipe.seed if given["seed"] is None else given["seed"],
        training(quantize, given["epochs"]) if given["qat"] else None,
        quantize.sensitivity,
        quantize.engine,
    )
    with Console() as console:
        console.say(f"target {target.id}, folder {wanted.folder}")
        record = quantize_file(wanted, console)
        _print(record, console)
    if given["as_json"]:
        click.echo(json.dumps(record, default=str))


def _check(quantize: QuantizeRecipe) -> None:
    """Before any work: a calibrator that there is, and no key that would do nothing for a file."""
    from edgekd.quantize.calibrators import calibrator

    calibrator(quantize.calibrator)
    plain = type(quantize)()
    idle = [name for name in _OF_A_STUDENT if getattr(quantize, name) != getattr(plain, name)]
    if idle:
        raise UsageError(
            f"{', '.join(f'quantize.{name}' for name in idle)}: of a student that edgekd trains, not of "
            "`edgekd quantize MODEL.onnx`",
            "leave it out; --qat trains with 8 bits, --weights-only 4 adds a file with weights of 4 bits",
        )


def training(quantize: QuantizeRecipe, epochs: int | None) -> Training:
    """What ``--qat`` asks for: the recipe's method, options and rate where they are set."""
    from edgekd.stages.onnx_choice import Training

    plain = Training()
    return Training(
        epochs or max(plain.epochs, quantize.epochs),
        quantize.learning_rate,
        method=quantize.method or plain.method,
        options=quantize.options,
    )


def _print(record: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "candidate", "lost", "int8 MACs", "CPU ms", "MiB"):
        table.add_column(name, justify="left" if name in ("", "candidate") else "right", no_wrap=True)
    for row in record["candidates"]:
        told = [
            "-" if value is None else form.format(value)
            for value, form in (
                (row["drop"], "{:.2f}"),
                (row["int8_coverage_macs"] and 100 * row["int8_coverage_macs"], "{:.0f} %"),
                (row["cpu_p50_ms"], "{:.3g}"),
                (row["size_mib"], "{:.3g}"),
            )
        ]
        table.add_row("*" if row["id"] == record["chosen"] else "", row["id"], *told)
    console.console.print(table)
    for row in record["candidates"]:
        if row["reason"]:
            console.say(f"{row['id']}: {row['reason']}")
    if record["build"] is not None:
        verdict = {True: "built", False: "refused", None: "not built"}[record["build"]["ok"]]
        console.say(f"TensorRT, {verdict}: {record['build']['message']}")
    for name, why in record["engines_failed"].items():
        console.say(f"engine {name} has no row: {why}")
    console.say(f"kept: {record['kept']} ({record['reason']})")
