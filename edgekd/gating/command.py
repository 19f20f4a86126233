"""The command ``edgekd gate``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from edgekd.running import continue_run

_FILE = click.Path(path_type=Path, exists=True)
_WIDTH = 13


@click.command()
@click.argument("candidate", type=_FILE, metavar="CANDIDATE | RUN")
@click.option("--reference", type=_FILE, help="ONNX file or bundle to compare with.")
@click.option("--backend", help="onnxruntime or openvino.  [default: a bundle's own, else onnxruntime]")
@click.option("--precision", default="f32", show_default=True, type=click.Choice(["f32", "bf16"]),
              help="Of operators not quantized in an ONNX file.")  # fmt: skip
@click.option("--variant", default="", help="Of the candidate bundle.  [default: the first that runs here]")
@click.option("--reference-variant", default="", help="Of the reference bundle, likewise.")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=N,C,…", help="Sizes the file leaves open.")
@click.option("--max-ratio", default=1.05, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Candidate latency over reference latency.")  # fmt: skip
@click.option("--data", help="Labelled images, or .npz with the models' inputs and labels: compare accuracy.")
@click.option("--part", default="validation", show_default=True, type=click.Choice(["validation", "all"]),
              help="Which images of --data.")  # fmt: skip
@click.option("--max-drop", default=1.0, show_default=True, type=click.FloatRange(0),
              help="Accuracy the candidate may lose, points (with --data).")  # fmt: skip
@click.option("--mean", help="Of an ONNX file's input, of pixels in 0..1: 0.485,0.456,0.406")
@click.option("--std", help="Likewise.")
@click.option("--min-agreement", type=click.FloatRange(0, 1), help="Share of equal answers (with --data).")
@click.option("--min-coverage", type=click.FloatRange(0, 1), help="Share of the work in int8 kernels.")
@click.option("--max-size-mib", type=click.FloatRange(0, min_open=True), help="Of the candidate's file.")
@click.option("--max-p90-ms", type=click.FloatRange(0, min_open=True), help="Needs --target and that device.")
@click.option("--target", help="Card of the device that --max-p90-ms is about.")
@click.option("--on", "urls", multiple=True, metavar="ssh://USER@HOST",
              help="Measure there; several of one kind share the sessions (docs/remote.md).")  # fmt: skip
@click.option("--ssh-config", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Of ssh, in place of your own.")  # fmt: skip
@click.option("--clock", type=click.Choice(["cpu", "wall", "device"]),
              help="Device: CUDA events.  [default: cpu; of tensorrt device]")  # fmt: skip
@click.option("--restarts", default=3, show_default=True, type=click.IntRange(2))
@click.option("--max-restarts", default=9, show_default=True, type=click.IntRange(2))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--inconclusive", type=click.Choice(["pass", "fail"]), help="Exit 0 or 1 in place of 3.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Folder for gate.json, junit.xml, gate.sarif, summary.md.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result on stdout as JSON.")
def gate(candidate: Path, reference: Path | None, out: Path | None, inconclusive: str | None, as_json: bool,
         **given: Any) -> None:  # fmt: skip
    """Is CANDIDATE slower, or worse, than the reference? Two ONNX files or bundles with the same inputs. Of
    RUN, a run's folder: does its student meet the run's own limits?

    \b
    A run: edgekd gate runs/jetson
    Example: edgekd gate new.onnx --reference released.onnx --max-ratio 1.05
    Accuracy: edgekd gate new.ekd --reference released.ekd --data images/ --max-drop 1.0
    Exit: 0 PASS, 1 FAIL, 3 INCONCLUSIVE, 75 UNUSABLE
    """
    from edgekd.gating.outputs import append_step_summary, measured, workflow_commands, write_outputs

    if reference is None:
        if not candidate.is_dir():
            raise click.UsageError("--reference is missing: the ONNX file or bundle to compare with")
        continue_run(candidate, "gate", as_json=as_json)
        return
    result = _compare(candidate, reference, given | {"out": out})
    if out is not None:
        write_outputs(result, out)
    append_step_summary(result)
    for check in result["checks"]:
        click.echo(
            f"{check['verdict']:{_WIDTH}}{check['name']}: {measured(check)}; {check['note']}", err=True
        )
    click.echo(f"{result['verdict']:{_WIDTH}}in {result['seconds']:.0f} s", err=True)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for command in workflow_commands(result):
            click.echo(command, err=as_json)
    if as_json:
        click.echo(json.dumps(result, default=str))
    code = {"pass": 0, "fail": 1}.get(inconclusive or "", 3)
    raise SystemExit(code if result["exit"] == 3 else result["exit"])


def _compare(candidate: Path, reference: Path, given: dict[str, Any]) -> dict[str, Any]:
    from edgekd.backends.feeds import parse_shape
    from edgekd.gate import LatencyLimits
    from edgekd.gating.accuracy import Evaluation
    from edgekd.gating.compare import How, Limits, compare
    from edgekd.gating.subject import resolve
    from edgekd.profiler import Protocol
    from edgekd.target import find_target

    latency = LatencyLimits(
        max_ratio=given["max_ratio"],
        restarts=given["restarts"],
        max_restarts=given["max_restarts"],
        seed=given["seed"],
    )
    limits = Limits(
        latency,
        given["max_drop"],
        given["min_agreement"],
        given["min_coverage"],
        given["max_size_mib"],
        given["max_p90_ms"],
        find_target(given["target"]) if given["target"] else None,
    )
    _needs_data(given)
    evaluation = None
    if given["data"]:
        normalisation = _normalisation(given["mean"], given["std"])
        evaluation = Evaluation(given["data"], given["part"], normalisation, given["seed"])
    shapes = dict(map(parse_shape, given["shapes"]))
    sides = [
        resolve(
            path, runtime=given["backend"] or "", precision=given["precision"], variant=variant, shapes=shapes
        )
        for path, variant in ((candidate, given["variant"]), (reference, given["reference_variant"]))
    ]
    how = How(
        Protocol(threads=given["threads"], calls=3),
        given["clock"] or ("device" if sides[0].backend == "tensorrt" else "cpu"),
        _devices(given["urls"], given["ssh_config"], limits.target),
        kept=given["out"] and given["out"] / "sessions.jsonl",
        progress=lambda text: click.echo(f"edgekd gate: {text}", err=True),
    )
    return compare(sides[0], sides[1], limits, how, evaluation)


def _devices(urls: tuple[str, ...], config: Path | None, target: Any) -> tuple[Any, ...]:
    from edgekd.profiler import HERE
    from edgekd.remote import ssh_device

    measure = target.measure if target is not None else None
    card = {"prepare": measure.prepare, "sensors": measure.sensors} if measure else {}
    return tuple(ssh_device(url, config=config, **card) for url in urls) or (HERE,)


def _needs_data(given: dict[str, Any]) -> None:
    source = click.get_current_context().get_parameter_source
    for name in ("max_drop", "min_agreement", "mean", "std", "part"):
        told = source(name)
        if told is not None and told.name == "COMMANDLINE" and not given["data"]:
            raise click.UsageError(f"--{name.replace('_', '-')} is about accuracy: it needs --data")


def _normalisation(mean: str | None, std: str | None) -> Any:
    from edgekd.gating.subject import Normalisation

    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise click.UsageError("--mean and --std come together: 0 and 1 for pixels in 0..1")
    return Normalisation(_numbers("mean", mean), _numbers("std", std))


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"--{name} {text}: expected numbers such as 0.485,0.456,0.406") from error
