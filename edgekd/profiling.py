"""The command ``edgekd profile``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgekd.running import continue_run

_PATH = click.Path(path_type=Path, exists=True)
_P99_CALLS = 662  # that a p99 needs


@click.command()
@click.argument("models", metavar="MODELS... | RUN", nargs=-1, required=True, type=_PATH)
@click.option("--backend", "backends", multiple=True,
              help="onnxruntime, openvino, or on a Jetson tensorrt; several times for several.")  # fmt: skip
@click.option("--precision", default="f32", show_default=True, type=click.Choice(["f32", "bf16"]),
              help="Of operators not quantized in an ONNX file (OpenVINO).")  # fmt: skip
@click.option("--shape", "shapes", multiple=True, metavar="NAME=N,C,…", help="Sizes the file leaves open.")
@click.option("--layers", is_flag=True, help="Also the time of each layer here, by the runtime's profiler.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--calls", default=200, show_default=True, type=click.IntRange(64),
              help=f"Of each model; a p99 needs {_P99_CALLS}.")  # fmt: skip
@click.option("--on", "urls", multiple=True, metavar="ssh://USER@HOST",
              help="Measure there; several times for several devices at once (docs/remote.md).")  # fmt: skip
@click.option("--ssh-config", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Of ssh, in place of your own.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the numbers on stdout as JSON.")
def profile(models: tuple[Path, ...], backends: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Latency, memory and executed precision of ONNX files and bundles at batch 1, interleaved in one fresh
    process; or of a run's.

    \b
    A run: edgekd profile runs/jetson             (all up to its profile stage)
    Example: edgekd profile float.onnx int8.onnx --backend openvino --layers
    Every variant of a bundle that runs here: edgekd profile model.ekd
    Devices: edgekd profile int8.onnx --backend onnxruntime --on ssh://pi@board --on ssh://pi@other
    """
    from edgekd.backends.feeds import parse_shape
    from edgekd.profiler import Protocol
    from edgekd.remote import ssh_device
    from edgekd.stages.files import Wanted, profile_files, profile_on

    if any(model.is_dir() and not (model / "manifest.json").is_file() for model in models):
        if len(models) > 1:
            raise click.UsageError("one run at a time, or ONNX files and bundles")
        continue_run(models[0], "profile", as_json=as_json)
        return
    rounds = 40
    protocol = Protocol(given["threads"], rounds, -(-given["calls"] // rounds))
    here = not given["urls"]
    wanted = Wanted(
        models, backends, given["precision"], dict(map(parse_shape, given["shapes"])), given["layers"], here
    )
    if here:
        found = {"": profile_files(wanted, protocol)}
    else:
        if wanted.layers:
            raise click.UsageError("--layers is for this machine; on a Jetson TensorRT's are in --json")
        devices = [ssh_device(url, config=given["ssh_config"]) for url in given["urls"]]
        found = profile_on(devices, wanted, protocol)
    if as_json:
        click.echo(json.dumps(found[""] if here else found, default=str))
        return
    for device, rows in found.items():
        if device:
            click.echo(f"{device}:")
        for line in _told(rows):
            click.echo(line)


def _told(rows: dict[str, Any]) -> list[str]:
    """One device's figures as text."""
    from edgekd.report.facts import milliseconds, quantity, significant

    if "error" in rows:
        return [f"edgekd: {rows['error']}", f"hint: {rows['hint']}"]
    machine = rows["environment"]
    measured = {name: row for name, row in rows.items() if name != "environment"}
    on_gpu = any("device_p50_ms" in row for row in measured.values())
    heads = ["model", "executed in", "p50", "p90", "p99", "CPU time p50", "load", "first call", "memory"]
    body = [
        [
            name,
            executed_text(row["executed"]),
            *(milliseconds(row[f"latency_p{p}_ms"]) for p in (50, 90, 99)),
            *(milliseconds(row[key]) for key in ("cpu_p50_ms", "load_ms", "first_call_ms")),
            quantity(row["memory_mib"], "MiB"),
            *([milliseconds(row.get("device_p50_ms"))] if on_gpu else ()),
        ]
        for name, row in measured.items()
    ]
    calls = next(iter(measured.values()))["calls"]
    lines = columns([[*heads, *(["GPU events p50"] if on_gpu else ())], *body])
    inputs = ", ".join(f"{one['name']} {one['dtype']} {one['shape']}" for one in machine["inputs"])
    load = " to ".join(significant(machine[f"load_average_{when}"][0], 2) for when in ("before", "after"))
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {versions}; threads {machine['threads']}, load {load}",
        f"Input {inputs}; {calls} calls of each in turns, on the wall clock unless said.",
        "Percentiles are upper 99 % bounds"
        + ("." if calls >= _P99_CALLS else f"; a p99 needs --calls {_P99_CALLS}."),
        "CPU time does not see waiting for memory, for other programs or between threads.",
    ]
    for name, row in measured.items():
        if row.get("layers"):
            lines += ["", f"{name}, layer by layer (with the runtime's profiler, which slows them):"]
            lines += _layers(row["layers"])
    return lines


def _layers(layers: Sequence[dict[str, Any]]) -> list[str]:
    from edgekd.report.facts import NONE, count

    body = [
        [
            one["name"],
            one["op"],
            one["precision"],
            NONE if one["ms"] is None else f"{1000 * one['ms']:.1f}",
            count(one["macs"]) if one["macs"] else "",
            one["reason"],
        ]
        for one in layers
    ]
    return columns([["layer", "kernel", "executed in", "time, µs", "MACs", "why in float"], *body])


def executed_text(shares: dict[str, float] | None) -> str:
    """Shares of the multiply-accumulates by the precision that they run in: "int8 98 %, f32 2 %"."""
    if not shares:
        return "not read back" if shares is None else "no products"
    parts = sorted(shares.items(), key=lambda item: -item[1])
    return parts[0][0] if len(parts) == 1 else ", ".join(f"{name} {share:.1%}" for name, share in parts)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text whose columns are aligned; the first row is the heads."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
