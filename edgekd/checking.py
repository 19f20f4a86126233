"""The command ``edgekd check``: a bundle's own tests, here, on another machine, or on an emulated one."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.errors import EXIT_GATE, BackendError, BundleError, MissingExtraError, UsageError, unknown_name

if TYPE_CHECKING:
    from edgekd.backends import Layer
    from edgekd.manifest import Variant
    from edgekd.profiler import Device

_WIDTH = 14
_TOLD = 5  # layers left in float that a line names


@dataclass(frozen=True)
class CheckOrder:
    """What is checked where. `variants` empty: all that run there; `machine` empty: not known beforehand."""

    device: Device
    machine: str = ""
    variants: tuple[str, ...] = ()
    min_coverage: float = 0.95
    threads: int = 1
    timeout_s: float = 600.0


@click.command()
@click.argument(
    "bundle", metavar="BUNDLE | RUN", type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@click.option(
    "--variant", "variants", multiple=True, help="Only this one, though its conditions are not met."
)
@click.option("--min-coverage", default=0.95, show_default=True, type=click.FloatRange(0, 1),
              help="Share of an int8 variant's work in int8 kernels.")  # fmt: skip
@click.option(
    "--emulate", metavar="CARD", help="On that device's processor, emulated: rpi5, rpi4, android, a card."
)
@click.option("--onnxruntime", "version", metavar="VERSION",
              help="With --emulate.  [default: the one installed here]")  # fmt: skip
@click.option("--sysroot", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="With --emulate: an arm64 root of your own, with Python.")  # fmt: skip
@click.option("--on", metavar="ssh://USER@HOST", help="On that device; see docs/remote.md.")
@click.option("--ssh-config", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Of ssh, in place of your own.")  # fmt: skip
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option(
    "--timeout", default=600.0, show_default=True, type=click.FloatRange(1), help="Seconds a variant."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result on stdout as JSON.")
def check(bundle: Path, as_json: bool, **given: Any) -> None:
    """Does a bundle load, give its golden outputs, and run in int8? Every variant in a process of its own.

    \b
    Example: edgekd check runs/jetson/6-bundle
    On an emulated Raspberry Pi: edgekd check model.ekd --emulate rpi5
    Another engine: edgekd check model.ekd --emulate rpi4 --onnxruntime 1.21.0
    On a real one: edgekd check model.ekd --on ssh://pi@board
    Exit: 0 every variant that ran passed, 1 one failed, 16 the bundle is damaged or nothing in it runs there
    """
    for name in ("sysroot", "version"):
        if given[name] is not None and given["emulate"] is None:
            raise click.UsageError(f"--{'onnxruntime' if name == 'version' else name} goes with --emulate")
    result = check_bundle(_bundle_of(bundle), _order_of(given))
    for row in result["variants"]:
        click.echo(f"{row['verdict']:{_WIDTH}}{row['id']}: {_line(row)}", err=True)
    click.echo(f"{result['verdict']:{_WIDTH}}on {result['device']}", err=True)
    if as_json:
        click.echo(json.dumps(result))
    raise SystemExit(result["exit"])


def _bundle_of(folder: Path) -> Path:
    """A run's folder stands for the bundle in it."""
    inside = folder / "6-bundle"
    return inside if not (folder / "manifest.json").exists() and inside.is_dir() else folder


def _order_of(given: dict[str, Any]) -> CheckOrder:
    from edgekd.profiler import HERE
    from edgekd.runtime import machine

    numbers = {
        "min_coverage": given["min_coverage"],
        "threads": given["threads"],
        "timeout_s": given["timeout"],
    }
    if given["emulate"] and given["on"]:
        raise click.UsageError("--emulate and --on exclude each other")
    if given["on"]:
        from edgekd.remote import ssh_device

        return CheckOrder(
            ssh_device(given["on"], config=given["ssh_config"]), "", given["variants"], **numbers
        )
    if given["emulate"]:
        from edgekd.emulation import emulated
        from edgekd.target import find_target

        target = find_target(given["emulate"])
        device = emulated(target, given["sysroot"], given["version"], lambda text: click.echo(text, err=True))
        return CheckOrder(device, device.machine, given["variants"], **numbers)
    return CheckOrder(HERE, machine(), given["variants"], **numbers)


def check_bundle(folder: Path, order: CheckOrder) -> dict[str, Any]:
    """The result that ``--json`` prints (docs/check.md).

    Raises:
        BundleError: the bundle is damaged, or none of its variants runs there.
        UsageError: no such variant.
        DeviceError: the device cannot be reached, or was lost.
    """
    from edgekd.bundle import verify_bundle
    from edgekd.checks import worst
    from edgekd.manifest import read_manifest

    if problems := verify_bundle(folder):
        raise BundleError(
            f"{folder}: {'; '.join(problems)}", "copy the bundle again, or run the export again"
        )
    known = {variant.id: variant for variant in read_manifest(folder).variants}
    for name in order.variants:
        if name not in known:
            raise UsageError(*unknown_name("variant", name, known))
    rows = [_check(folder.resolve(), known[name], order) for name in order.variants or known]
    if all(row["verdict"] == "NOT_MEASURED" for row in rows):
        told = "; ".join(f"{row['id']}: {row['reason']}" for row in rows)
        raise BundleError(
            f"{folder}: no variant of this bundle runs on {order.device.name}: {told}",
            "edgekd doctor tells what this machine has; --variant NAME tries one all the same",
        )
    verdict = worst([row["verdict"] for row in rows])
    return {
        "format": "edgekd-check",
        "version": 1,
        "verdict": verdict,
        "exit": EXIT_GATE[verdict],
        "bundle": str(folder),
        "device": order.device.name,
        "variants": rows,
    }


def _check(folder: Path, variant: Variant, order: CheckOrder) -> dict[str, Any]:
    """One row: NOT_MEASURED where the variant is not for that machine, FAIL where its process dies."""
    from edgekd.profiler import Protocol
    from edgekd.profiler import check as replay

    row: dict[str, Any] = {"id": variant.id, "verdict": "NOT_MEASURED", "reason": ""}
    if variant.arch and order.machine and order.machine not in variant.arch and not order.variants:
        return row | {"reason": f"made for {' or '.join(variant.arch)}; the machine is {order.machine}"}
    protocol = Protocol(threads=order.threads, timeout_s=order.timeout_s)
    with tempfile.TemporaryDirectory(prefix="edgekd-") as work:
        executed = Path(work) / "executed.onnx"
        forced = bool(order.variants)
        try:
            told = replay(
                folder, variant.id, answers=executed, forced=forced, protocol=protocol, device=order.device
            )
            row |= {"reason": told["reason"], "runtime": told["runtime"], "environment": told["environment"]}
            if told["reason"]:
                return row
            layers, untold = _layers(folder / variant.file, executed, told)
        except BackendError as error:
            return row | {"verdict": "FAIL", "reason": error.message}
    row |= {"version": told["version"], "golden": told["golden"] | {"tolerance": variant.tolerance.max_abs}}
    row |= {"kernels": None, "int8_coverage_macs": None, "float_layers": None, "untold": untold}
    return row | _judge(row["golden"], layers, variant, order.min_coverage)


def _layers(model: Path, executed: Path, told: dict[str, Any]) -> tuple[Sequence[Layer] | None, str]:
    """What the runtime executes, or why that is not known."""
    from edgekd.backends import Layer
    from edgekd.backends.executed import coverage_of

    if "layers" in told:
        return [Layer(**layer) for layer in told["layers"]], ""
    if not executed.exists():
        return None, told.get("untold", "the runtime does not tell")
    try:
        return coverage_of(model, executed).layers, ""
    except MissingExtraError as error:
        return None, f"{error.message}: {error.hint}"


def _judge(
    golden: dict[str, Any], layers: Sequence[Layer] | None, variant: Variant, limit: float
) -> dict[str, Any]:
    """Verdict, reason, and the kernels that really run."""
    from edgekd.backends import Coverage

    found: dict[str, Any] = {}
    problems = [] if golden["ok"] else ["the golden outputs differ"]
    if layers is not None:
        share = Coverage(tuple(layers)).int8_macs
        left = [layer for layer in layers if layer.macs and layer.precision != "int8"]
        found = {
            "kernels": dict(Counter(layer.op for layer in layers).most_common()),
            "int8_coverage_macs": share,
            "float_layers": [
                {"name": layer.name, "op": layer.op, "macs": layer.macs, "reason": layer.reason}
                for layer in left
            ]
            if variant.precision == "int8"
            else [],
        }
        if variant.precision == "int8" and share < limit:
            problems.append(f"{share:.1%} of the work is in int8 kernels, the limit is {limit:.1%}")
    return found | {"verdict": "FAIL" if problems else "PASS", "reason": "; ".join(problems)}


def _line(row: dict[str, Any]) -> str:
    if "golden" not in row:
        return str(row["reason"])
    golden = row["golden"]
    difference = "not a number" if golden["max_abs_diff"] is None else f"{golden['max_abs_diff']:.3g}"
    parts = [row["reason"]] if row["reason"] else []
    parts.append(
        f"{row['runtime']} {row['version']}, golden outputs differ by {difference} at most, "
        f"{golden['tolerance']:.3g} allowed"
    )
    if row["kernels"] is None:
        return "; ".join([*parts, f"kernels not known: {row['untold']}"])
    parts.append(", ".join(f"{count} {op}" for op, count in row["kernels"].items()))
    left = row["float_layers"]
    if left:
        named = ", ".join(
            f"{one['name']} ({one['op']}: {one['reason'] or 'no reason known'})" for one in left[:_TOLD]
        )
        parts.append(f"{len(left)} in float: {named}{' …' if len(left) > _TOLD else ''}")
    return "; ".join(parts)
