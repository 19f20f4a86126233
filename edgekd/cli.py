"""The command line. Progress and summaries go to stderr, results for scripts to stdout."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgekd import __version__, labelling, listings, quantizing, scoring
from edgekd.checking import check
from edgekd.console import Console
from edgekd.embed.command import embed
from edgekd.errors import EXIT_GATE, EXIT_INTERNAL, EXIT_INTERRUPTED, EdgekdError, StorageError, missing_extra
from edgekd.gating.command import gate
from edgekd.profiling import profile
from edgekd.running import run_and_show

# Packages of the extra `train`; what needs them imports them where they are used.
_TRAINS_WITH = ("torch", "safetensors", "PIL", "optuna", "onnx", "onnxscript")
_KEPT = "--student runs/jetson/2-student.json \\\n  --student-weights runs/jetson/3-distilled.safetensors"
# What a stage does, and a call that starts from files alone.
_STAGE_HELP = {
    "search": (
        "Search a student for a target, without training.",
        "--target rpi5 \\\n  --student runs/jetson/2-student.json",
    ),
    "distill": (
        "Search if needed, then distill the teacher into the student.",
        "--student my.models:student \\\n  --teacher my.models:build --weights t.safetensors --data images/",
    ),
    "export": ("All up to the ONNX files of each dialect.", _KEPT),
}


def _recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option(
            "--target", help="Device: a name of `edgekd targets list`, or a card's path.  [default: jetson]"
        ),
        click.option(
            "--teacher",
            help="package.module:factory, timm:NAME, torchvision:NAME, transformers:PATH, FILE.onnx",
        ),
        click.option("--weights", help="The factory's weights: .safetensors, or a plain .pt state dict."),
        click.option("--student", help="package.module:factory or an earlier 2-student.json; else searched."),
        click.option("--student-weights", help="The student's float weights: evaluated, not trained."),
        click.option("--data", help="Image folder, .npz file, or a `datasets` folder saved to disk."),
        click.option(
            "--mean", help="The teacher's input mean, per channel, of pixels in 0..1: 0.485,0.456,0.406"
        ),
        click.option("--std", help="The teacher's input deviation, likewise."),
        click.option("--image-size", type=int, help="Resize images to N x N pixels."),
        click.option(
            "--skip-bad", is_flag=True, default=None, help="Leave unreadable images out, and count them."
        ),
        click.option("--max-latency-ms", type=float, help="Budget: latency on the target."),
        click.option("--max-size-mib", type=float, help="Budget: weights on disk."),
        click.option(
            "--max-drop", type=float, help="Budget: accuracy points lost, teacher to shipped student."
        ),
        click.option("--method", help="Distillation: names of `edgekd methods list`, joined by '+'."),
        click.option(
            "--quantize", "quantize_mode", type=click.Choice(["card", "qat", "ptq", "none"]), help="How."
        ),
        click.option("--seed", type=int, help="Seed of all random choices."),
        click.option("--threads", type=int, help="Training threads; 0 measures and takes the faster number."),
        click.option(
            "--executor", metavar="local[:N]|dask://HOST:PORT", help="Who scores students, or runs a sweep's."
        ),
        click.option(
            "--recipe", "recipe_file", type=click.Path(path_type=Path), help="TOML file (docs/recipe.md)."
        ),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any recipe key: distill.epochs=20"
        ),
        click.option(
            "--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/TARGET]"
        ),
        click.option("--json", "as_json", is_flag=True, help="Print record.json on stdout."),
    ]
    return functools.reduce(lambda made, option: option(made), reversed(options), command)


def _recipe(given: dict[str, Any]) -> Any:
    """The recipe of a file and of options."""
    from edgekd.recipe import load_recipe, parse_override

    keys = {
        "target": "target", "teacher": "teacher.source", "weights": "teacher.weights", "data": "data.source",
        "student": "search.student", "student_weights": "distill.weights",
        "image_size": "data.image_size", "skip_bad": "data.skip_bad", "method": "distill.method",
        "max_latency_ms": "budget.max_latency_ms", "max_size_mib": "budget.max_size_mib",
        "max_drop": "budget.max_drop_points",
        "quantize_mode": "quantize.mode", "seed": "seed", "threads": "threads", "executor": "executor",
    }  # fmt: skip
    overrides = {key: given[name] for name, key in keys.items() if given[name] is not None}
    for name in ("mean", "std"):
        if given[name]:
            overrides[f"teacher.{name}"] = _numbers(name, given[name])
    overrides |= dict(parse_override(text) for text in given["settings"])
    return load_recipe(given["recipe_file"], overrides)


def _run(last: str, **given: Any) -> None:
    from edgekd.pipeline import default_folder

    recipe = _recipe(given)
    folder = given["out"] or default_folder(recipe)
    run_and_show(recipe, folder, last, as_json=given["as_json"])


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"--{name} {text}: expected numbers such as 0.485,0.456,0.406") from error


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgekd")
def cli() -> None:
    """From a trained teacher to a small, quantized, verified model for one edge device.

    \b
    edgekd compress --target jetson          the whole pipeline on the built-in demonstration
    edgekd compress --target x86 --teacher my.models:build --weights t.safetensors --data images/
    """


@cli.command()
@_recipe_options
def compress(**given: Any) -> None:
    """Teacher to verified bundle. The same command again resumes.

    \b
    Example: edgekd compress --target x86 --teacher my_pkg.models:build_teacher \\
               --weights teacher.safetensors --data path/to/imagefolder --max-drop 1.0 --out runs/mine
    Exit: 0 the gate passed, 1 failed, 3 inconclusive, 75 unusable; others in docs/exit-codes.md
    """
    _run("bundle", **given)


def _add_stage(name: str, text: str, files: str) -> None:
    examples = (
        f"Example: edgekd {name} --target jetson --out runs/jetson",
        f"From files alone: edgekd {name} {files} --out runs/mine",
    )

    @cli.command(name, help="\n".join((text, "", "\b", *examples)))
    @_recipe_options
    def stage(**given: Any) -> None:
        _run(name, **given)


@cli.command()
@click.option("--targets", required=True, metavar="A,B,…", help="Names of `edgekd targets list`, or paths.")
@_recipe_options
def sweep(targets: str, **given: Any) -> None:
    """Compress one teacher for several targets; a float student is shared where the cards allow it.

    \b
    Example: edgekd sweep --targets jetson,rpi5,x86 --teacher my.models:build --weights t.safetensors \\
               --data images/ --out runs/all
    Side by side: --executor local:2, or --executor dask://HOST:8786 (docs/scale-out.md)
    Exit: the worst verdict's, or that of the first target that failed with an error
    """
    from edgekd.checks import worst
    from edgekd.sweeping import sweep as run_sweep

    if given["target"]:
        raise click.UsageError("--target is for one device; --targets names them all")
    names = [name.strip() for name in targets.split(",") if name.strip()]
    with Console() as console:
        found = run_sweep(_recipe(given), names, given["out"] or Path("runs/sweep"), console)
    listings.emit({row["target"]: row for row in (one.row() for one in found)}, given["as_json"])
    for one in found:
        if one.error is not None:
            raise one.error
    raise SystemExit(EXIT_GATE[worst([one.record["verdict"] for one in found if one.record])])


for _name, (_text, _files) in _STAGE_HELP.items():
    _add_stage(_name, _text, _files)


@cli.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "--weights-only",
    type=click.Choice(["8", "4"]),
    help="Of MODEL, also a candidate for size: bits of weights.",
)
@click.option(
    "--compare-engines",
    is_flag=True,
    help="Of MODEL, also candidates by other quantizers that are installed.",
)
@click.option("--qat", is_flag=True, help="Of MODEL, also a candidate trained by the float graph.")
@click.option("--epochs", type=click.IntRange(1), help="Passes of --qat over the samples.  [default: 5]")
@_recipe_options
def quantize(model: Path | None, **given: Any) -> None:
    """Quantize an ONNX file, or run all stages of a student up to quantization.

    With MODEL, a float .onnx file of any origin: calibrate on --data, try, leave in float what breaks,
    measure every candidate on the target's runtimes here, keep the best within the budget (docs/quantize.md).

    \b
    Example: edgekd quantize model.onnx --target x86 --data images/ --mean 0.485,0.456,0.406 \\
               --std 0.229,0.224,0.225 --max-drop 1.0
    Example: edgekd quantize speech.onnx --target rpi5 --data inputs.npz
    Example: edgekd quantize model.onnx --target x86 --data images/ --qat --epochs 10
    Without MODEL: edgekd quantize --target jetson --out runs/jetson
    """
    of_a_file = {name: given[name] for name in ("weights_only", "compare_engines", "qat", "epochs")}
    if model is None:
        if wrong := [f"--{name.replace('_', '-')}" for name, value in of_a_file.items() if value]:
            raise click.UsageError(f"{' and '.join(wrong)}: only with a MODEL.onnx")
        _run("quantize", **{name: value for name, value in given.items() if name not in of_a_file})
        return
    if given["epochs"] and not given["qat"]:
        raise click.UsageError("--epochs is of the training that --qat asks for")
    mean, std = (_numbers(name, given[name]) if given[name] else [] for name in ("mean", "std"))
    quantizing.quantize_model(model, given, mean, std)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("other", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False),
              help="With two runs: the HTML file.  [default: comparison.html here]")  # fmt: skip
def report(run: Path, other: Path | None, out: Path | None) -> None:
    """Write report.html and report.md again from a run folder or a record.json; or compare two runs.

    \b
    Example: edgekd report runs/jetson
    Compare: edgekd report runs/old runs/new --out change.html      (Markdown on stdout)
    """
    from edgekd.files import read_json, write_text
    from edgekd.report import comparison_markdown, comparison_page, write_reports

    paths = [path / "record.json" if path.is_dir() else path for path in (run, other) if path is not None]
    hint = "give a run's folder, or its record.json; edgekd compress makes one"
    for path in paths:
        if not path.is_file():
            raise StorageError(f"{path.parent} is not the folder of a run: it has no record.json", hint)
    records = [read_json(path, hint) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if not isinstance(record, dict) or "stages" not in record:
            raise StorageError(f"{path} is not the record of a run", hint)
    if other is None:
        if out is not None:
            raise click.UsageError("--out is for two runs; the report of one is written into its folder")
        for written in write_reports(records[0], paths[0].parent):
            click.echo(written)
        return
    names = (str(run), str(other))
    page = out or Path("comparison.html")
    write_text(page, comparison_page(records[0], records[1], names))
    click.echo(comparison_markdown(records[0], records[1], names), nl=False)
    click.echo(f"wrote {page}", err=True)


for _command in (
    check,
    embed,
    gate,
    profile,
    labelling.select,
    labelling.label,
    listings.targets,
    listings.methods,
    listings.doctor,
    scoring.proxies,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point: errors become two lines and an exit code."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from error
    except EdgekdError as error:
        click.echo(f"edgekd: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        raise SystemExit(error.exit_code) from error
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nedgekd: interrupted; the same command continues where it stopped", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except ModuleNotFoundError as error:
        if error.name not in _TRAINS_WITH:
            raise SystemExit(_of_ours(error)) from error
        missing = missing_extra(error.name, "all", "this command")
        click.echo(f"edgekd: {missing.message}\nhint: {missing.hint}", err=True)
        raise SystemExit(missing.exit_code) from error
    except Exception as error:  # Python would leave with 1, which means that the gate failed
        raise SystemExit(_of_ours(error)) from error


def _of_ours(error: Exception) -> int:
    """An error that no user can do anything about; the exit code."""
    traceback.print_exception(error)
    click.echo("edgekd: this is an error in edgekd, please report it with the lines above", err=True)
    return EXIT_INTERNAL


if __name__ == "__main__":
    main()
