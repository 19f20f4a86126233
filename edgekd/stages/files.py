"""The profile of plain ONNX files, and what this machine has: for use without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from edgekd.backends import backend, backend_names
from edgekd.backends.feeds import Feed, read_feeds
from edgekd.bundle import verify_bundle
from edgekd.errors import BundleError, EdgekdError, MissingExtraError, UsageError
from edgekd.manifest import read_manifest
from edgekd.profiler import HERE, Device, Protocol, Variant, environment, measure
from edgekd.runtime import engine_for
from edgekd.target import all_targets, is_this_machine


@dataclass(frozen=True)
class Wanted:
    """What to profile: ONNX files, bundles, or both; all take the same inputs.

    `backends` empty means all that the machine has for a file, and a bundle's own choice; `precision` is of
    operators that are not quantized in a file; `shapes` are of inputs whose sizes the first file leaves open.
    """

    models: tuple[Path, ...]
    backends: tuple[str, ...] = ()
    precision: str = "f32"
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    layers: bool = False
    here: bool = True


def profile_files(wanted: Wanted, protocol: Protocol) -> dict[str, Any]:
    """Latency, memory and executed precision of each file on each runtime, measured interleaved, by
    "runtime:file" or, in a bundle, by the variant's id; and the ``environment``.

    Raises:
        UsageError: no such runtime, or a size of an input is not known.
        BundleError: a bundle is damaged, or nothing in it runs here.
        BackendError: a runtime refuses a file.
    """
    variants = _variants(wanted)
    feeds = read_feeds(Path(variants[0].model), wanted.shapes)
    found = _measured(variants, protocol, feeds, HERE)
    for one in variants:
        engine, row = backend(one.backend), found[one.id]
        coverage = engine.coverage(
            Path(one.model), precision=one.precision, time_layers=wanted.layers, feeds=feeds
        )
        row["executed"] = coverage.shares
        row |= {"int8_coverage_nodes": coverage.int8_nodes, "int8_coverage_macs": coverage.int8_macs}
        if wanted.layers:
            row["layers"] = [asdict(layer) for layer in coverage.layers]
    return found


def profile_on(devices: Sequence[Device], wanted: Wanted, protocol: Protocol) -> dict[str, Any]:
    """The same on each device, all devices at once, by the device's name; kernels are not read back.

    Raises:
        EdgekdError: that of the first device, when none gave an answer. Else its error stands in its place.
    """
    variants = _variants(wanted)
    feeds = read_feeds(Path(variants[0].model), wanted.shapes)
    errors: list[EdgekdError] = []

    def one(device: Device) -> dict[str, Any]:
        try:
            return _measured(variants, protocol, feeds, device)
        except EdgekdError as error:
            errors.append(error)
            return {"error": error.message, "hint": error.hint}

    with ThreadPoolExecutor(len(devices)) as pool:
        found = dict(zip((device.name for device in devices), pool.map(one, devices), strict=True))
    if len(errors) == len(devices):
        raise errors[0]
    return found


def _variants(wanted: Wanted) -> list[Variant]:
    for name in wanted.backends:
        backend(name)
    names = [model.name for model in wanted.models]
    found: list[Variant] = []
    for model in wanted.models:
        told = model.name if names.count(model.name) == 1 else str(model)
        if model.is_dir():
            found += _of_bundle(model, f"{told}:" if len(names) > 1 else "", wanted)
        else:
            found += _of_file(model, told, wanted)
    return found


def _of_file(model: Path, told: str, wanted: Wanted) -> list[Variant]:
    usual: tuple[str, ...] = ("onnxruntime", "openvino") if wanted.here else ("onnxruntime",)
    if wanted.here:  # those that are installed; where none is, the first says how to get it
        usual = tuple(name for name in usual if find_spec(name) is not None) or usual
    return [
        Variant(
            f"{name}:{told}", name, str(model.resolve()), wanted.precision if name == "openvino" else "f32"
        )
        for name in wanted.backends or usual
    ]


def _of_bundle(folder: Path, prefix: str, wanted: Wanted) -> list[Variant]:
    """Each variant that runs here."""
    if not wanted.here:
        raise UsageError(
            f"{folder} is a bundle; on a device a file is profiled",
            f"give one of {folder / 'models'}; edgekd check {folder} --on takes the bundle",
        )
    if problems := verify_bundle(folder):
        raise BundleError(f"{folder}: {'; '.join(problems)}", "copy the bundle again")
    found, reasons = [], []
    manifest = read_manifest(folder)
    for variant in manifest.variants:
        runtime, reason = engine_for(msgspec.json.decode(msgspec.json.encode(variant)))
        if not runtime or (wanted.backends and runtime not in wanted.backends):
            reasons.append(f"{variant.id}: {reason or f'for {runtime}'}")
            continue
        path, precision = (folder / variant.file).resolve(), variant.float_precision(runtime)
        found.append(Variant(prefix + variant.id, runtime, str(path), precision))
    if not found:
        raise BundleError(f"{folder}: no variant can be measured: {'; '.join(reasons)}",
                          "edgekd doctor tells what this machine has")  # fmt: skip
    return found


def _measured(
    variants: list[Variant], protocol: Protocol, feeds: Sequence[Feed], device: Device
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    told: dict[str, Any] = {}
    for key, latency in measure(variants, protocol=protocol, inputs=feeds, device=device).items():
        told = latency.environment
        found[key] = {
            "executed": None,
            "calls": latency.runs,
            "latency_p50_ms": latency.wall_p50_ms,
            "latency_p90_ms": latency.wall_p90_ms,
            "latency_p99_ms": latency.wall_p99_ms,
            "cpu_p50_ms": latency.cpu_p50_ms,
            "load_ms": latency.load_ms,
            "first_call_ms": latency.first_call_ms,
            "memory_mib": latency.memory_mib,
            "energy_mj": latency.energy_mj,
        }
        if latency.device_p50_ms is not None:  # a GPU that times itself
            found[key] |= {
                name: getattr(latency, name) for name in ("device_p50_ms", "device_p90_ms", "layers_ms")
            }
    return found | {"environment": told}


def examine() -> dict[str, Any]:
    """Runtimes with version, device and precisions, or why one is missing; targets that are this machine."""
    found: dict[str, Any] = {}
    for name in backend_names():
        try:
            engine = backend(name)
            found[name] = {
                "version": engine.version(),
                "device": engine.device(),
                "precisions": list(engine.precisions()),
            }
        except MissingExtraError as error:
            found[name] = {"version": None, "reason": error.message, "install": error.hint}
        except EdgekdError as error:
            found[name] = {"version": None, "reason": error.message}
    here = [card.id for card in all_targets().values() if is_this_machine(card)]
    return {
        "runtimes": found,
        "this_machine_is": here or ["none of the shipped cards"],
        "environment": environment(),
    }
